"""Images and videos of any form, read into arrays; prompts, checked against them."""

import os

import numpy as np
from transformers.image_utils import is_pil_image, load_image, to_numpy_array
from transformers.video_utils import make_batched_metadata

from .inputs_download import is_url, shown
from .inputs_media import (
    check_mode,
    check_pixels,
    file_content,
    flat_images,
    flat_videos,
    is_empty,
    is_rescaled,
    read_image,
)
from .inputs_video import frame_indices, read_video, stack_frames


def check_prompts(text, media: dict) -> None:
    """
    Refuses texts that are none, and texts that do not have one placeholder for each medium: in all, and each by itself where
    there is a list of media for each.

    Args:
        text: list of prompts.
        media: for each kind its placeholder and its media, in any form; `None` for none.

    Raises:
        ValueError: as said, or a text cannot be encoded.
    """
    check_text(text)
    flat_media = {"image": flat_images, "video": flat_videos}
    for name, (token, given) in media.items():
        items, rows = ([], None) if is_empty(given) else flat_media[name](given)
        found = [sample.count(token) for sample in text]
        if sum(found) != len(items):
            raise ValueError(
                f"the text has {sum(found)} {token} placeholders, but {len(items)} {name}s were passed; write one "
                f"{token} for each {name}, where it belongs in the prompt, or in a chat a part of type {name!r}."
            )
        if rows is not None and len(text) > 1 and rows != found:
            raise ValueError(
                f"the prompts have {found} {token} placeholders, but the lists hold {rows} {name}s; pass one list "
                f"for each prompt with the {name}s of that prompt, or one flat list of all."
            )


def check_text(text) -> None:
    """Raises ValueError for prompts that are no list of strings, or cannot be encoded."""
    if not (isinstance(text, (list, tuple)) and all(isinstance(sample, str) for sample in text)):
        raise ValueError(f"text must be a string or a list of strings, but is {text!r}")
    for row, sample in enumerate(text):
        _check_encodes(sample, row)


def _check_encodes(text: str, row: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {row} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, which "
            'stands for no character; replace it, for example by text.encode("utf-8", "replace").decode().'
        ) from error


def read_images(images, image_processor, kwargs, fetch) -> list:
    """Every image as PIL or an array; `kwargs` are those of the processor's call, `fetch` downloads a URL."""
    options = {**kwargs, **kwargs.get("images_kwargs", {})}
    rescaled = is_rescaled(image_processor, options)
    images, _ = flat_images(images)
    for index, image in enumerate(images):
        name = f"image {index}"
        if isinstance(image, str):
            images[index] = read_image(image, name, fetch)
        elif is_pil_image(image):
            check_mode(image, name)
        elif hasattr(image, "dtype"):
            check_pixels(image, "height, width", name, rescaled)
        else:
            raise ValueError(
                f"{name} is of type {type(image).__name__}, but must be a PIL image, an array, or a string that is "
                "a path, an http or https URL, or base64."
            )
    return images


def sample_videos(videos, video_processor, kwargs, fetch, rule=frame_indices) -> tuple:
    """Decoded and by `rule` sampled frames of every video, and the arguments that then remain for the stock processor."""
    videos_kwargs = dict(kwargs.get("videos_kwargs", {}))
    rescaled = is_rescaled(video_processor, {**kwargs, **videos_kwargs})
    options = {}
    for key in ("num_frames", "fps", "do_sample_frames", "video_metadata"):
        flat, nested = kwargs.pop(key, None), videos_kwargs.pop(key, None)
        options[key] = nested if nested is not None else flat
    asked = options["num_frames"] is not None or options["fps"] is not None
    if options["do_sample_frames"] is None:
        options["do_sample_frames"] = asked or video_processor.do_sample_frames
    if not asked:
        options["num_frames"] = video_processor.num_frames
        options["fps"] = video_processor.fps if options["num_frames"] is None else None

    def choose(total, source_fps):
        if not options["do_sample_frames"]:
            return np.arange(total)
        return rule(total, options["num_frames"], options["fps"], source_fps)

    videos, _ = flat_videos(videos)
    given = options["video_metadata"]
    metadata = [None] * len(videos) if given is None else make_batched_metadata(videos, given)
    for index, video in enumerate(videos):
        name = f"video {index}"
        videos[index], metadata[index] = _read_video(video, name, metadata[index], choose, fetch, rescaled)
    options = {"do_sample_frames": False, "video_metadata": metadata}
    # 4.57 reads either `videos_kwargs` or the flat arguments, not both.
    if "videos_kwargs" in kwargs:
        options = {"videos_kwargs": {**videos_kwargs, **options}}
    return videos, {**kwargs, **options}


def check_lengths(videos: list) -> None:
    """Raises ValueError where videos have different numbers of frames, so that their pixels make no tensor."""
    lengths = [len(video) for video in videos]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the videos of one call have {lengths} frames, but must all have the same number: sample them with "
            "num_frames=, or process them in separate calls."
        )


def _read_video(video, name: str, metadata, choose, fetch, rescaled: bool) -> tuple:
    """The chosen frames of a video of any form, as an array, and their metadata; `metadata` is what is known of it."""
    if isinstance(video, os.PathLike):
        video = os.fspath(video)
    if isinstance(video, str):
        return read_video(fetch(video), choose, shown(video)) if is_url(video) else read_video(video, choose)
    if hasattr(video, "read"):
        video = file_content(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return read_video(bytes(video), choose, name)
    if is_pil_image(video) or getattr(video, "ndim", 4) < 4:  # one frame
        video = [video]
    elif not isinstance(video, (list, tuple)) and not hasattr(video, "dtype"):
        raise ValueError(
            f"{name} is of type {type(video).__name__}, but must be a path, an http or https URL, bytes, a binary "
            "file, an array (frames, height, width, 3), or a list of frames."
        )
    if len(video) == 0:
        raise ValueError(f"{name} has no frames")
    kept = choose(len(video), metadata and metadata.fps)
    if isinstance(video, (list, tuple)):
        frames = [_frame(video[index], f"frame {index} of {name}", fetch) for index in kept]
        frames = stack_frames(frames, name)
    else:
        frames = to_numpy_array(video)[kept]  # 4.57 reads the channels of a tensor as the first dimension
    check_pixels(frames, "frames, height, width", name, rescaled)
    if metadata is None:
        (metadata,) = make_batched_metadata([frames], None)
        metadata.total_num_frames = len(video)
    metadata.frames_indices = [int(frame) for frame in kept]
    return frames, metadata


def _frame(frame, name: str, fetch) -> np.ndarray:
    if isinstance(frame, os.PathLike):
        frame = os.fspath(frame)
    if isinstance(frame, str):
        frame = read_image(frame, name, fetch)
    if is_pil_image(frame):
        check_mode(frame, name)
        return np.array(load_image(frame))
    return to_numpy_array(frame)
