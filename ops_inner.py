"""Which visual tokens leave inside the language model: attention of one token, and the rules of DART and HoliTom, as pure functions.

Shapes: B prompts of n tokens, H the width of the language model, h its heads of d channels each; in one prompt N visual tokens, of
which k are kept.
"""

import torch
import torch.nn.functional as F

from .ops_tokens import first_largest


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads (B, h, d) of one token of each prompt at its rotary angles, whose cosines and sines are (B, d)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def attention_of_token(query: torch.Tensor, keys: torch.Tensor, scaling: float, visible: torch.Tensor) -> torch.Tensor:
    """
    What one token of each prompt attends to, as a sum over heads.

    Args:
        query: (B, h, d), rotated.
        keys: (B, g, n, d), rotated; g divides h.
        scaling: of the logits.
        visible: (B, n) bool, which tokens it sees.

    Returns:
        (B, n) fp32.
    """
    query = query.unflatten(1, (keys.shape[1], -1)).float()
    logits = torch.einsum("bgsd,bgnd->bgsn", query, keys.float()) * scaling
    return logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).sum((1, 2))


def largest(values: torch.Tensor, number: int) -> torch.LongTensor:
    """Ascending indices (number,) of the largest of some values; of equal ones the first."""
    return values.argsort(descending=True, stable=True)[:number].sort().values


def dart_tokens(
    norms, states, text_norms, text_states, num_kept: int, num_visual: int, num_text: int
) -> torch.LongTensor:
    """
    DART (arXiv 2502.11494): pivots with large keys, and with each of them the tokens that are least similar to it.

    The pivots take turns in the order of the prompt, each takes its share of the budget from what the others have left.

    Args:
        norms: (N,) size of the keys of the visual tokens, the sum of their magnitudes.
        states: (N, H) of the visual tokens, normalised as behind the last layer.
        text_norms, text_states: (T,) and (T, H), of the text behind them.
        num_kept: k, at most N.
        num_visual, num_text: how many pivots there are of each; fewer where there are fewer tokens.

    Returns:
        LongTensor (k,), ascending.
    """
    visual, text = largest(norms, min(num_visual, num_kept)), largest(text_norms, num_text)
    states, text_states = (F.normalize(values.float(), dim=-1) for values in (states, text_states))
    pivots = torch.cat([states[visual], text_states[text]])
    is_free = torch.ones_like(norms, dtype=torch.bool)
    is_free[visual] = False
    share, more = divmod(num_kept - len(visual), len(pivots))
    for index, pivot in enumerate(pivots):
        similarity = (states @ pivot).masked_fill(~is_free, torch.inf)
        is_free[similarity.argsort(stable=True)[: share + (index < more)]] = False
    return (~is_free).nonzero()[:, 0]


def merged_one_by_one(states: torch.Tensor, kept: torch.LongTensor, attention: torch.Tensor) -> torch.Tensor:
    """
    HoliTom's merging inside the language model (arXiv 2505.21334): each dropped token, in the order of the prompt, is averaged into
    the kept one that it is most similar to, so that of several the last one weighs most.

    Args:
        states: (N, H).
        kept: (k,) ascending.
        attention: (N,), which decides between kept tokens that are equally similar.

    Returns:
        (k, H) in the dtype of `states`.
    """
    units, merged = F.normalize(states.float(), dim=-1), states[kept].float()
    by_attention = attention[kept].argsort(descending=True, stable=True)
    is_kept = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    is_kept[kept] = True
    dropped = (~is_kept).nonzero()[:, 0]
    if not len(dropped):
        return states[kept]
    nearest = by_attention[first_largest(units[dropped] @ units[kept][by_attention].T)]
    for token, target in zip(dropped.tolist(), nearest.tolist()):
        merged[target] = (merged[target] + states[token].float()) / 2
    return merged.to(states.dtype)
