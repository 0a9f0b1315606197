"""Families whose positions have three numbers: where pruned tokens stand, what goes with them, and that nothing stays on the model."""

import numpy as np
import pytest
import torch
from families import FAMILIES, row_of, stock_inputs
from rediprune.hub_versions import CACHE_NAME
from tiny import random_image, random_video

MROPE = [family for family in FAMILIES if family.has_mrope]
EVERY_FAMILY = pytest.mark.parametrize("family", MROPE, ids=lambda family: family.name)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [4, 5]}
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pair(family, **pruning):
    return family.processor(**pruning), family.model(**pruning)


def seen_by_language_model(model, inputs):
    """The arguments that the language model gets in a forward pass."""
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        return seen, model(**inputs)
    finally:
        handle.remove()


def kept_columns(model, inputs, unpruned):
    """(T',) bool: which tokens of the unpruned prompt stay."""
    is_kept = torch.ones_like(unpruned["input_ids"][0], dtype=torch.bool)
    items = model.select_tokens(**inputs)
    for kind in ("image", "video"):
        kept = [torch.zeros(item.layout.num_tokens, dtype=torch.bool) for item in items if item.kind == kind]
        for mask, item in zip(kept, [item for item in items if item.kind == kind]):
            mask[item.kept] = True
        if kept:
            is_kept[unpruned["input_ids"][0] == getattr(model.config, f"{kind}_token_id")] = torch.cat(kept)
    return is_kept


@EVERY_FAMILY
@pytest.mark.parametrize("index", range(4))
def test_a_pruned_prompt_is_the_unpruned_one_with_columns_left_out(family, index):
    """Embeddings, positions and DeepStack features of what stays are those that the stock model gives to its language model."""
    processor, model = pair(family, method="uniform", keep_ratio=0.3)
    inputs, unpruned = family.inputs(processor, index), family.inputs(processor, index, keep_ratio=1)
    stock = family.stock_twin(model)
    whole, _ = seen_by_language_model(stock, stock_inputs(family, unpruned))
    is_kept = kept_columns(model, inputs, unpruned)
    assert inputs["input_ids"].shape[1] == is_kept.sum() < len(is_kept)
    assert torch.equal(unpruned["input_ids"][:, is_kept], inputs["input_ids"])
    seen, outputs = seen_by_language_model(model, inputs)
    torch.testing.assert_close(seen["inputs_embeds"], whole["inputs_embeds"][:, is_kept], **CLOSE)
    positions = whole["position_ids"][-3:, :, is_kept]
    assert torch.equal(seen["position_ids"][-3:], positions)
    given = {"inputs_embeds": whole["inputs_embeds"][:, is_kept], "position_ids": positions}
    if whole.get("deepstack_visual_embeds"):
        is_visual = whole["visual_pos_masks"]
        given["visual_pos_masks"] = is_visual[:, is_kept]
        given["deepstack_visual_embeds"] = [
            features[is_kept[is_visual[0]]] for features in whole["deepstack_visual_embeds"]
        ]
    mask = torch.ones_like(inputs["input_ids"])
    states = stock.model.language_model(**given, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(outputs.logits, stock.lm_head(states), **CLOSE)


@EVERY_FAMILY
@pytest.mark.parametrize("keep_ratio", [0.3, 1])
def test_conversations_that_take_turns_do_not_mix(family, keep_ratio):
    """What the stock class keeps on the model of its last prompt is kept on each cache."""
    processor, model = pair(family, keep_ratio=keep_ratio)
    before = dict(vars(model.model))
    prompts = [family.inputs(processor, index) for index in (0, 2, 3)]

    def steps(inputs):
        outputs = model(**inputs, use_cache=True)
        for token in (7, 8, 9):
            outputs = model(input_ids=torch.tensor([[token]]), **{CACHE_NAME: outputs[CACHE_NAME]})
            yield outputs.logits

    alone = [list(steps(inputs)) for inputs in prompts]
    taking_turns = zip(*zip(*map(steps, prompts)))
    assert all(torch.equal(*both) for pair_ in zip(alone, taking_turns) for both in zip(*pair_))
    model.generate(**prompts[1], **GREEDY)
    assert vars(model.model) == before and model.model.rope_deltas is None


@EVERY_FAMILY
@pytest.mark.parametrize("fps", [0.1, 24])
def test_an_answer_goes_on_where_the_stock_class_goes_on(family, fps):
    """Also behind a slow video, which with 5.x reaches further in time than the text after it."""
    processor, model = pair(family, keep_ratio=1)
    stock, text = family.stock_twin(model), family.written("<video> where")
    metadata = [{"total_num_frames": 4, "fps": fps, "frames_indices": [0, 1, 2, 3]}]
    inputs = processor(text=text, videos=[random_video(3)], video_metadata=metadata, do_sample_frames=False)
    if family.name == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([2 / fps])
    expected = stock.generate(
        **stock_inputs(family, inputs), **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    found = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert all(map(torch.equal, found.logits, expected.logits))


@EVERY_FAMILY
@pytest.mark.parametrize("keep_ratio", [0.3, 1])
def test_padded_rows_without_positions(family, keep_ratio):
    processor, model = pair(family, keep_ratio=keep_ratio)
    batch = family.batch(processor)
    together = model(**batch).logits
    for row in range(len(family.prompts())):
        alone = family.inputs(processor, row)
        assert torch.equal(alone["input_ids"], row_of(batch, row))
        torch.testing.assert_close(
            together[row][batch["attention_mask"][row].bool()], model(**alone).logits[0], **CLOSE
        )


@EVERY_FAMILY
def test_a_prompt_as_embeddings(family):
    processor, model = pair(family, keep_ratio=0.3)
    inputs = family.inputs(processor, 3)
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(**inputs).logits, expected)


@EVERY_FAMILY
def test_videos_of_different_lengths_in_one_call(family):
    processor, model = pair(family, keep_ratio=0.3)
    text = family.written("<video> left <video> where")
    videos = [random_video(1, frames=6, size=(32, 32)), random_video(2, frames=2, size=(24, 32))]
    inputs = processor(text=text, videos=videos, num_frames=None, do_sample_frames=False)
    long, short = model.select_tokens(**inputs)
    assert long.layout.grids[0][:3] == (3, 4, 4) and short.layout.grids[0][:3] == (1, 3, 4)
    assert len(long.kept) == 15 and len(short.kept) == 4
    alone = processor(text=family.written("<video> where"), videos=videos[1:], do_sample_frames=False)
    if family.name == "qwen2_5_vl":  # a timestamp is no part of what Qwen2.5-VL is asked
        assert torch.equal(model.select_tokens(**alone)[0].kept, short.kept)


@EVERY_FAMILY
def test_one_frame_is_a_video(family):
    processor, model = pair(family, keep_ratio=0.3)
    inputs = processor(text=family.written("<video> where"), videos=[random_video(frames=1)])
    assert model(**inputs).video_kept_indices[0].shape == (9,)


@EVERY_FAMILY
def test_serving_engines_ask_for_the_number_of_placeholders(family):
    processor = family.processor(keep_ratio=0.3)
    if not hasattr(processor.video_processor, "get_num_of_video_patches"):
        with pytest.raises(NotImplementedError, match="cannot count the patches"):
            processor._get_num_multimodal_tokens(video_sizes=[(4, 40, 48)])
        return
    found = processor._get_num_multimodal_tokens(image_sizes=[(40, 48)], video_sizes=[(4, 40, 48)])
    inputs = processor(text=family.prompts()[3][0], images=[random_image(0)], videos=[random_video(0)])
    for kind in family.kinds:
        written = (inputs["input_ids"] == getattr(processor, f"{kind}_token_id")).sum()
        assert found[f"num_{kind}_tokens"] == [written]


@EVERY_FAMILY
def test_a_number_that_depends_on_the_shape_of_a_grid_is_not_guessed(family):
    processor = family.processor(keep_ratio=0.3, method="downsample")
    with pytest.raises(NotImplementedError, match="method='downsample' .* height and width"):
        processor._get_num_multimodal_tokens(image_sizes=[(24, 96)])
    assert family.processor(keep_ratio=1, method="downsample")._get_num_multimodal_tokens(image_sizes=[(24, 96)])


@EVERY_FAMILY
@pytest.mark.parametrize(
    "block, reason",
    [
        ({"positions": "compact"}, "coordinates of a token in its picture"),
        ({"method": "visionzip"}, "has no CLS"),
        ({"method": "evoprune"}, "attends in windows"),
        ({"text_tower": "openai/clip-vit-large-patch14-336"}, "no joint space"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_the_reason(family, block, reason):
    assert reason in family.refusal(**block)


def test_a_budget_that_frames_share_is_refused_where_timestamps_stand_between_them():
    for block in ({"scope": "video"}, {"method": "rediprune_plus"}, {"scope": "item"}):
        assert [bool(family.refusal(**block)) for family in MROPE] == [False, True]
    assert MROPE[1].refusal(method="rediprune_plus", scope="frame") is None
    assert "a timestamp stands before the placeholders of each frame" in MROPE[1].refusal(scope="video")


@EVERY_FAMILY
def test_grids_that_are_not_those_of_the_pixels(family):
    processor, model = pair(family, keep_ratio=0.3)
    inputs = family.inputs(processor, 0)
    with pytest.raises(ValueError, match="image_grid_thw.* is missing"):
        model(**{**inputs, "image_grid_thw": None})
    with pytest.raises(ValueError, match="120 patches of images were passed, but image_grid_thw.* has 240"):
        model(**{**inputs, "image_grid_thw": inputs["image_grid_thw"] * torch.tensor([2, 1, 1])})
    inputs["pixel_values"][3] = np.nan
    with pytest.raises(ValueError, match=r"pixels of image \[0\] hold NaN"):
        model(**inputs)


@EVERY_FAMILY
def test_positions_of_a_call_are_places_in_the_prompt(family):
    processor, model = pair(family, keep_ratio=0.3)
    inputs = family.inputs(processor, 0)
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    assert torch.equal(model(**inputs, position_ids=places).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="places in the pruned prompt"):
        model(**inputs, position_ids=places.expand(3, 1, -1))
