"""Images and videos as callers pass them: which belong to which prompt, and which values they may have."""

import binascii
import io
import math
import os
import re
from typing import Callable

from transformers.image_utils import is_pil_image, load_image

from .inputs_download import is_url, shown

try:
    from transformers.image_utils import PIL  # Pillow, which a model can be loaded without
except ImportError:
    PIL = None


def is_empty(media) -> bool:
    """Whether nothing was passed: `None`, or lists of nothing."""
    return media is None or isinstance(media, (list, tuple)) and all(is_empty(item) for item in media)


def flat_images(images) -> tuple:
    """
    Images in the order of their prompts.

    Args:
        images: an image (PIL, array, path, URL or base64), a batched array, or lists of them, nested or not.

    Returns:
        the list of images, and where the lists are nested, one for each prompt, how many each holds; else `None`.
    """
    images = images if isinstance(images, (list, tuple)) else [images]
    rows = [_images_of(row) for row in images]
    nested = any(isinstance(row, (list, tuple)) for row in images)
    return sum(rows, []), [len(row) for row in rows] if nested else None


def _images_of(value) -> list:
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in _images_of(item)]
    if value is None:
        return []
    return list(value) if getattr(value, "ndim", 0) == 4 else [value]


def flat_videos(videos) -> tuple:
    """
    Videos in the order of their prompts.

    Args:
        videos: a video (path, URL, bytes, binary file, array of frames, list of frames), a batched array, or lists of
            them, nested or not. A list of strings is a list of videos; inside two other lists it is one video's frames.

    Returns:
        the list of videos, and where the lists are nested, one for each prompt, how many each holds; else `None`.
    """
    if not isinstance(videos, (list, tuple)) or _are_frames(videos):
        return _videos_of(videos, 0), None
    rows = [_videos_of(row, 1) for row in videos]
    nested = any(isinstance(row, (list, tuple)) and not _are_frames(row) for row in videos)
    return sum(rows, []), [len(row) for row in rows] if nested else None


def _videos_of(value, depth: int) -> list:
    if isinstance(value, (list, tuple)):
        if _are_frames(value) or depth == 2 and value and all(isinstance(item, (str, os.PathLike)) for item in value):
            return [value]
        return [video for item in value for video in _videos_of(item, depth + 1)]
    if value is None:
        return []
    return list(value) if getattr(value, "ndim", 0) == 5 else [value]


def _are_frames(value) -> bool:
    """Whether a list is one video: not empty, and each item is a picture."""
    is_frame = lambda item: is_pil_image(item) or getattr(item, "ndim", 4) <= 3  # noqa: E731
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_frame, value))


def read_image(source: str, name: str, fetch: Callable[[str], bytes]):
    """
    An image as in `load_image` of transformers (PIL, RGB, upright), but within the limits of `fetch`.

    Args:
        source: a path, an http, https or data URL, or base64.
        name: what errors call the image.
        fetch: what a URL leads to, within its limits.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: it cannot be read as an image of 8 bits a channel, or is a URL of another scheme.
    """
    try:
        with PIL.Image.open(_image_file(source, name, fetch)) as image:
            check_mode(image, name)
            return load_image(image)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(_not_an_image(source, name, error)) from error
    except (PIL.Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{name}, {shown(source)}, cannot be read as an image: {error}") from error


def _image_file(source: str, name: str, fetch):
    if is_url(source):
        return io.BytesIO(fetch(source))
    if os.path.isfile(source):
        return source
    try:
        return io.BytesIO(fetch(f"data:;base64,{source}"))
    except binascii.Error as error:
        raise ValueError(_not_an_image(source, name, "no file has this name, and it is no base64")) from error


def _not_an_image(source: str, name: str, reason) -> str:
    return f"{name} is {shown(source)}, but must be the path of an image, its http or https URL, or base64: {reason}"


def file_content(file) -> bytes:
    """
    All of a binary file object, whatever its position.

    Raises:
        ValueError: it was opened as text.
    """
    if isinstance(file, io.BytesIO):
        return file.getvalue()  # its position stays, so that threads can share it
    if file.seekable():
        file.seek(0)
    content = file.read()
    if not isinstance(content, bytes):
        raise ValueError(f"{file!r} gives {type(content).__name__}, but a video is bytes; open it in binary mode.")
    return content


def check_mode(image, name: str) -> None:
    """Raises ValueError for a PIL image of more than 8 bits a channel: in RGB, PIL would cut its values off at 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(
            f"{name} has PIL mode {image.mode!r}, with more than 8 bits a channel; scale it to 0..255 first, for 16 "
            "bits by Image.fromarray((np.asarray(image) // 257).astype(np.uint8))."
        )


def check_pixels(pixels, dimensions: str, name: str, rescaled: bool) -> None:
    """
    Raises ValueError for an array that is not RGB, or whose values are not those of an 8-bit picture.

    Args:
        pixels: numpy array or tensor.
        dimensions: what its shape must be beside the channels, such as `"height, width"`.
        name: what errors call it.
        rescaled: whether its values will be divided by 255.
    """
    shape = tuple(pixels.shape)
    if len(shape) != dimensions.count(",") + 2 or 3 not in (shape[-1], shape[-3]) or 0 in shape:
        raise ValueError(
            f"{name} has the shape {shape}, but must have ({dimensions}, 3), or the channels before height and width: "
            "RGB, so repeat the one channel of a grey picture, and leave out an alpha channel."
        )
    dtype = str(pixels.dtype).removeprefix("torch.")
    if dtype == "uint8" or not rescaled:
        return
    found = f"{dtype} values"
    if re.fullmatch(r"b?float\d+|int\d+", dtype):
        low, high = float(pixels.min()), float(pixels.max())
        in_unit_range = "float" in dtype and 0 < high <= 1
        if low >= 0 and high <= 255 and not in_unit_range:
            return
        found += f" from {low:g} to {high:g}"
    raise ValueError(
        f"{name} has {found}, but must have those of an 8-bit picture, 0..255, which are then divided by 255. Pass "
        "uint8: (x * 255).round() of values in 0..1, x // 257 of 16 bits; or pass do_rescale=False for values in 0..1."
    )


def is_rescaled(processor, options: dict) -> bool:
    """Whether an image or video processor called with `options` divides by 255."""
    value = lambda key: getattr(processor, key) if options.get(key) is None else options[key]  # noqa: E731
    return bool(value("do_rescale")) and math.isclose(value("rescale_factor"), 1 / 255, rel_tol=1e-3)
