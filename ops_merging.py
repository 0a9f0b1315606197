"""Merging tokens step by step: the counts after each layer, and the pairs that become one (EvoPrune, reconstruction).

The paper's method text and code were not available, only its abstract and a summary (arXiv 2603.03681). These are
followed: no training, merging at some layers of the encoder, and one score of similarity, diversity and attention. Everything
else here, the schedule, the weights and the formulas, is this project's reconstruction, and its results are not the paper's.
"""

import math

import torch
import torch.nn.functional as F

from .ops_tokens import MIN_NORM, check_finite, first_largest, gather_tokens, in_raster_order, others, top_tokens

DIVERSITY_WEIGHT = ATTENTION_WEIGHT = 0.3
MIN_STEPS = 4


def merging_schedule(num_tokens: int, num_kept: int, num_layers: int) -> dict:
    """
    Counts of tokens after each layer that merges (reconstruction).

    The counts fall geometrically in at least four steps, more where halving at each is not enough; the steps are evenly
    spaced, and the first layers are left as they are. An encoder with few layers has fewer steps, which merge more.

    Args:
        num_tokens: tokens at first, without CLS.
        num_kept: tokens at the end.
        num_layers: layers that run, at least 1.

    Returns:
        `dict` from the layer's index to its count, e.g. {4: 324, 8: 183, 12: 103, 16: 58} for 576 to 58 in 23 layers.
    """
    steps = max(MIN_STEPS, math.ceil(math.log2(num_tokens / num_kept)))
    steps = min(steps, max(1, num_layers - 1))
    stride = num_layers // (steps + 1)
    counts = [round(num_tokens * (num_kept / num_tokens) ** (step / steps)) for step in range(1, steps)] + [num_kept]
    return {stride * step: count for step, count in enumerate(counts, 1)}


def merge_tokens(states, keys, attention, sizes, source_indices, num_kept: int) -> tuple:
    """
    Merges tokens pairwise until `num_kept` are left (reconstruction).

    Args:
        states: (N, n, C) hidden states; gradients flow to them.
        keys: (N, n, D) by which tokens are compared.
        attention: (N, n) that CLS pays to them.
        sizes: (N, n) fp32, how many patches each one stands for.
        source_indices: (N, n) the smallest index among these patches, ascending.
        num_kept: at least 1.

    Returns:
        states, sizes and source_indices of the `num_kept` tokens that are left, in raster order.

    Raises:
        ValueError: keys or attention are not finite.
    """
    width, dtype = states.shape[-1], states.dtype
    # Keys and attention are averaged with the states, for the case that one layer has to merge more than once.
    values = torch.cat([states.float(), keys.detach().float(), attention.detach().float()[..., None]], dim=-1)
    while values.shape[1] > num_kept:
        num_merged = min(values.shape[1] - num_kept, values.shape[1] // 2)
        values, sizes, source_indices = _merge_once(
            values, values[..., width:-1], values[..., -1], sizes, source_indices, num_merged
        )
    return values[..., :width].to(dtype), sizes, source_indices


def _merge_once(values, keys, attention, sizes, source_indices, num_merged: int) -> tuple:
    """Merges `num_merged` tokens at even places, each into the most similar one at an odd place: a weighted mean."""
    check_finite("states, keys or attention", values.detach())
    merged, partner = _pairs_to_merge(keys.detach(), attention.detach(), num_merged)
    weights = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1) * sizes[..., None]
    even, odd = weights[:, ::2], weights[:, 1::2]
    to_partner = F.one_hot(partner, odd.shape[1]).to(weights.dtype)
    odd = odd + torch.bmm(to_partner.mT, gather_tokens(even, merged))
    odd_indices = source_indices[:, 1::2].scatter_reduce(1, partner, source_indices[:, ::2].gather(1, merged), "amin")
    left = others(merged, even.shape[1])
    weights = torch.cat([gather_tokens(even, left), odd], dim=1)
    weights, source_indices = in_raster_order(
        weights, torch.cat([source_indices[:, ::2].gather(1, left), odd_indices], dim=1)
    )
    return weights[..., :-1] / weights[..., -1:], weights[..., -1].detach(), source_indices


@torch.no_grad()
def _pairs_to_merge(keys, attention, num_merged: int) -> tuple:
    """
    The tokens at even places that cost least to merge, and their partners at odd places.

    A token's priority is its similarity to the most similar token at an odd place, less 0.3 times its diversity (one minus
    its mean similarity to all others) and 0.3 times its attention, both scaled to [0, 1] in each set.

    Returns:
        LongTensors (N, num_merged): places among the even ones, ascending, and those of their partners among the odd ones.
    """
    unit = F.normalize(keys, dim=-1, eps=MIN_NORM)
    crowding = (unit * unit.sum(1, keepdim=True)).sum(-1) - unit.square().sum(-1)  # n - 1 times the mean
    similarity = torch.bmm(unit[:, ::2], unit[:, 1::2].mT)
    partner = first_largest(similarity.flatten(0, 1)).view(similarity.shape[:2])
    nearest = similarity.gather(2, partner[..., None])[..., 0]
    diversity = 1 - _unit_range(crowding / (keys.shape[1] - 1))[:, ::2]
    priority = nearest - DIVERSITY_WEIGHT * diversity - ATTENTION_WEIGHT * _unit_range(attention)[:, ::2]
    merged = top_tokens(priority, num_merged)
    return merged, partner.gather(1, merged)


def _unit_range(values: torch.Tensor) -> torch.Tensor:
    low, high = values.aminmax(dim=1, keepdim=True)
    return (values - low) / (high - low).clamp_min(1e-6)
