"""Biases of attention: by how many tokens a kept one stands for, and by how far two tokens are apart.

Pruning changes what attention averages over: of eight tokens of one circle and twenty of the background, two and one may stay.
If token j stands for s_j equal tokens, adding log s_j to every logit of its column gives what the softmax over all of them gave.
This is ToMe's (arXiv 2210.09461, Sec. 3), which merges tokens in a vision transformer; for pruned vision-language models PACT has
it as an option, and RESTORE (arXiv 2606.01711) as a part of its bias. The other part is by distance, and is to give back what
tokens far from the question lose in rotary attention.
"""

import threading
from typing import Optional

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .core_cache import cached_tokens

MASKED_KERNELS = ("eager", "sdpa", "flex_attention")
SPARE_CHANNELS, MOST_CHANNELS = 8, 256  # flash attention takes heads of a multiple of 8 channels, and at most so many
_REGISTERING = threading.Lock()


def distance_bias(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """
    RESTORE's bias of each pair of tokens: log(2 - mean over f of cos((p_i - p_j) w_f)), which is 0 at distance 0 and grows with it.

    The released code has the frequencies of one model written in; here they are those of the model's own rotary embedding.

    Args:
        positions: (B, T) those of the rotary embedding.
        frequencies: (d / 2,) w, in radians a position.

    Returns:
        (B, T, T) fp32.
    """
    angles = positions[..., None].float() * frequencies.float().to(positions.device)
    cosines, sines = angles.cos(), angles.sin()
    mean = (cosines @ cosines.mT + sines @ sines.mT) / len(frequencies)
    return (2 - mean).clamp_min(1).log()


def biased_mask(attention_mask, bias, tokens: torch.Tensor, cache=None, cache_position=None, pairs=None):
    """
    The mask of an attention whose logits get a bias for each column.

    Args:
        attention_mask: what the language model would get: `None`, (B, cached + T) with zeros for padding, (B, 1, T, K) bool or
            additive, or a dictionary of those.
        bias: (B, n) fp32, log s of the first n tokens of the text; of all others it is 0. `None` = of all.
        tokens: (B, T, H) the embeddings of this pass.
        cache: the cache, if there is one.
        cache_position: (T,) places of this pass among the tokens of the text, where they are known.
        pairs: (B, T, T) fp32, a bias of each pair of tokens of this pass, or `None`.

    Returns:
        (B, 1, T, K) additive, in the dtype of `tokens`, or a dictionary; K is the length of the keys, which is that of the
        text, or all of a static cache.
    """
    if isinstance(attention_mask, dict):
        return {
            kind: biased_mask(mask, bias, tokens, cache, cache_position, pairs) for kind, mask in attention_mask.items()
        }
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = _causal_mask(attention_mask, tokens, cache, cache_position)
    least = torch.finfo(tokens.dtype).min
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=tokens.dtype).masked_fill(~attention_mask, least)
    length = attention_mask.shape[-1]
    if bias is not None:
        attention_mask = attention_mask + F.pad(bias, (0, length - bias.shape[1])).to(attention_mask)[:, None, None]
    if pairs is not None:
        before, number = cached_tokens(cache, cache_position), tokens.shape[1]
        attention_mask = attention_mask + F.pad(pairs, (before, length - before - number)).to(attention_mask)[:, None]
    return attention_mask.clamp_min(least)


def _causal_mask(padding: Optional[torch.Tensor], tokens: torch.Tensor, cache, cache_position) -> torch.Tensor:
    """(B, 1, T, K) bool: what each token sees."""
    num_cached = cached_tokens(cache, cache_position)
    total = num_cached + tokens.shape[1]
    layers = getattr(cache, "layers", None)
    length = max(total, getattr(layers[0], "max_cache_len", 0) if layers else 0)
    places = torch.arange(length, device=tokens.device)
    visible = (places <= places[num_cached:total, None])[None, None]
    if padding is not None:
        padding = padding[:, :total].to(tokens.device).bool()
        visible = visible & F.pad(padding, (0, length - total))[:, None, None]
    return visible.expand(len(tokens), -1, -1, -1)


class BiasedKernel:
    """
    An attention kernel of transformers that takes, beside what it took, a bias for each key, as `key_bias`. What is called without
    one is the kernel alone.

    Kernels without additive masks get it in spare channels of the heads: 1 in the queries, the bias over the scale in the keys,
    zero in the values. It is written as the sum of two numbers of the keys' dtype, whose second one is what the first rounds off.

    `key_bias` is (B, n) fp32, for the first n keys, or an empty tensor where positions have gaps alone: either way the kernel is
    not told the positions, whose gaps flash attention takes for the borders of packed sequences.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, module, query, key, value, attention_mask, key_bias=None, scaling=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if key_bias is None:
            return self.kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        kwargs.pop("position_ids", None)
        width = query.shape[-1]
        if key_bias.numel():
            bias = F.pad(key_bias / scaling, (0, key.shape[2] - key_bias.shape[1]))
            rounded = bias.to(key.dtype)
            spare = torch.stack([rounded, (bias - rounded.float()).to(key.dtype)], dim=-1)
            spare = F.pad(spare, (0, SPARE_CHANNELS - 2))[:, None].to(key.device)
            key = torch.cat([key, spare.expand(-1, key.shape[1], -1, -1)], dim=-1)
            query = F.pad(F.pad(query, (0, 2), value=1.0), (0, SPARE_CHANNELS - 2))
            value = F.pad(value, (0, SPARE_CHANNELS))
        output, weights = self.kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output[..., :width], weights


def takes_masks(attention: str) -> bool:
    """Whether an attention implementation adds the masks that it is given to its logits."""
    return attention in MASKED_KERNELS


def let_kernel_take_bias(attention: str) -> None:
    """Registers [`BiasedKernel`] around the kernel of an attention implementation, in its place, unless it is there already."""
    with _REGISTERING:
        kernel = ALL_ATTENTION_FUNCTIONS[attention]
        if not isinstance(kernel, BiasedKernel):
            AttentionInterface.register(attention, BiasedKernel(kernel))


def weighed(
    attention: str, attention_mask, sizes, tokens: torch.Tensor, cache=None, cache_position=None, pairs=None
) -> tuple:
    """
    What a pass over tokens (B, T, H) is given so that columns weigh as much as their sizes.

    Args:
        attention: the attention implementation.
        attention_mask: as in `biased_mask`.
        sizes: (B, n) fp32, how many tokens each of the first n stands for; `None` = one for all of them.
        pairs: as in `biased_mask`; for kernels that take masks alone.

    Returns:
        the mask, and further arguments of the attention layers.
    """
    if sizes is None and pairs is None:
        return attention_mask, {}
    bias = None if sizes is None else sizes.to(tokens.device).clamp_min(1).log()
    if takes_masks(attention):
        return biased_mask(attention_mask, bias, tokens, cache, cache_position, pairs), {}
    let_kernel_take_bias(attention)
    return attention_mask, {"key_bias": bias}


def check_attention(config, pruning) -> None:
    """Raises ValueError where the attention of the language model cannot do what the pruning block of a call asks for."""
    text_config = config.text_config
    attention = text_config._attn_implementation or ""
    keys = [key for key in ("proportional_attention", "distance_bias") if pruning.resolved(key)]
    if not keys:
        return
    if getattr(text_config, "sliding_window", None):
        raise ValueError(
            f"{keys[0]} works with full attention alone, but the language model has sliding_window={text_config.sliding_window}; "
            f"set {keys[0]} to false."
        )
    if "distance_bias" in keys and not takes_masks(attention):
        raise ValueError(
            f"distance_bias is another number for each pair of tokens, which attn_implementation={attention!r} does not take; load the "
            "model with attn_implementation='sdpa', or set distance_bias to false."
        )
    if keys == ["distance_bias"]:
        return
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if "flash" in attention and width + SPARE_CHANNELS > MOST_CHANNELS:
        raise ValueError(
            f"proportional_attention with attn_implementation={attention!r} needs {SPARE_CHANNELS} spare channels in the heads, which "
            f"have {width} of at most {MOST_CHANNELS}; load the model with attn_implementation='sdpa', or set "
            "proportional_attention to false."
        )
