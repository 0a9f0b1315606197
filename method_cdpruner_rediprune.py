"""CDPruner: a determinantal point process over the tokens, conditioned on their relevance."""

import torch
import torch.nn.functional as F

from .method_base_rediprune import Method
from .selection_rediprune import MIN_NORM, TIE_TOLERANCE, check_finite, first_largest


class CDPruner(Method):
    """
    Greedy MAP of a DPP whose kernel is the similarity of the projected tokens, weighted by relevance (arXiv 2506.10967).

    The relevance is scaled to [0, 1] in each set by itself, where the authors' code scales over the whole batch.
    """

    needs = frozenset({"projected", "relevance"})
    relevance = "projected"
    relevance_with_tower = "clip"

    def select(self, tokens, num_kept, pruning):
        quality = torch.ones(tokens.features.shape[:2], device=tokens.features.device)
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
    Greedy MAP inference of the DPP with kernel L_ij = r_i cos(x_i, x_j) r_j, by an incremental Cholesky decomposition.

    A token's gain is the part of L_ii that the kept tokens do not span. Where every gain is spent (the kernel has fewer
    ranks than tokens are asked for), the rest is filled up by quality.

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
    with torch.autocast(features.device.type, enabled=False):
        weighted = F.normalize(features.float(), dim=-1, eps=MIN_NORM) * quality.float()[..., None]
        gain = weighted.square().sum(-1)
        # By quality, but below every gain that is left.
        filling = quality.float() - quality.float().amax(1, keepdim=True) - 1
        taken = torch.zeros_like(gain, dtype=torch.bool)
        factors = weighted.new_zeros(*gain.shape, num_kept)  # row i: the coordinates of token i along the kept ones
        picks = []
        for step in range(num_kept):
            score = torch.where(gain > TIE_TOLERANCE, gain, filling).masked_fill(taken, -torch.inf)
            pick = first_largest(score)[:, None]
            row = lambda values: values.gather(1, pick[..., None].expand(-1, 1, values.shape[-1]))  # noqa: E731
            residual = torch.bmm(row(weighted), weighted.mT) - torch.bmm(row(factors), factors.mT)
            spread = gain.gather(1, pick)
            factor = torch.where(spread > TIE_TOLERANCE, residual[:, 0] / spread.clamp_min(TIE_TOLERANCE).sqrt(), 0)
            factors[:, :, step] = factor
            gain = gain - factor.square()
            taken.scatter_(1, pick, True)
            picks.append(pick)
    return torch.cat(picks, dim=1).sort(dim=1).values
