"""Pruned prompts with every attention kernel: those that take masks, and those that only take queries, keys and values."""

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from rediprune.core_attention import BiasedKernel
from tiny import random_video, tiny_model, tiny_processor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
BLOCKS = [
    {"positions": "original"},
    {"proportional_attention": True},
    {"positions": "original", "proportional_attention": True},
]


def flash_like(module, query, key, value, attention_mask, scaling=None, position_ids=None, dropout=0.0, **kwargs):
    """Does what flash attention does: causal at the bottom right, no mask but that of padding, sequences cut at gaps of positions."""
    assert attention_mask is None or attention_mask.dim() == 2
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    places = torch.arange(key.shape[2], device=query.device)
    visible = places <= places[-query.shape[2] :, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, : key.shape[2]].bool()
    elif position_ids is not None and len(position_ids) == 1 and query.shape[2] > 1:
        assert (position_ids.diff() == 1).all(), "packed sequences"
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    visible = visible | ~visible.any(-1, keepdim=True)  # rows of padding
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return output.transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch):
    """The name of an attention implementation that is `flash_like`."""
    name = "flash_like"
    AttentionInterface.register(name, flash_like)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def with_kernel(model, name):
    model.config.text_config._attn_implementation = name
    return model


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_kernel_without_masks_gives_what_eager_attention_gives(family, block, flash):
    """In a padded batch, one row alone, and step by step."""
    block = {"keep_ratio": 0.2, **block}
    processor, model = family.processor(**block), family.model(**block)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [4, 5]}
    for inputs in (family.batch(processor), family.inputs(processor, 0)):
        expected = model(**inputs).logits, model.generate(**inputs, **options)
        is_token = inputs["attention_mask"].bool()
        logits = with_kernel(model, flash)(**inputs).logits
        torch.testing.assert_close(logits[is_token], expected[0][is_token], **CLOSE)
        assert torch.equal(model.generate(**inputs, **options), expected[1])
        with_kernel(model, "eager")
        torch.testing.assert_close(model(**inputs).logits[is_token], expected[0][is_token], **CLOSE)
        with_kernel(model, "sdpa")


def test_the_kernel_is_the_one_of_before_for_whoever_gives_no_bias(flash):
    block = {"keep_ratio": 0.2, "positions": "original", "proportional_attention": True}
    processor, model = tiny_processor(**block), with_kernel(tiny_model(**block), flash)
    inputs = processor(text="<video> where", videos=[random_video()])
    model(**inputs), model(**inputs)
    kernel = ALL_ATTENTION_FUNCTIONS[flash]
    assert isinstance(kernel, BiasedKernel) and kernel.kernel is flash_like
    unpruned = tiny_model(keep_ratio=1)
    whole = processor(text="<video> where", videos=[random_video()], keep_ratio=1)
    expected = unpruned(**whole).logits
    torch.testing.assert_close(with_kernel(unpruned, flash)(**whole).logits, expected, **CLOSE)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_the_bias_is_that_of_float64(dtype, most):
    """Log sizes up to that of 2000 tokens, in heads of 128 channels: what the spare channels add to the logits."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randint(1, 2000, (2, 50), generator=generator).double().log()
    query, key = torch.zeros(2, 4, 50, 128, dtype=dtype), torch.zeros(2, 2, 50, 128, dtype=dtype)
    seen = {}

    def kernel(module, query, key, value, attention_mask, scaling):
        seen["logits"] = query[:, :1].double() @ key[:, :1].double().mT * scaling
        assert value.shape[-1] == query.shape[-1] == key.shape[-1] == 136
        return value.transpose(1, 2), None

    output, _ = BiasedKernel(kernel)(None, query, key, key, None, key_bias=bias.float())
    assert output.shape == (2, 50, 2, 128)
    assert (seen["logits"][:, 0] - bias[:, None]).abs().max() < most


def test_flex_attention_adds_the_mask(monkeypatch):
    """Uncompiled: what torch makes of it for a CPU does not take a mask, whoever gives one."""

    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    block = {"keep_ratio": 0.2, "positions": "original", "proportional_attention": True}
    processor, model = tiny_processor(**block), tiny_model(**block)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [4, 5]}
    inputs = processor(text="<video> where is the star", videos=[random_video()])
    expected = model(**inputs).logits, model.generate(**inputs, **options)
    with_kernel(model, "flex_attention")
    torch.testing.assert_close(model(**inputs).logits, expected[0], **CLOSE)
    assert torch.equal(model.generate(**inputs, **options), expected[1])


def test_heads_without_room_for_spare_channels_are_refused():
    model = tiny_model(proportional_attention=True, keep_ratio=0.2)
    with_kernel(model, "flash_attention_2")
    model.config.text_config.head_dim = 256
    inputs = tiny_processor(keep_ratio=0.2)(text="<video> where", videos=[random_video()])
    with pytest.raises(ValueError, match="needs 8 spare channels in the heads, which have 256 of at most 256"):
        model(**inputs)
