"""RESTORE's bias by distance, on any selection: its formula, where it acts, and that nothing else changes."""

import copy
import math

import pytest
import torch
from rediprune.configuration_rediprune import PruningConfig, ReDiPruneQwen2_5_VLConfig
from rediprune.core_attention import distance_bias
from tiny import random_video, tiny_model, tiny_processor

LOOSE = {"atol": 2e-4, "rtol": 1e-4}
BLOCKS = [
    {"method": "rediprune"},
    {"method": "uniform", "positions": "original"},
    {"method": "rediprune_plus", "keep_ratio": 0.3},
    {"method": "fastv", "inner_layer": 1, "keep_ratio": 0.3},
    {"method": "divprune", "inner_method": "dart", "inner_layer": 1, "inner_keep_ratio": 0.1, "keep_ratio": 0.3},
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def asked(text="<video> where is it", frames=4, **pruning):
    processor, model = tiny_processor(**pruning), tiny_model(**pruning)
    return model, processor(text=text, videos=random_video(frames=frames))


def test_the_formula():
    """With heads of 128 channels and base 10000: the values that were printed of the released code, and a plain loop."""
    frequencies = 10000.0 ** (-torch.arange(64) / 64)
    table = distance_bias(torch.arange(1001)[None], frequencies)[0]
    for distance, value in ((0, 0), (1, 0.029), (5, 0.233), (50, 0.374), (1000, 0.610)):
        assert table[0, distance].item() == pytest.approx(value, abs=6e-4)
        mean = sum(math.cos(distance * 10000 ** (-2 * f / 128)) for f in range(64)) / 64
        assert table[distance, 0].item() == pytest.approx(math.log(2 - mean), abs=1e-5)
    torch.testing.assert_close(table.diagonal(), torch.zeros(1001), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[7:20, 7:20], table[500:513, 500:513], atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", BLOCKS[:3])
def test_the_logits_of_a_pruned_prompt(block):
    """Those of the same language model with the mask written out, at the positions of the pruned prompt."""
    model, inputs = asked(**block, distance_bias=True)
    language_model, seen = model.model.language_model, {}
    hook = language_model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    logits = model(**inputs).logits
    hook.remove()
    embeds, positions = seen["inputs_embeds"], seen["position_ids"]
    number = embeds.shape[1]
    positions = torch.arange(number)[None] if positions is None else positions
    pairs = distance_bias(positions, language_model.rotary_emb.inv_freq)
    (item,) = model.select_tokens(**inputs)
    sizes = torch.ones(1, number)
    if item.token_sizes is not None:
        sizes[inputs["input_ids"] == model.config.video_token_id] = item.token_sizes
    hidden = torch.full((number, number), torch.finfo(torch.float32).min).triu(1)
    mask = pairs[:, None] + sizes.log()[:, None, None] + hidden
    states = language_model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(logits, model.lm_head(states), **LOOSE)


@pytest.mark.parametrize("block", BLOCKS)
def test_it_changes_pruned_prompts_alone(block):
    biased, inputs = asked(**block, distance_bias=True)
    plain = asked(**block)[0]
    assert not torch.allclose(biased(**inputs).logits, plain(**inputs).logits, **LOOSE)
    whole = tiny_processor(**block)(text="<video> where is it", videos=random_video(), keep_ratio=1.0)
    if "inner_keep_ratio" not in block:
        assert torch.equal(biased(**whole).logits, plain(**whole).logits)
    words = {"input_ids": inputs["input_ids"][:, -3:]}
    assert torch.equal(biased(**words).logits, plain(**words).logits)


@pytest.mark.parametrize("block", BLOCKS)
def test_steps_of_decoding_have_none(block):
    biased, inputs = asked(**block, distance_bias=True)
    plain = asked(**block)[0]
    cache, token = biased(**inputs).past_key_values, torch.tensor([[9]])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    steps = [
        model(input_ids=token, past_key_values=copy.deepcopy(cache), attention_mask=mask) for model in (biased, plain)
    ]
    assert torch.equal(steps[0].logits, steps[1].logits)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_batch_with_padding(block):
    texts = ["<video> where is the big red one", "<video> who"]
    processor, model = (make(**block, distance_bias=True) for make in (tiny_processor, tiny_model))
    videos = [random_video(1), random_video(2)]
    batch = model(**processor(text=texts, videos=videos, padding=True)).logits
    for row, (text, video) in enumerate(zip(texts, videos)):
        alone = model(**processor(text=text, videos=video)).logits
        torch.testing.assert_close(batch[row, -1], alone[0, -1], **LOOSE)


@pytest.mark.parametrize("block", BLOCKS)
def test_eager_attention_as_sdpa(block):
    model, inputs = asked(**block, distance_bias=True)
    reference = model(**inputs).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, reference, **LOOSE)


def test_kernels_that_take_no_mask_are_refused():
    model, inputs = asked(distance_bias=True)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="distance_bias .* attn_implementation='flash_attention_2' does not take"):
        model(**inputs)


def test_sliding_windows_are_refused():
    model, inputs = asked(distance_bias=True)
    model.config.text_config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding_window=8; set distance_bias to false"):
        model(**inputs)


def test_positions_of_three_numbers_are_refused():
    with pytest.raises(ValueError, match="'distance_bias' is true, but positions of 'qwen2_5_vl' have three numbers"):
        ReDiPruneQwen2_5_VLConfig(pruning={"distance_bias": True})


def test_it_is_on_or_off():
    assert PruningConfig().distance_bias is False
    with pytest.raises(ValueError, match="distance_bias"):
        PruningConfig(distance_bias=0.5)
