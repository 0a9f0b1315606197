"""Media as data URLs, which is how a client of a remote server sends them."""

import base64
import re

import pytest
import torch
from tiny import grey_video, random_image, tiny_processor, write_video

SECRET = "c2VjcmV0IHBpY3R1cmUgb2YgYSBzdHJhbmdlcg"  # base64 that no message may hold


def data_url(path, media_type):
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """For each kind of media a file, its data URL, and the name of its pixels."""
    folder = tmp_path_factory.mktemp("media")
    random_image().save(folder / "image.png")
    write_video(folder / "grey.mp4", grey_video(12))
    return {
        "image": (folder / "image.png", data_url(folder / "image.png", "image/png"), "pixel_values"),
        "video": (folder / "grey.mp4", data_url(folder / "grey.mp4", "video/mp4"), "pixel_values_videos"),
    }


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_data_url_is_the_file(processor, media, kind):
    path, url, pixels = media[kind]
    expected = processor(text=f"<{kind}>", **{f"{kind}s": str(path)})
    head, _, text = url.partition(",")
    for form in (url, head.replace("data", "DATA") + "," + text, f"data:;base64,{text[:40]}\n{text[40:]}"):
        found = processor(text=f"<{kind}>", **{f"{kind}s": form})
        assert torch.equal(found[pixels], expected[pixels])


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_data_url_in_a_chat(processor, media, kind):
    path, url, pixels = media[kind]
    expected = processor(text=f"<{kind}>", **{f"{kind}s": str(path)})
    chat = [{"role": "user", "content": [{"type": kind, "url": url}, {"type": "text", "text": "where ?"}]}]
    found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(found[pixels], expected[pixels])


def test_frames_as_data_urls(processor, media):
    path, url, _ = media["image"]
    expected = processor(text="<video>", videos=[[[str(path)] * 2]])["pixel_values_videos"]
    assert torch.equal(processor(text="<video>", videos=[[[url] * 2]])["pixel_values_videos"], expected)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_limit_of_bytes_is_that_of_downloads(media, kind):
    processor = tiny_processor()
    path, url, _ = media[kind]
    size = path.stat().st_size
    processor.download_max_bytes = size - 1
    message = f"{len(url)} characters has {size} bytes, but at most {size - 1} are taken; raise download_max_bytes"
    forms = [url, url.partition(",")[2]] if kind == "image" else [url]
    for form in forms:
        with pytest.raises(ValueError, match=message if form is url else f"has {size} bytes"):
            processor(text=f"<{kind}>", **{f"{kind}s": form})
        assert processor(text=f"<{kind}>", **{f"{kind}s": form}, download_max_bytes=size)


@pytest.mark.parametrize(
    "url, message",
    [
        (f"data:video/mp4,{SECRET}", "is not in base64; write data:video/mp4;base64,"),
        (f"data:{SECRET}", "is not in base64"),
        (f"data:video/mp4,http://{SECRET}", "is not in base64"),
        (f"data:video/mp4;base64,{SECRET}*", "is not in base64: .*"),
        (f"data:video/mp4;base64,{SECRET}é", "is not in base64: .*"),
        (f"data:video/mp4;base64,{SECRET}=", "is not in base64: Incorrect padding"),
        (f"data:video/mp4;base64,{SECRET}==", "cannot be decoded as a video|must be the path of an image"),
        ("data:video/mp4;base64,", "cannot be decoded as a video|must be the path of an image"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_messages_do_not_hold_what_a_data_url_holds(processor, kind, url, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor(text=f"<{kind}>", **{f"{kind}s": url})
    error = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__
    assert re.search(f"a data URL of {len(url)} characters", str(caught.value))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_messages_do_not_hold_base64_of_a_medium(processor, kind):
    with pytest.raises((ValueError, FileNotFoundError), match="a text of 3800 characters") as caught:
        processor(text=f"<{kind}>", **{f"{kind}s": SECRET * 100})
    assert SECRET not in str(caught.value)


def test_the_sound_of_a_video_is_left_out(processor, media):
    """`transformers serve` asks for it with every video."""
    _, url, pixels = media["video"]
    chat = [{"role": "user", "content": [{"type": "video", "url": url}, {"type": "text", "text": "where ?"}]}]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    expected = processor.apply_chat_template(chat, **options)
    found = processor.apply_chat_template(chat, **options, load_audio_from_video=True)
    assert found.keys() == expected.keys()
    assert torch.equal(found[pixels], expected[pixels]) and torch.equal(found["input_ids"], expected["input_ids"])
