"""CDPruner and TRIM: tokens by their relevance to the question."""

import torch
import torch.nn.functional as F

from .methods_base import Method
from .ops_tokens import (
    MIN_NORM,
    check_finite,
    first_largest,
    gather_tokens,
    in_double,
    in_raster_order,
    others,
    top_tokens,
)

# Of a unit vector the squared length that the kept ones do not span; below this it is a rounding error in fp64.
SPENT = 1e-10


class CDPruner(Method):
    """
    Greedy MAP of a DPP whose kernel is the similarity of the projected tokens, weighted by relevance (arXiv 2506.10967).

    The relevance is scaled to [0, 1] in each set by itself, where the authors' code scales over the whole batch.
    """

    required_signals = frozenset({"projected", "relevance"})
    relevance = "projected"
    relevance_with_tower = "clip"

    def select(self, tokens, num_kept, pruning):
        quality = torch.ones(tokens.features.shape[:2], dtype=torch.float32, device=tokens.features.device)
        if tokens.relevance is not None:
            quality = unit_range(tokens.relevance)
        return select_conditional_dpp(tokens.projected, quality, num_kept)


def unit_range(relevance: torch.Tensor) -> torch.Tensor:
    """Relevance (N, L) moved and scaled to (0, 1] in each set; all ones where it does not vary."""
    lowest, highest = relevance.aminmax(dim=1, keepdim=True)
    return (relevance - lowest + 1e-6) / (highest - lowest).clamp_min(1e-6)


@torch.no_grad()
def select_conditional_dpp(features: torch.Tensor, quality: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Greedy MAP inference of the DPP with kernel L_ij = r_i cos(x_i, x_j) r_j, by an incremental Cholesky decomposition in fp64.

    A token's gain is the part of L_ii that the kept tokens do not span; a tie is relative to the largest gain. Where every
    gain is spent (the kernel has fewer ranks than tokens are asked for), the rest is filled up by quality.

    Args:
        features: (N, L, C), any floating dtype, not normalized.
        quality: (N, L), r >= 0.
        num_kept: k with 1 <= k <= L.

    Returns:
        LongTensor (N, k), ascending in each set.

    Raises:
        ValueError: features or quality are not finite.
    """
    check_finite("features", features)
    check_finite("quality", quality)
    unit, quality = F.normalize(in_double(features), dim=-1, eps=MIN_NORM), in_double(quality)
    cosines = torch.bmm(unit, unit.mT)
    left = cosines.diagonal(dim1=1, dim2=2)  # of each unit vector, what the kept ones do not span
    filling = quality - quality.amax(1, keepdim=True) - 1  # by quality, but below every gain that is left
    taken = torch.zeros_like(left, dtype=torch.bool)
    factors = unit.new_zeros(*left.shape, num_kept)  # row i: the coordinates of token i along the kept ones
    picks, sets = [], torch.arange(len(unit), device=unit.device)[:, None]
    for step in range(num_kept):
        left = left.masked_fill(left < SPENT, 0)
        gain = quality.square() * left
        score = torch.where(gain > 0, gain, filling).masked_fill(taken, -torch.inf)
        pick = first_largest(score, relative=True)[:, None]
        known = factors[..., :step]
        residual = cosines[sets, pick] - torch.bmm(known[sets, pick], known.mT)
        spread = left.gather(1, pick)
        factors[..., step] = torch.where(spread > 0, residual[:, 0] / spread.clamp_min(SPENT).sqrt(), 0)
        left = left - factors[..., step].square()
        taken.scatter_(1, pick, True)
        picks.append(pick)
    return torch.cat(picks, dim=1).sort(dim=1).values.to(features.device)


class Trim(Method):
    """
    The most relevant tokens, and the mean of all others as one more (TRIM, arXiv 2409.10994, Sec. 3).

    The training-free form with a fixed count, which takes the mean token from the budget; the paper finds the count from the
    outliers of the relevance, and trains with it. The mean stands where the last dropped token was. A budget of one token
    is the most relevant one.
    """

    required_signals = frozenset({"relevance"})
    relevance = "projected"
    relevance_with_tower = "clip"

    def reduce(self, tokens, num_kept, pruning):
        features = tokens.features
        check_finite("features", features)
        relevance = tokens.relevance
        if relevance is None:  # nothing tells the tokens apart
            relevance = torch.zeros(features.shape[:2], dtype=torch.float32, device=features.device)
        kept = top_tokens(relevance, max(1, num_kept - 1))
        if num_kept == 1:
            return gather_tokens(features, kept), kept
        dropped = others(kept, features.shape[1])
        mean = gather_tokens(features, dropped).float().mean(1, keepdim=True).to(features.dtype)
        merged = torch.cat([gather_tokens(features, kept), mean], dim=1)
        return in_raster_order(merged, torch.cat([kept, dropped[:, -1:]], dim=1))
