"""Prompts that reach the end of what the language model was made for."""

import logging

import pytest
import torch
from benchmarking.shapes import SHAPES, random_model, shape_config
from rediprune import core_positions
from rediprune.core_encoded import encoder_identity, freeze
from rediprune.core_items import MediaItem
from tiny import random_video, tiny_config, tiny_model, tiny_processor
from transformers import DynamicCache

TEXT = "<video> where is the star"


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(core_positions, "_WARNED_CONTEXTS", set())


def inputs_of(model, frames=4, text=TEXT):
    block = model.config.pruning.to_dict()
    return tiny_processor(**block)(text=text, videos=random_video(frames=frames), do_sample_frames=False)


def with_context(model, limit, **rope):
    model.config.text_config.max_position_embeddings = limit
    for name in ("rope_scaling", "rope_parameters"):
        if rope and (name == "rope_scaling" or hasattr(model.config.text_config, name)):
            setattr(model.config.text_config, name, rope)
    return model


def test_a_prompt_that_just_fits():
    model = tiny_model()
    inputs = inputs_of(model)
    length = inputs["input_ids"].shape[1]
    assert with_context(model, length)(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens, .* takes at most {length - 1};"):
        with_context(model, length - 1)(**inputs)


def test_scaled_rotary_positions_reach_further():
    model = tiny_model()
    inputs = inputs_of(model)
    length = inputs["input_ids"].shape[1]
    half = (length + 1) // 2
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert with_context(model, half, **rope)(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"takes at most {2 * (half - 1)};"):
        with_context(model, half - 1, **rope)(**inputs)


def test_a_second_turn_counts_the_first():
    model, cache = tiny_model(), DynamicCache()
    inputs = inputs_of(model)
    length = inputs["input_ids"].shape[1]
    with_context(model, length + 2)
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match=f"the prompt has {length + 3} tokens"):
        model(input_ids=torch.tensor([[9, 9, 9]]), past_key_values=cache)
    assert model(input_ids=torch.tensor([[9, 9]]), past_key_values=cache).logits.isfinite().all()


def warnings_of(caplog, call):
    caplog.clear()
    with caplog.at_level(logging.WARNING, core_positions.__name__):
        call()
    return [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]


def test_original_positions_beyond_the_context_are_said_once(caplog):
    model = with_context(tiny_model(positions="original"), 60)
    inputs = inputs_of(model)
    unpruned = tiny_processor(keep_ratio=1)(text=TEXT, videos=random_video())["input_ids"].shape[1]
    (message,) = warnings_of(caplog, lambda: model(**inputs))
    assert f"has {unpruned} tokens" in message and "made for 60" in message and "num_frames=" in message
    assert warnings_of(caplog, lambda: model(**inputs_of(model, frames=5))) == []


def test_nothing_is_said_of_prompts_that_fit(caplog):
    unpruned = tiny_processor(keep_ratio=1)(text=TEXT, videos=random_video())["input_ids"].shape[1]
    for block in ({"positions": "original"}, {"positions": "compact"}):
        model = with_context(tiny_model(**block), unpruned if block["positions"] == "original" else 60)
        inputs = inputs_of(model)
        assert warnings_of(caplog, lambda: model(**inputs)) == []
        assert warnings_of(caplog, lambda: model.generate(**inputs, max_new_tokens=4, do_sample=False)) == []


def test_a_second_turn_can_go_beyond(caplog):
    unpruned = tiny_processor(keep_ratio=1)(text=TEXT, videos=random_video())["input_ids"].shape[1]
    model = with_context(tiny_model(positions="original"), unpruned + 1)
    cache = DynamicCache()
    assert warnings_of(caplog, lambda: model(**inputs_of(model), past_key_values=cache)) == []
    (message,) = warnings_of(caplog, lambda: model(input_ids=torch.tensor([[9, 9]]), past_key_values=cache))
    assert f"has {unpruned + 2} tokens" in message


def test_the_context_of_the_config_is_the_one_that_counts():
    text_config = tiny_config().text_config
    assert core_positions.context_length(text_config) == text_config.max_position_embeddings


# -- longer than the context -------------------------------------------------------------------------------------------


@pytest.fixture
def positions(monkeypatch):
    """What the language model is given, pass by pass."""
    seen = []

    def of(model):
        forward = model.model.language_model.forward

        def record(*args, position_ids=None, **kwargs):
            seen.append(position_ids)
            return forward(*args, position_ids=position_ids, **kwargs)

        monkeypatch.setattr(model.model.language_model, "forward", record)
        return seen

    return of


def tokens_of(text):
    """How many tokens a prompt has without the placeholders of its video."""
    return tiny_processor()(text=text.replace("<video>", ""))["input_ids"].shape[1]


@torch.no_grad()
@pytest.mark.parametrize("is_trained_with", [False, True], ids=["context", "max_positions"])
@pytest.mark.parametrize("limit", [40, 60, 68])
def test_scaled_positions_end_before_the_limit_does(limit, is_trained_with, positions):
    """A video of 64 tokens of which 8 stay; its text keeps its neighbours, and all tokens their order."""
    model = with_context(tiny_model(positions="scaled", keep_ratio=0.125), limit)
    seen, inputs = positions(model), inputs_of(model)
    if is_trained_with:
        with_context(model, 2048)
        model.config.pruning.max_positions = limit
    model(**inputs)
    (row,) = seen[0]
    assert (row.diff() >= 1).all() and row[0] == 0
    is_video = inputs["input_ids"][0] == model.config.video_token_id
    after = row[is_video.nonzero()[-1, 0] + 1 :]
    assert (after.diff() == 1).all()
    assert row[-1] == limit - limit // 16 - 1  # the last token of the unpruned prompt, and room for the answer
    model.config.pruning.positions = "original"
    model(**inputs)
    (whole,) = seen[1]
    unpruned = whole[-1] + 1
    assert unpruned == 64 + tokens_of(TEXT) > limit
    gaps, shrunk = (places - torch.arange(len(places)) for places in (whole, row))
    assert torch.equal(shrunk, gaps * shrunk[-1] // gaps[-1])


@torch.no_grad()
def test_scaled_positions_of_a_prompt_that_fits_are_the_original_ones():
    model = tiny_model(positions="original", keep_ratio=0.2)
    inputs = inputs_of(model)
    with_context(model, 64 + tokens_of(TEXT))
    expected = model(**inputs).logits
    model.config.pruning.positions = "scaled"
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_scaled_positions_are_those_of_each_row_and_go_on_while_it_answers(positions):
    texts = [TEXT, f"{TEXT} red blue red blue"]
    model = with_context(tiny_model(positions="scaled", keep_ratio=0.125), 60)
    processor = tiny_processor(**model.config.pruning.to_dict())
    videos = [random_video(0), random_video(1)]
    seen = positions(model)
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [4, 5]}
    together = model.generate(**processor(text=texts, videos=videos, padding=True), **options)
    of_batch, steps = seen[0], seen[1:3]
    for row, (text, video) in enumerate(zip(texts, videos)):
        seen.clear()
        alone = model.generate(**processor(text=text, videos=[video]), **options)
        assert torch.equal(alone[0, -3:], together[row, -3:])
        assert torch.equal(seen[0][0], of_batch[row][-seen[0].shape[1] :])
        assert [int(step[row]) for step in steps] == [int(seen[0].max()) + 1, int(seen[0].max()) + 2]


@torch.no_grad()
def test_a_second_video_shrinks_into_what_the_first_has_left(positions):
    model = with_context(tiny_model(positions="scaled", keep_ratio=0.125), 100)
    seen, cache = positions(model), DynamicCache()
    inputs = inputs_of(model)
    for _ in range(2):
        model(**{**inputs, "attention_mask": None}, past_key_values=cache)
    first, second = seen[0][0], seen[1][0]
    assert second[0] == first[-1] + 1 == 64 + tokens_of(TEXT)
    assert second[-1] == 100 - 100 // 16 - 1 and (second.diff() >= 1).all()


def test_a_prompt_that_is_too_long_when_pruned_is_refused_with_scaled_positions_too():
    model = with_context(tiny_model(positions="scaled", keep_ratio=0.5), 30)
    with pytest.raises(ValueError, match="takes at most 30; .*lower keep_ratio or keep_tokens"):
        model(**inputs_of(model))


@pytest.mark.slow
@torch.no_grad()
def test_128_frames_fit_into_the_context_of_a_7b_model(positions):
    """One layer of its language model; features are drawn, so that its vision tower need not run."""
    model = random_model(shape_config(SHAPES["llava-next-video-7b"], layers=1, vision_layers=2), torch.float32)
    model.config.pruning = {"keep_ratio": 0.05, "positions": "scaled", "max_positions": 4096}
    pruning, features = model.config.pruning, torch.randn(128, 144, 1024, dtype=model.dtype)
    item = MediaItem(model.layout_class.video(model.frame_size, 128, pruning), sets=[{"features": features}])
    encoded = freeze([item], encoder_identity(model, pruning, frozenset()))
    (layout,) = encoded.layouts

    def prompt(number):
        return torch.tensor([[*range(10, 30), *[model.config.video_token_id] * number, *range(30, 60)]])

    seen = positions(model)
    outputs = model(prompt(layout.num_placeholders(pruning)), encoded_media=encoded, logits_to_keep=1)
    assert layout.num_placeholders(pruning) == 128 * 7 and outputs.logits.isfinite().all()
    (row,) = seen[0]
    assert row[-1] == 4096 - 256 - 1 and (row.diff() >= 1).all()
    assert core_positions.context_length(model.config.text_config) == 10240  # stretched by 2.5
    with pytest.raises(ValueError, match=f"the prompt has {128 * 144 + 50} tokens, .* takes at most 10240"):
        model(prompt(layout.num_unpruned), encoded_media=encoded, keep_ratio=1)
