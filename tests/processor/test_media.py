"""Which values and shapes images and videos may have: a picture gives the same pixels in any form, or a clear error."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_image, random_video

PIXELS = {"images": "pixel_values", "videos": "pixel_values_videos"}
ARRAYS = {"images": np.array(random_image()), "videos": random_video()}


def process(processor, key, media, **options):
    return processor(text=f"<{key[:-1]}>", **{key: media}, **options)[PIXELS[key]]


@pytest.mark.parametrize("key", ["images", "videos"])
@pytest.mark.parametrize("package", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "change, found",
    [
        (lambda x: x / 255.0, "float64 values from 0 to 1"),
        (lambda x: (x / 255).astype(np.float32), "float32 values from 0 to 1"),
        (lambda x: (x / 127.5 - 1).astype(np.float32), "float32 values from -1 to 1"),
        (lambda x: x * 257.0, "float64 values from 0 to 65535"),
        (lambda x: np.where(x > 250, np.nan, x), "float64 values from nan to nan"),
        (lambda x: x.astype(np.int32) * 257, "int32 values from 0 to 65535"),
        (lambda x: x.astype(np.int64) - 10, "int64 values from -10 to 245"),
        (lambda x: x.astype(np.uint16) * 257, "uint16 values"),
        (lambda x: x > 100, "bool values"),
    ],
)
def test_values_that_are_not_those_of_8_bits(processor, key, package, change, found):
    message = rf"{key[:-1]} 0 has {found}, but must have those of an 8-bit picture, 0\.\.255.* or pass do_rescale=False"
    with pytest.raises(ValueError, match=message):
        process(processor, key, package(change(ARRAYS[key])))


@pytest.mark.parametrize("key", ["images", "videos"])
def test_values_in_0_to_1_without_rescaling(processor, key):
    expected = process(processor, key, ARRAYS[key])
    ours = (ARRAYS[key] / 255).astype(np.float32)
    for options in ({"do_rescale": False}, {f"{key}_kwargs": {"do_rescale": False}}, {"rescale_factor": 1.0}):
        pixels = process(processor, key, ours, **options)
        # Resizing does not round floats, nor cut off what swings over the edge of the range.
        assert (pixels - expected).abs().mean() < 0.01 and (pixels - expected).abs().max() < 0.5


@pytest.mark.parametrize("key", ["images", "videos"])
def test_floats_of_0_to_255_and_black_ones(processor, key):
    expected = process(processor, key, ARRAYS[key])
    pixels = process(processor, key, ARRAYS[key].astype(np.float32))
    assert (pixels - expected).abs().mean() < 0.01
    black = np.zeros_like(ARRAYS[key])
    assert torch.equal(process(processor, key, black.astype(np.float32)), process(processor, key, black))


@pytest.mark.parametrize("key", ["images", "videos"])
@pytest.mark.parametrize("shape", [(40, 48), (40, 48, 1), (40, 48, 4), (40, 48, 2), (4, 40, 48), (0, 48, 3)])
def test_shapes_that_are_not_rgb(processor, key, shape):
    shape = shape if key == "images" else (5, *shape)
    message = r"has the shape \(.*\), but must have \(.*height, width, 3\), .* repeat the one channel .* alpha channel"
    with pytest.raises(ValueError, match=message):
        process(processor, key, np.ones(shape, np.uint8))
    with pytest.raises(ValueError, match=message):
        process(
            processor,
            key,
            [list(np.ones((2, *shape)[-4:], np.uint8))] if key == "videos" else [np.ones(shape, np.uint8)],
        )


def test_grey_and_transparent_pictures_of_pillow_become_rgb(processor):
    image = random_image()
    expected = process(processor, "images", image)
    assert torch.equal(process(processor, "images", image.convert("RGBA")), expected)
    grey = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=-1)
    assert torch.equal(process(processor, "images", image.convert("L")), process(processor, "images", grey))
    video = [[image.convert("RGBA")] * 4]
    assert torch.equal(
        process(processor, "videos", video), process(processor, "videos", np.stack([np.asarray(image)] * 4))
    )


def deep(mode):
    grey = np.asarray(random_image().convert("L"))
    return Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits(processor, tmp_path, mode):
    image, path = deep(mode), tmp_path / "deep.tiff"
    image.save(path)
    message = f"has PIL mode '{mode}', with more than 8 bits a channel; scale it to 0..255 first"
    for picture in (image, str(path), base64.b64encode(path.read_bytes()).decode()):
        with pytest.raises(ValueError, match=f"image 0 {message}"):
            process(processor, "images", picture)
    for frame in (image, path):
        with pytest.raises(ValueError, match=f"frame 1 of video 0 {message}"):
            process(processor, "videos", [[[random_image(), frame]]] if frame is image else [[[save(tmp_path), frame]]])


def save(folder):
    random_image().save(folder / "image.png")
    return folder / "image.png"


def test_an_image_in_every_form(processor, tmp_path):
    expected = process(processor, "images", random_image())
    path = save(tmp_path)
    text = base64.b64encode(path.read_bytes()).decode()
    for form in (str(path), [str(path)], [[str(path)]], text, f"data:image/png;base64,{text}", (random_image(),)):
        assert torch.equal(process(processor, "images", form), expected)


def test_an_image_is_turned_upright(processor, tmp_path):
    image, path = random_image(), tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    inputs = processor(text="<image>", images=str(path))
    assert inputs["image_sizes"].tolist() == [list(image.size)]


@pytest.mark.parametrize("image", [5, b"bytes", {"path": "a.png"}, object()], ids=lambda value: type(value).__name__)
def test_what_is_no_image(processor, image):
    with pytest.raises(
        ValueError, match=f"image 1 is of type {type(image).__name__}, but must be a PIL image, an array, or a string"
    ):
        processor(text="<image><image>", images=[random_image(), image])


def test_files_that_are_no_image(processor, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no image")
    for text in (str(path), "nowhere.png", "photos/cat", "iVBORw0KGgo=", "\ud800", "x" * 10_000):
        with pytest.raises(
            ValueError,
            match="image 0 is ('.*|a text of 10000 characters), but must be the path of an image, its http or https URL, or base64",
        ) as caught:
            processor(text="<image>", images=text)
        assert len(str(caught.value)) < 300
    broken = io.BytesIO()
    random_image().save(broken, "PNG")
    path.write_bytes(broken.getvalue()[:200])
    with pytest.raises((ValueError, OSError), match="truncated|cannot be read"):
        processor(text="<image>", images=str(path))


@pytest.mark.parametrize("text", ["\ud800", "where \udfff ?", "<image> \ud83d"])
def test_half_a_surrogate_pair(processor, text):
    message = r"text 1 holds '\\ud.*' at character \d+, half of a surrogate pair.*replace it"
    with pytest.raises(ValueError, match=message):
        processor(text=["where", text])
    with pytest.raises(ValueError, match=message):
        chats = [[{"role": "user", "content": [{"type": "text", "text": each}]}] for each in ("where", text)]
        processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    assert processor(text="where 😀")["input_ids"].shape[0] == 1
