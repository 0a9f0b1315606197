"""Proportional attention: a kept token weighs in attention as much as all the tokens that it stands for.

Pruning changes what attention averages over: of eight tokens of one circle and twenty of the background, two and one may stay.
If token j stands for s_j equal tokens, adding log s_j to every logit of its column gives what the softmax over all of them gave.
This is ToMe's (arXiv 2210.09461, Sec. 3), which merges tokens in a vision transformer; for pruned vision-language models PACT has
it as an option, and RESTORE (arXiv 2606.01711) as a part of its bias.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from .core_cache import cached_tokens


def biased_mask(attention_mask, bias: torch.Tensor, tokens: torch.Tensor, cache=None, cache_position=None):
    """
    The mask of an attention whose logits get a bias for each column.

    Args:
        attention_mask: what the language model would get: `None`, (B, cached + T) with zeros for padding, (B, 1, T, K) bool or
            additive, or a dictionary of those.
        bias: (B, n) fp32, log s of the first n tokens of the text; of all others it is 0.
        tokens: (B, T, H) the embeddings of this pass.
        cache: the cache, if there is one.
        cache_position: (T,) places of this pass among the tokens of the text, where they are known.

    Returns:
        (B, 1, T, K) additive, in the dtype of `tokens`, or a dictionary; K is the length of the keys, which is that of the
        text, or all of a static cache.
    """
    if isinstance(attention_mask, dict):
        return {kind: biased_mask(mask, bias, tokens, cache, cache_position) for kind, mask in attention_mask.items()}
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = _causal_mask(attention_mask, tokens, cache, cache_position)
    least = torch.finfo(tokens.dtype).min
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=tokens.dtype).masked_fill(~attention_mask, least)
    columns = F.pad(bias, (0, attention_mask.shape[-1] - bias.shape[1])).to(attention_mask)
    return (attention_mask + columns[:, None, None]).clamp_min(least)


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


def check_attention(config, pruning) -> None:
    """Raises ValueError where the attention of the language model cannot do what the pruning block of a call asks for."""
    # Read where it is used: flash attention takes gaps between positions for the borders of packed sequences.
    text_config = config.text_config
    attention = text_config._attn_implementation or ""
    positions = pruning.resolved("positions")
    if config.positions_have_gaps and positions != "compact" and "flash" in attention:
        raise ValueError(
            f"positions={positions!r} does not work with attn_implementation={attention!r}, which reads gaps between "
            "positions as packed sequences; load the model with attn_implementation='sdpa'."
        )
    if pruning.resolved("proportional_attention"):
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"proportional_attention adds to the logits of attention, which attn_implementation={attention!r} does "
                "not allow; load the model with attn_implementation='sdpa'."
            )
        if getattr(text_config, "sliding_window", None):
            raise ValueError(
                "proportional_attention works with full attention alone, but the language model has sliding_window="
                f"{text_config.sliding_window}; set proportional_attention to false."
            )
