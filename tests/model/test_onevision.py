"""LLaVA-OneVision: what it counts, pools and projects in another order than its siblings."""

import pytest
import torch
from families import FAMILIES, FRAMES, stock_inputs
from rediprune.core_layout import FrameSize, LlavaOnevisionLayouts, images_of_prompts, max_tiles_of, sizes_of_tiled
from tiny import IMAGE_SIZE, PATCHES, POOLED, random_image, random_video

(FAMILY,) = [family for family in FAMILIES if family.name == "llava_onevision"]
SMALL, LARGE = (60, 20), (40, 48)  # (height, width) of images whose tiles have fewer tokens than two, and more
SIDE = IMAGE_SIZE // 4
# Prompts of every form, and whether what is kept of them is behind the projector.
CASES = {
    "small image": ("<image> where", {"images": [[random_image(0, SMALL)]]}, [False]),
    "large image": ("<image> where", {"images": [[random_image(0, LARGE)]]}, [True]),
    "two images": (
        "<image> left <image> where",
        {"images": [[random_image(1), random_image(2, SMALL)]]},
        [False, False],
    ),
    "two images that are not in a list": (
        "<image> left <image> where",
        {"images": [random_image(1, SMALL), random_image(2, LARGE)]},
        [False, True],
    ),
    "video": ("<video> where", {"videos": [random_video(3)]}, [True]),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pair(**pruning):
    return FAMILY.processor(**pruning), FAMILY.model(**pruning)


def embeddings_at_placeholders(model, inputs):
    """What the language model gets in the places of media."""
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"])  # noqa: E731
    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    model(**inputs)
    handle.remove()
    ids = inputs["input_ids"]
    return seen[0][(ids == model.config.image_token_id) | (ids == model.config.video_token_id)]


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_the_stock_class(case):
    """All of them, with their newlines, through the stages of pruning."""
    text, media, projected = CASES[case]
    processor, model = pair(keep_ratio=1)
    inputs = processor(text=text, **media)
    items = model.select_tokens(**inputs)
    assert [item.layout.projected for item in items] == projected
    expected = embeddings_at_placeholders(FAMILY.stock_twin(model), stock_inputs(FAMILY, inputs))
    assert len(expected) == sum(item.layout.num_unpruned for item in items)
    found = model.project_items(items, model.config.pruning)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_kept_tokens_are_some_of_them(case):
    text, media, _ = CASES[case]
    processor, model = pair(keep_ratio=0.3)
    inputs, everything = processor(text=text, **media), processor(text=text, **media, keep_ratio=1)
    found = embeddings_at_placeholders(model, inputs)
    of_stock = embeddings_at_placeholders(FAMILY.stock_twin(model), stock_inputs(FAMILY, everything))
    distances = torch.cdist(found, of_stock, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    assert nearest.values.max() < 1e-4 * of_stock.norm(dim=1).mean()
    items, start, columns = model.select_tokens(**inputs), 0, []
    for item in items:
        columns.append(start + item.layout.columns(item.kept))
        start += item.layout.num_unpruned
    assert nearest.indices.tolist() == torch.cat(columns).tolist()


def test_images_of_one_list_are_one_view_each():
    processor, model = pair(keep_ratio=1)
    images, text = [random_image(1), random_image(2)], "<image> left <image> where"
    layouts = [item.layout for item in model.select_tokens(**processor(text=text, images=[images]))]
    assert [layout.num_unpruned for layout in layouts] == [PATCHES + 1] * 2
    tiled = [item.layout for item in model.select_tokens(**processor(text=text, images=images))]
    assert all(layout.row_newlines and len(layout.grids) == 2 for layout in tiled)


def test_frames_that_are_not_pooled_are_pruned_before_the_projector():
    processor, model = pair(keep_ratio=0.25, video_pooling=False)
    inputs = processor(text="<video> where", videos=[random_video()])
    (item,) = model.select_tokens(**inputs)
    assert not item.layout.projected and len(item.kept) == FRAMES * PATCHES // 4
    assert model(**inputs).logits.isfinite().all()
    everything = processor(text="<video> where", videos=[random_video()], keep_ratio=1)
    assert (everything["input_ids"] == model.config.video_token_id).sum() == FRAMES * PATCHES + 1
    assert model(**everything).logits.isfinite().all()
    pooled = FAMILY.processor(keep_ratio=0.25)(text="<video> where", videos=[random_video()])
    assert (pooled["input_ids"] == model.config.video_token_id).sum() == FRAMES * POOLED // 4


def test_an_odd_side_is_pooled_upwards():
    pruning = FAMILY.config().pruning
    layout = LlavaOnevisionLayouts.video(FrameSize(384, 27), 8, pruning)
    assert (layout.num_tokens, layout.num_unpruned) == (8 * 14 * 14, 8 * 14 * 14 + 1)


@pytest.mark.parametrize("tiles", [1, 2, 3, 9])
def test_counts_are_those_of_the_stock_processor(tiles):
    stock = FAMILY.stock_processor()
    stock.vision_aspect_ratio = f"anyres_max_{tiles}"
    frame = FrameSize(IMAGE_SIZE, SIDE, stock.image_processor.image_grid_pinpoints, max_tiles=tiles)
    for height in range(7, 90, 9):
        for width in range(5, 90, 7):
            layout = LlavaOnevisionLayouts.image(frame, (height, width))
            assert layout.num_unpruned == stock._get_number_of_features(height, width, IMAGE_SIZE, IMAGE_SIZE)


def test_what_serving_engines_ask():
    processor = FAMILY.processor(keep_ratio=1)
    sizes = [(40, 48), (60, 20)]
    numbers = processor._get_num_multimodal_tokens(image_sizes=sizes, video_sizes=[(4, 40, 48)])
    expected = FAMILY.stock_processor()._get_num_multimodal_tokens(image_sizes=sizes)
    assert numbers["num_image_tokens"] == expected["num_image_tokens"]
    assert numbers["num_video_tokens"] == [FRAMES * POOLED + 1]


@pytest.mark.parametrize("value", ["anyres", "anyres_max_0", "pad", 9])
def test_an_aspect_ratio_without_a_number_of_tiles(value):
    with pytest.raises(ValueError, match='vision_aspect_ratio is .*must be "anyres_max_" and a number of tiles'):
        max_tiles_of(value)


def test_images_that_do_not_add_up():
    processor, model = pair(keep_ratio=0.3)
    inputs = processor(text="<image> left <image> where", images=[[random_image(1), random_image(2)]])
    inputs["batch_num_images"] = torch.tensor([3])
    with pytest.raises(ValueError, match="image_sizes hold 2 images, but batch_num_images 3; pass all"):
        model(**inputs)


@pytest.mark.parametrize("numbers", [[1], [2], [1, 2, 1], [3, 1, 1], [2, 2]])
def test_numbers_of_images_go_there_and_back(numbers):
    sizes = torch.full((sum(numbers), 2), 7)
    tiled = sizes_of_tiled(sizes, torch.tensor(numbers))
    again = images_of_prompts(tiled)
    assert again.sum() == len(sizes) and torch.equal(sizes_of_tiled(sizes, again), tiled)
    assert torch.equal(sizes_of_tiled(sizes, None), sizes)


def test_beams_where_nothing_is_pruned():
    """The stock class counts the images of each prompt itself; beams of 4.57 put several images of one in a wrong order."""
    processor, model = pair(keep_ratio=1)
    stock, inputs = FAMILY.stock_twin(model), FAMILY.batch(processor)
    options = {"max_new_tokens": 3, "do_sample": False, "num_return_sequences": 2, "num_beams": 2}
    together = model.generate(**inputs, **options)[:, -3:].split(2)
    for row, (text, _) in enumerate(FAMILY.prompts()):
        alone = FAMILY.inputs(processor, row)
        assert torch.equal(model.generate(**alone, **options)[:, -3:], together[row])
        if text.count("<image>") < 2:
            assert torch.equal(stock.generate(**stock_inputs(FAMILY, alone), **options)[:, -3:], together[row])


def test_encoded_frames_are_those_of_their_projector():
    processor, model = pair(keep_ratio=0.3)
    inputs = processor(text="<video> where", videos=[random_video()])
    encoded = model.encode_media(**inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**text, encoded_media=encoded).logits, model(**inputs).logits)
    model.model.multi_modal_projector.linear_2.weight.mul_(2)
    with pytest.raises(ValueError, match="weights"):
        model(**text, encoded_media=encoded)
