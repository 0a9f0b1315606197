"""The processor: pixels as in the stock class, and exactly as many placeholders as the model fills."""

import io
import json
import re
import threading
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rediprune.configuration_rediprune import PruningConfig, ReDiPruneConfig
from rediprune.core_layout import FrameSize, LlavaNextVideoLayouts, crop_of_tiles
from rediprune.methods_registry import METHODS
from rediprune.processing_rediprune import ReDiPruneProcessor
from tiny import (
    IMAGE_SIZE,
    PATCH_SIZE,
    PATCHES,
    PINPOINTS,
    POOLED,
    grey_video,
    random_image,
    random_video,
    stock_processor,
    tiny_config,
    tiny_model,
    tiny_processor,
    write_video,
)

IMAGE, VIDEO = 4, 5  # token ids
SIDE = IMAGE_SIZE // PATCH_SIZE
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
KEPT = round(0.15 * POOLED)
# The image processor of 4.57 takes a first dimension of 1 or 3 for the channels.
MIN_HEIGHT = 1 if TRANSFORMERS_5 else 4


def count(inputs, token):
    return (torch.as_tensor(np.asarray(inputs["input_ids"])) == token).sum(1).tolist()


def expected_image_count(size, **pruning):
    frame = FrameSize(IMAGE_SIZE, SIDE, PINPOINTS)
    return LlavaNextVideoLayouts.image(frame, size).num_placeholders(PruningConfig(**pruning))


def greys(inputs):
    """The number of each frame of a `grey_video`, read back from the pixels."""
    pixels = inputs["pixel_values_videos"][0]
    scale, shift = torch.tensor([[0.26862954, 0.26130258, 0.27577711], [0.48145466, 0.4578275, 0.40821073]])[
        :, :, None, None
    ]
    return ((pixels * scale + shift) * 255 / 20).mean((1, 2, 3)).round().int().tolist()


@pytest.fixture(scope="module")
def stock():
    return stock_processor()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "grey.mp4", grey_video(12), fps=10)


def user(*content):
    return {
        "role": "user",
        "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content],
    }


def chat(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **kwargs
    )


# -- counts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(height=st.integers(MIN_HEIGHT, 150), width=st.integers(1, 150))
@example(MIN_HEIGHT, 1)
@example(MIN_HEIGHT, 50 * MIN_HEIGHT)
@example(50, 1)
@example(64, 32)
@example(33, 100)
def test_an_unpruned_image_has_the_stock_inputs(processor, stock, height, width):
    image, text = random_image(size=(height, width)), "USER: <image>\n where ASSISTANT:"
    ours, theirs = processor(text=text, images=image, keep_ratio=1), stock(text=text, images=image)
    assert ours.pop("keep_ratio") == 1.0
    assert set(ours) == set(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


@settings(max_examples=10, deadline=None)
@given(frames=st.integers(1, 6), height=st.integers(8, 70), width=st.integers(8, 70))
def test_an_unpruned_video_has_the_stock_inputs(processor, stock, frames, height, width):
    video, text = random_video(frames=frames, size=(height, width)), "USER: <video>\n where ASSISTANT:"
    kwargs = {"text": text, "videos": [video], "do_sample_frames": False}
    ours, theirs = processor(**kwargs, keep_ratio=1), stock(**kwargs)
    assert ours.pop("keep_ratio") == 1.0
    assert set(ours) == set(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


def test_the_method_none_has_the_stock_counts(stock):
    processor = tiny_processor(method="none", keep_ratio=0.1)
    media = {"text": "<image> <video>", "images": random_image(), "videos": random_video()}
    assert torch.equal(processor(**media)["input_ids"], stock(**media)["input_ids"])


def test_frames_are_sampled_as_in_the_stock_class(processor, stock):
    for total in (4, 5, 7, 12):
        media = {"text": "<video>", "videos": [grey_video(total)]}
        ours, theirs = processor(**media), stock(**media)
        assert torch.equal(ours["pixel_values_videos"], theirs["pixel_values_videos"])


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(MIN_HEIGHT, 150),
    width=st.integers(1, 150),
    keep_ratio=st.floats(0.01, 1),
    method=st.sampled_from(["rediprune", "random", "uniform", "none"]),
)
def test_image_counts_follow_the_geometry(height, width, keep_ratio, method):
    processor = tiny_processor(method=method)
    inputs = processor(text="<image>", images=random_image(size=(height, width)), keep_ratio=keep_ratio)
    assert count(inputs, IMAGE) == [expected_image_count((height, width), method=method, keep_ratio=keep_ratio)]


@pytest.mark.parametrize("pooling, tokens", [(True, POOLED), (False, PATCHES)])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.15, 0.5, 0.99, 1])
def test_video_counts_by_hand(pooling, tokens, keep_ratio):
    processor = tiny_processor(video_pooling=pooling, keep_ratio=keep_ratio)
    assert count(processor(text="<video>", videos=random_video(frames=3)), VIDEO) == [
        3 * max(1, round(keep_ratio * tokens))
    ]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    keep_ratio=st.floats(0.001, 1),
    pooling=st.booleans(),
    frames=st.integers(1, 40),
)
def test_geometry_of_the_published_shapes(size, keep_ratio, pooling, frames):
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    frame = FrameSize(336, 24, pinpoints, 2)
    image = LlavaNextVideoLayouts.image(frame, size)
    base, tiles = image.grids
    assert (base.frames, base.height, base.width) == (1, 24, 24)
    assert 0 <= tiles.height <= 72 and 0 <= tiles.width <= 72  # a line of pixels can leave no row of tokens
    pruning, unpruned = (
        PruningConfig(keep_ratio=keep_ratio, video_pooling=pooling),
        PruningConfig(keep_ratio=1, video_pooling=pooling),
    )
    for layout in (image, LlavaNextVideoLayouts.video(frame, frames, pruning)):
        kept, full = (layout.num_placeholders(block) for block in (pruning, unpruned))
        assert sum(grid.frames * min(1, grid.tokens_per_set) for grid in layout.grids) <= kept <= full


def test_an_image_whose_crop_needs_rounding(processor, stock):
    """110 * (48 / 352) is 14.999999999999998 in floats: 15 rows of tokens hold the image, not 14."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert crop_of_tiles((110, 352), pinpoints, 336, 24) == (1, 2, 4, 0, 16, 48)
    # The same with the small tiles: 6 of 16 tokens.
    for size in ((44, 55), (47, 94), (110, 352)):
        media = {"text": "<image>", "images": random_image(size=size)}
        assert torch.equal(processor(**media, keep_ratio=1)["input_ids"], stock(**media)["input_ids"])


@pytest.mark.parametrize(
    "pinpoints", [None, 5, [], [[32]], [[32, 0]], [[64, -32]], [[32.0, 64.0]], [32, 64], [[50, 70]], [[True, 32]]]
)
def test_grids_of_an_image_that_are_none(pinpoints):
    processor = tiny_processor()
    processor.image_processor.image_grid_pinpoints = pinpoints
    message = r"image_grid_pinpoints is .*, but must be a list of resolutions .* in pixels, positive multiples of 32"
    with pytest.raises(ValueError, match=message):
        processor(text="<image>", images=random_image())
    with pytest.raises(ValueError, match=message):
        LlavaNextVideoLayouts.image(FrameSize(IMAGE_SIZE, SIDE, pinpoints), (40, 48))


@pytest.mark.parametrize("stride", [0, -1, 2.5, "2", None, True, SIDE + 1])
def test_pool_strides_that_are_none(stride):
    message = "spatial_pool_stride is .*, but must be a whole number of at least 1"
    with pytest.raises(ValueError, match=message):
        LlavaNextVideoLayouts.video(FrameSize(IMAGE_SIZE, SIDE, None, stride), 4, PruningConfig())
    processor = tiny_processor()
    processor.spatial_pool_stride = stride
    with pytest.raises(ValueError, match=message):
        processor(text="<video>", videos=random_video())
    unpooled = LlavaNextVideoLayouts.video(
        FrameSize(IMAGE_SIZE, SIDE, None, stride), 4, PruningConfig(video_pooling=False)
    )
    assert unpooled.grids == ((4, SIDE, SIDE, 0),)


@pytest.mark.parametrize(
    "size", [(MIN_HEIGHT, 1), (MIN_HEIGHT, 50 * MIN_HEIGHT), (50, 1), (32, 64), (40, 48), (100, 99)]
)
@pytest.mark.parametrize(
    "pruning", [{}, {"keep_ratio": 0.5}, {"keep_ratio": 1}, {"method": "none"}, {"video_pooling": False}]
)
def test_the_model_accepts_every_count(size, pruning):
    processor, model = tiny_processor(**pruning), tiny_model(**pruning)
    inputs = processor(text="<image> <video> where", images=random_image(size=size), videos=random_video(size=(20, 30)))
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


# -- the ratio of one call --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pruning", [{"keep_ratio": 1}, {"video_pooling": False}, *({"method": method} for method in METHODS)], ids=str
)
@pytest.mark.parametrize("keep_ratio", [None, 0.5])
def test_counts_that_serving_engines_ask_for(pruning, keep_ratio):
    """They are those of the placeholders in a real prompt."""
    processor = tiny_processor(**pruning)
    sizes, lengths = [(40, 48), (20, 60), (64, 30), (333, 77), (8, 8)], [1, 4, 7]
    counts = processor._get_num_multimodal_tokens(
        image_sizes=sizes, video_sizes=[(frames, 40, 48) for frames in lengths], keep_ratio=keep_ratio
    )
    images = [
        count(processor(text="<image>", images=random_image(0, size), keep_ratio=keep_ratio), IMAGE) for size in sizes
    ]
    videos = [
        count(
            processor(text="<video>", videos=[random_video(0, frames)], num_frames=frames, keep_ratio=keep_ratio), VIDEO
        )
        for frames in lengths
    ]
    assert [[number] for number in counts["num_image_tokens"]] == images
    assert [[number] for number in counts["num_video_tokens"]] == videos
    assert counts["num_image_patches"] == [1] * len(sizes)
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens(video_sizes=[(4, 40, 48)])


def test_a_ratio_for_one_call_travels_with_the_inputs_and_stays_there(processor):
    media = {"text": "<video>", "videos": random_video()}
    inputs = processor(**media, keep_ratio=0.5)
    assert type(inputs["keep_ratio"]) is float and inputs["keep_ratio"] == 0.5
    assert count(inputs, VIDEO) == [4 * POOLED // 2]
    moved = inputs.to("cpu", torch.bfloat16)
    assert type(moved["keep_ratio"]) is float and moved["pixel_values_videos"].dtype == torch.bfloat16
    assert type(processor(**media, keep_ratio=1)["keep_ratio"]) is float
    later = processor(**media)
    assert "keep_ratio" not in later and count(later, VIDEO) == [4 * KEPT]
    assert processor.pruning == PruningConfig()


@pytest.mark.parametrize(
    "keep_ratio", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).half()]
)
def test_a_ratio_as_a_scalar_of_numpy_or_torch(processor, keep_ratio):
    inputs = processor(text="<video>", videos=random_video(), keep_ratio=keep_ratio)
    assert type(inputs["keep_ratio"]) is float and inputs["keep_ratio"] == 0.5
    assert count(inputs, VIDEO) == [4 * POOLED // 2]
    counts = processor._get_num_multimodal_tokens(video_sizes=[(4, 40, 48)], keep_ratio=keep_ratio)
    assert counts["num_video_tokens"] == [4 * POOLED // 2]


@pytest.mark.parametrize(
    "keep_ratio", [0, 1.5, -1, float("nan"), "0.5", True, np.float32(1.5), torch.tensor(0.0), torch.tensor(True)]
)
def test_a_bad_ratio_for_one_call(processor, keep_ratio):
    with pytest.raises(ValueError, match=r"pruning key 'keep_ratio' is .* a number in \(0, 1\]"):
        processor(text="<video>", videos=random_video(), keep_ratio=keep_ratio)


def test_threads_do_not_share_a_ratio(processor):
    ratios = [0.1, 0.3, 0.5, 0.7, 0.9, None]
    video, wrong = random_video(), []

    def call(keep_ratio):
        for _ in range(10):
            inputs = processor(text="<video>", videos=video, keep_ratio=keep_ratio)
            if count(inputs, VIDEO) != [4 * round((keep_ratio or 0.15) * POOLED)]:
                wrong.append(keep_ratio)

    threads = [threading.Thread(target=call, args=[keep_ratio]) for keep_ratio in ratios]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- which media belong where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [None, [], [[]], (), [None]])
def test_empty_modalities_are_no_media(processor, empty):
    reference = processor(text="where is the star ?")
    inputs = processor(text="where is the star ?", images=empty, videos=empty, audio=empty, audios=empty)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert torch.equal(inputs["input_ids"], reference["input_ids"])
    assert "pixel_values_videos" in processor(text="<video>", images=empty, videos=random_video(), audios=empty)


@pytest.mark.parametrize("name", ["audio", "audios"])
def test_audio_is_refused(processor, name):
    with pytest.raises(ValueError, match="takes images and videos, but audio was given; leave it out"):
        processor(text="where", **{name: [np.zeros(16000)]})


def test_several_media_in_any_order(processor):
    sizes = [(20, 60), (30, 60), (40, 40)]
    images = [random_image(seed, size) for seed, size in enumerate(sizes)]
    counts = [expected_image_count(size) for size in sizes]
    assert len(set(counts)) == 3
    videos = [random_video(seed) for seed in range(2)]
    inputs = processor(text="<image><image> where <video> is <image> the <video>", images=images, videos=videos)
    runs, ids = [], inputs["input_ids"][0].tolist()
    for previous, token in zip([None] + ids, ids):
        if token in (IMAGE, VIDEO):
            if token != previous:
                runs.append([token, 0])
            runs[-1][1] += 1
    assert runs == [[IMAGE, counts[0] + counts[1]], [VIDEO, 4 * KEPT], [IMAGE, counts[2]], [VIDEO, 4 * KEPT]]
    assert inputs["image_sizes"].tolist() == [list(size) for size in sizes]
    assert inputs["pixel_values_videos"].shape[:2] == (2, 4)


def test_adjacent_placeholders_of_both_kinds(processor):
    inputs = processor(text="<video><image><video>", images=random_image(), videos=[random_video(0), random_video(1)])
    assert count(inputs, VIDEO) == [2 * 4 * KEPT] and count(inputs, IMAGE) == [expected_image_count((40, 48))]


def test_nested_lists_are_flattened_in_order(processor):
    images = [random_image(seed, (40, 30 + seed)) for seed in range(3)]
    text = ["<image> <image> where", "<image> where"]
    flat = processor(text=text, images=images, padding=True)
    nested = processor(text=text, images=[images[:2], images[2:]], padding=True)
    videos = [random_video(seed) for seed in range(2)]
    flat_videos = processor(text=["<video>", "<video>"], videos=videos)
    nested_videos = processor(text=["<video>", "<video>"], videos=[[videos[0]], [videos[1]]])
    batched_array = processor(text=["<video>", "<video>"], videos=np.stack(videos))
    for first, second in ((flat, nested), (flat_videos, nested_videos), (flat_videos, batched_array)):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "lists, found",
    [
        ([[0, 1], [2]], [2, 1]),
        ([[0], [1], [2]], [1, 1, 1]),
        ([[0, 1, 2]], [3]),
        ([[0, 1], 2], [2, 1]),
        ([[0, 1, 2], []], [3, 0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["image", "video", "path"])
def test_lists_for_other_prompts_are_refused(processor, mp4, kind, lists, found):
    """They would move a medium to the prompt of somebody else."""
    build = {"image": random_image, "video": random_video, "path": lambda index: str(mp4)}[kind]
    media = [[build(index) for index in row] if isinstance(row, list) else build(row) for row in lists]
    kind = "image" if kind == "image" else "video"
    message = re.escape(f"the prompts have [1, 2] <{kind}> placeholders, but the lists hold {found} {kind}s; pass")
    with pytest.raises(ValueError, match=message):
        processor(text=[f"<{kind}> where", f"<{kind}> <{kind}> where"], **{f"{kind}s": media}, padding=True)
    # With one prompt there is nowhere else to go.
    ids = processor(text=" ".join([f"<{kind}>"] * 3), **{f"{kind}s": media})["input_ids"]
    assert (ids[0] == (IMAGE if kind == "image" else VIDEO)).any()


def test_rows_without_media_have_empty_lists(processor):
    images = [random_image(seed, (40, 30 + seed)) for seed in range(2)]
    text = ["where", "<image> <image> where"]
    nested = processor(text=text, images=[[], images], padding=True)
    assert torch.equal(nested["input_ids"], processor(text=text, images=images, padding=True)["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded(processor, side):
    texts = ["<video> where", "<video> where is the red star ?", "how many ?"]
    videos = [random_video(0), random_video(1)]
    batch = processor(text=texts, videos=videos, padding=True, padding_side=side)
    for row, text in enumerate(texts):
        alone = processor(text=text, videos=videos[row] if "<video>" in text else None)["input_ids"][0]
        real = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert torch.equal(real, alone)
    first = batch["attention_mask"][:, 0] if side == "left" else batch["attention_mask"][:, -1]
    assert first.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "text, media, message",
    [
        ("<image> <image>", {"images": 1}, "the text has 2 <image> placeholders, but 1 images were passed"),
        ("<image>", {"images": 2}, "the text has 1 <image> placeholders, but 2 images were passed"),
        ("<image>", {}, "the text has 1 <image> placeholders, but 0 images were passed"),
        ("where", {"videos": 1}, "the text has 0 <video> placeholders, but 1 videos were passed"),
        (
            ["<video>", "<video>"],
            {"videos": 1},
            "the text has 2 <video> placeholders, but 1 videos were passed",
        ),
        ("<video>", {"images": 1}, "the text has 0 <image> placeholders, but 1 images were passed"),
    ],
)
def test_placeholders_and_media_must_match(processor, text, media, message):
    build = {"images": random_image, "videos": random_video}
    media = {kind: [build[kind](seed) for seed in range(number)] for kind, number in media.items()}
    with pytest.raises(ValueError, match=message + "; write one <(image|video)> for each"):
        processor(text=text, **media)


def test_nothing_at_all(processor):
    with pytest.raises(ValueError, match="ReDiPruneProcessor was given nothing; pass text, images or videos"):
        processor()
    with pytest.raises(ValueError, match=r"text must be a string or a list of strings, but is \['where', 5\]"):
        processor(text=["where", 5])


def test_media_without_text(processor):
    assert set(processor(images=random_image())) == {"pixel_values", "image_sizes"}
    assert set(processor(videos=random_video())) == {"pixel_values_videos"}


def test_text_alone(processor, stock):
    text = ["where is the star ?", "how many"]
    ours, theirs = processor(text=text, padding=True), stock(text=text, padding=True)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_truncation_inside_the_placeholders_is_refused(processor):
    with pytest.raises(ValueError, match="Mismatch in `video` token count"):
        processor(text="<video> where", videos=random_video(), truncation=True, max_length=4)


# -- chats ------------------------------------------------------------------------------------------------------------


def test_chat_with_a_video_file(processor, mp4):
    inputs = chat(processor, [user({"type": "video", "path": str(mp4)}, "where")])
    assert count(inputs, VIDEO) == [4 * KEPT] and greys(inputs) == [0, 3, 6, 9]
    assert processor.decode(inputs["input_ids"][0][-2:]) == "ASSISTANT :"


@pytest.mark.parametrize(
    "options, frames",
    [
        ({"num_frames": 3}, [0, 4, 8]),
        ({"num_frames": 1}, [0]),
        ({"fps": 5}, [0, 2, 4, 6, 8, 10]),
        ({"fps": 1}, [0]),
        ({"do_sample_frames": False}, list(range(12))),
        ({"num_frames": 100}, list(range(12))),
        ({"fps": 30}, list(range(12))),
    ],
)
def test_chat_chooses_frames(processor, mp4, options, frames):
    messages = [user({"type": "video", "path": str(mp4)}, "where")]
    inputs = chat(processor, messages, **options)
    assert greys(inputs) == frames and count(inputs, VIDEO) == [KEPT * len(frames)]
    if TRANSFORMERS_5:
        nested = chat(processor, messages, processor_kwargs=options)
        assert torch.equal(nested["pixel_values_videos"], inputs["pixel_values_videos"])
    direct = processor(text="<video>", videos=mp4, videos_kwargs=options)
    assert torch.equal(direct["pixel_values_videos"], inputs["pixel_values_videos"])


def test_chat_with_a_ratio(processor, mp4):
    inputs = chat(processor, [user({"type": "video", "path": str(mp4)}, "where")], num_frames=2, keep_ratio=0.5)
    assert inputs["keep_ratio"] == 0.5 and count(inputs, VIDEO) == [2 * POOLED // 2]


def test_chat_with_images_and_turns(processor, tmp_path):
    first, second = random_image(0, (40, 48)), random_image(1, (20, 60))
    second.save(tmp_path / "second.png")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "how many"}]},
        user({"type": "image", "image": first}, "where"),
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
        user({"type": "image", "path": str(tmp_path / "second.png")}, "which way"),
    ]
    inputs = chat(processor, messages)
    text = "SYSTEM: how many USER: <image>\nwhere ASSISTANT: left USER: <image>\nwhich way ASSISTANT:"
    direct = processor(text=text, images=[first, second])
    assert all(torch.equal(inputs[key], direct[key]) for key in direct)
    without = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert without["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 2


def test_chat_in_batches(processor, mp4):
    chats = [[user({"type": "video", "path": str(mp4)}, "where")], [user("how many red star ?")]]
    inputs = chat(processor, chats, padding=True)
    assert count(inputs, VIDEO) == [4 * KEPT, 0] and len(inputs["pixel_values_videos"]) == 1


# -- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["path", "string", "list", "tuple", "nested", "bytes", "list of bytes", "BytesIO", "file"]
)
def test_forms_of_a_video_path(processor, mp4, form):
    videos = {
        "path": mp4,
        "string": str(mp4),
        "list": [mp4],
        "tuple": (str(mp4),),
        "nested": [[mp4]],
        "bytes": mp4.read_bytes(),
        "list of bytes": [[bytearray(mp4.read_bytes())]],
        "BytesIO": io.BytesIO(mp4.read_bytes()),
        "file": mp4.open("rb"),
    }[form]
    for _ in range(2):  # the position of a file does not matter
        assert greys(processor(text="<video>", videos=videos)) == [0, 3, 6, 9]


@pytest.mark.parametrize(
    "form", ["numpy", "torch", "list of arrays", "PIL", "tuple of PIL", "palette", "files", "float"]
)
def test_forms_of_frames(processor, form, tmp_path):
    frames = grey_video(12)
    images = [Image.fromarray(frame) for frame in frames]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    videos = {
        "numpy": frames,
        "torch": torch.from_numpy(frames),
        "list of arrays": [list(frames)],
        "PIL": images,
        "tuple of PIL": (tuple(images),),
        "palette": [[image.convert("P") for image in images]],
        "files": [[[tmp_path / f"{index}.png" for index in range(12)]]],
        "float": frames.astype(np.float32),
    }[form]
    inputs = processor(text="<video>", videos=videos, num_frames=4)
    assert greys(inputs) == [0, 3, 6, 9] and count(inputs, VIDEO) == [4 * KEPT]


def test_frames_given_as_files_in_a_chat(processor, tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(6)]
    for path, frame in zip(paths, grey_video(6)):
        Image.fromarray(frame).save(path)
    inputs = chat(processor, [user({"type": "video", "path": paths}, "where")], num_frames=3)
    assert greys(inputs) == [0, 2, 4]


def test_channels_first(processor):
    video = grey_video(8)
    first = processor(text="<video>", videos=np.ascontiguousarray(video.transpose(0, 3, 1, 2)))
    assert torch.equal(first["pixel_values_videos"], processor(text="<video>", videos=video)["pixel_values_videos"])


def test_a_clip_shorter_than_asked_gives_all_its_frames(processor, tmp_path):
    short = write_video(tmp_path / "short.mp4", grey_video(2))
    for videos in (short, grey_video(2)):
        inputs = processor(text="<video>", videos=videos, num_frames=8)
        assert greys(inputs) == [0, 1] and count(inputs, VIDEO) == [2 * KEPT]


def test_videos_of_different_lengths(processor):
    videos = [random_video(frames=3), random_video(frames=2)]
    with pytest.raises(ValueError, match=r"have \[3, 2\] frames, but must all have the same number.*num_frames="):
        processor(text="<video> <video>", videos=videos)
    inputs = processor(text="<video> <video>", videos=videos, num_frames=2)
    assert inputs["pixel_values_videos"].shape[:2] == (2, 2)


def test_num_frames_for_a_video_processor_that_does_not_sample(mp4):
    processor = tiny_processor()
    processor.video_processor.do_sample_frames = False
    for videos in (mp4, grey_video(12)):
        assert greys(processor(text="<video>", videos=videos)) == list(range(12))
        assert greys(processor(text="<video>", videos=videos, num_frames=3)) == [0, 4, 8]
        assert greys(processor(text="<video>", videos=videos, videos_kwargs={"num_frames": 3})) == [0, 4, 8]
    assert greys(processor(text="<video>", videos=mp4, fps=5)) == [0, 2, 4, 6, 8, 10]


def test_one_clip_of_a_batch_of_files_is_too_short(processor, mp4, tmp_path):
    short = write_video(tmp_path / "short.mp4", grey_video(2))
    with pytest.raises(ValueError, match=r"have \[4, 2\] frames"):
        processor(text="<video> <video>", videos=[mp4, short])


def test_sampling_options_that_exclude_each_other_or_are_out_of_range(processor, mp4):
    for options, message in (
        ({"num_frames": 2, "fps": 3}, "num_frames=2 and fps=3 exclude each other"),
        ({"num_frames": 0}, "num_frames is 0, but must be at least 1"),
        ({"num_frames": -3}, "num_frames is -3, but must be at least 1"),
        ({"fps": 0}, "fps is 0, but must be positive"),
        ({"fps": float("nan")}, "fps is nan, but must be positive"),
        ({"fps": float("inf")}, "fps is inf, but must be positive and finite"),
        ({"fps": "2"}, "fps is '2', but must be a number"),
        ({"num_frames": 2.5}, "num_frames is 2.5, but must be a whole number"),
        ({"num_frames": 4.0}, "num_frames is 4.0, but must be a whole number"),
        ({"num_frames": "4"}, "num_frames is '4', but must be a whole number"),
    ):
        for videos in (mp4, grey_video(12)):
            with pytest.raises(ValueError, match=message):
                processor(text="<video>", videos=videos, **options)
    for number in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert greys(processor(text="<video>", videos=mp4, num_frames=number)) == [0, 4, 8]
    with pytest.raises(ValueError, match="frame rate of the video is unknown; pass num_frames instead"):
        processor(text="<video>", videos=random_video(), fps=2)
    metadata = {"total_num_frames": 12, "fps": 10.0}
    inputs = processor(text="<video>", videos=grey_video(12), fps=5, video_metadata=[metadata])
    assert greys(inputs) == [0, 2, 4, 6, 8, 10]


def test_metadata_names_the_frames(processor, mp4):
    inputs = processor(text="<video>", videos=mp4, return_metadata=True)
    (metadata,) = inputs["video_metadata"]
    assert [int(index) for index in metadata.frames_indices] == [0, 3, 6, 9]
    assert (metadata.fps, metadata.total_num_frames, metadata.duration) == (10, 12, 1.2)
    assert "video_metadata" not in processor(text="<video>", videos=mp4)


@pytest.mark.parametrize("form", ["array", "list of frames", "files", "given"])
def test_metadata_of_frames_names_those_that_were_taken(processor, tmp_path, form):
    frames, options = grey_video(12), {}
    paths = [str(tmp_path / f"{index}.png") for index in range(12)]
    for path, frame in zip(paths, frames):
        Image.fromarray(frame).save(path)
    if form == "given":
        options = {"video_metadata": [{"total_num_frames": 12, "fps": 10.0}]}
    videos = {"array": frames, "list of frames": [list(frames)], "files": [[paths]], "given": frames}[form]
    inputs = processor(text="<video>", videos=videos, num_frames=3, return_metadata=True, **options)
    (metadata,) = inputs["video_metadata"]
    assert [int(index) for index in metadata.frames_indices] == [0, 4, 8]
    assert metadata.total_num_frames == 12 and metadata.fps == options.get("video_metadata", [{"fps": None}])[0]["fps"]


def test_video_files_that_cannot_be_read(processor, mp4, tmp_path):
    missing, empty, text, sound = (tmp_path / name for name in ("missing.mp4", "empty.mp4", "text.mp4", "sound.wav"))
    empty.touch()
    text.write_text("this is no video\n" * 100)
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    truncated = tmp_path / "truncated.mp4"
    truncated.write_bytes(mp4.read_bytes()[: len(mp4.read_bytes()) // 2])
    with pytest.raises(FileNotFoundError, match=f"no video file at '{missing}'"):
        processor(text="<video>", videos=missing)
    for path in (empty, text, sound, truncated):
        with pytest.raises(ValueError, match=f"'{path}' cannot be decoded as a video"):
            processor(text="<video>", videos=path)


def test_a_video_file_without_frames(processor, tmp_path):
    path = tmp_path / "frameless.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 32
        container.start_encoding()
    with pytest.raises(ValueError, match=f"'{path}' (has no frames|cannot be decoded as a video)"):
        processor(text="<video>", videos=path)


def test_arrays_without_frames(processor):
    for videos in (np.zeros((0, 32, 32, 3), dtype=np.uint8), [np.zeros((0, 32, 32, 3), dtype=np.uint8)]):
        with pytest.raises(ValueError, match="video 0 has no frames"):
            processor(text="<video>", videos=videos)


def test_a_missing_image_file(processor):
    with pytest.raises(ValueError, match="nowhere.png"):
        processor(text="<image>", images="nowhere.png")


# -- stock arguments --------------------------------------------------------------------------------------------------


def test_other_forms_of_return_values(processor, stock):
    media = {"text": ["<image> where", "<image> where"], "images": [random_image(0), random_image(1)]}
    for return_tensors in (None, "np"):
        ours = processor(**media, return_tensors=return_tensors, keep_ratio=1)
        theirs = stock(**media, return_tensors=return_tensors)
        assert type(ours["input_ids"]) is type(theirs["input_ids"])
        assert np.array_equal(np.asarray(ours["input_ids"]), np.asarray(theirs["input_ids"]))
    # The video processor of 4.57 knows tensors and lists alone.
    videos = processor(text="<video>", videos=random_video(), return_tensors="np" if TRANSFORMERS_5 else None)
    assert not torch.is_tensor(videos["input_ids"]) and count(videos, VIDEO) == [4 * KEPT]


def test_arguments_of_the_video_processor(processor):
    video = random_video(size=(40, 80))
    cropped = processor(text="<video>", videos=video)["pixel_values_videos"]
    for options in ({"do_normalize": False}, {"videos_kwargs": {"do_normalize": False}}):
        inputs = processor(text="<video>", videos=video, **options)
        assert inputs["pixel_values_videos"].shape == cropped.shape
        assert 0 <= inputs["pixel_values_videos"].min() and inputs["pixel_values_videos"].max() <= 1 + 1e-6


def test_frames_that_are_not_square(processor):
    with pytest.raises(ValueError, match="frames are 16x32 after preprocessing, but the vision tower takes squares"):
        processor(
            text="<video>",
            videos=random_video(),
            videos_kwargs={"size": {"height": 16, "width": 32}, "crop_size": {"height": 16, "width": 32}},
        )


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4.57 has no token types in this processor")
def test_token_types_mark_the_placeholders(processor):
    inputs = processor(
        text="<image> where <video>",
        images=random_image(),
        videos=random_video(),
        return_mm_token_type_ids=True,
    )
    types, ids = inputs["mm_token_type_ids"], inputs["input_ids"]
    assert torch.equal(types == 1, ids == IMAGE) and torch.equal(types == 2, ids == VIDEO)


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_processor(keep_ratio=0.9).save_pretrained(tmp_path)
    tiny_config(pruning={"keep_ratio": 0.4, "video_pooling": False}).save_pretrained(tmp_path)
    return tmp_path


def test_pruning_comes_from_the_config_alone(folder):
    for file in folder.glob("*.json"):
        assert file.name == "config.json" or "pruning" not in file.read_text(), file.name
        assert file.name == "config.json" or "spatial_pool_stride" not in file.read_text(), file.name
    processor = ReDiPruneProcessor.from_pretrained(folder)
    assert processor.pruning == PruningConfig(keep_ratio=0.4, video_pooling=False)
    assert count(processor(text="<video>", videos=random_video()), VIDEO) == [4 * round(0.4 * PATCHES)]


def test_pruning_given_while_loading_is_merged(folder):
    processor = ReDiPruneProcessor.from_pretrained(folder, pruning={"keep_ratio": 0.2})
    assert processor.pruning == PruningConfig(keep_ratio=0.2, video_pooling=False)
    with pytest.raises(ValueError, match="unknown pruning key 'ratio'"):
        ReDiPruneProcessor.from_pretrained(folder, pruning={"ratio": 0.2})


def test_the_pool_stride_comes_from_the_config(folder):
    content = json.loads((folder / "config.json").read_text())
    content["spatial_pool_stride"] = 4
    (folder / "config.json").write_text(json.dumps(content))
    processor = ReDiPruneProcessor.from_pretrained(folder, pruning={"video_pooling": True, "keep_ratio": 1})
    assert count(processor(text="<video>", videos=random_video()), VIDEO) == [4 * PATCHES // 16]


@pytest.mark.parametrize(
    "key, value",
    [("spatial_pool_stride", 0), ("image_grid_pinpoints", [[0, 64]]), ("image_grid_pinpoints", [])],
)
def test_a_geometry_that_is_none_is_refused_where_it_is_set(folder, key, value):
    with pytest.raises(ValueError, match=f"{key}.* is .*, but must be"):
        ReDiPruneConfig(**{key: value})
    with pytest.raises(ValueError, match=f"{key}.* is .*, but must be"):
        setattr(ReDiPruneConfig(), key, value)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(ValueError, match=f"{key}.* is .*, but must be"):
        ReDiPruneProcessor.from_pretrained(folder)


def test_a_loaded_processor_does_the_same(folder):
    saved, loaded = tiny_processor(keep_ratio=0.4, video_pooling=False), ReDiPruneProcessor.from_pretrained(folder)
    media = {"text": "<image> where <video>", "images": random_image(), "videos": random_video(frames=9)}
    first, second = saved(**media), loaded(**media)
    # 4.57 loads the fast image processor, as 5.x has it; the slow one that was saved rounds pixels differently.
    assert all(torch.allclose(first[key].float(), second[key].float(), atol=1 / 255 / 0.25) for key in first)
    messages = [user({"type": "image", "image": random_image()}, "where")]
    assert torch.equal(chat(saved, messages)["input_ids"], chat(loaded, messages)["input_ids"])


def test_a_folder_without_a_config(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="config.json"):
        ReDiPruneProcessor.from_pretrained(tmp_path)


def test_repr_and_copies(processor):
    assert "ReDiPruneProcessor" in repr(processor)
    assert "pruning" not in processor.to_dict()


def test_no_path_is_left_open(processor, mp4, tmp_path):
    """Reading does not hold the file: it can be replaced afterwards."""
    path = Path(tmp_path / "moved.mp4")
    path.write_bytes(mp4.read_bytes())
    inputs = processor(text="<video>", videos=path)
    path.unlink()
    assert greys(inputs) == [0, 3, 6, 9]
