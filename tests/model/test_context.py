"""Prompts that reach the end of what the language model was made for."""

import logging

import pytest
import torch
from rediprune import core_positions
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
