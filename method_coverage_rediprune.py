"""SCOPE and MMTok: kept tokens that cover the others (facility location)."""

import torch
import torch.nn.functional as F

from .method_base_rediprune import Method
from .selection_rediprune import MIN_NORM, check_finite, first_largest

VISION_TEMPERATURE = 0.2


class Scope(Method):
    """Coverage of the set, weighted by the attention of CLS (SCOPE, arXiv 2510.24214)."""

    needs = frozenset({"cls_attention"})

    def select(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        unit = F.normalize(tokens.features.detach().float(), dim=-1, eps=MIN_NORM)
        # The mean over the covered tokens instead of their sum, and attention relative to its maximum: gains of order 1.
        coverage = torch.bmm(unit, unit.mT).clamp_min(0) / unit.shape[1]
        attention = tokens.cls_attention
        saliency = attention / attention.amax(1, keepdim=True).clamp_min(MIN_NORM)
        return select_coverage(coverage, num_kept, saliency)


class MMTok(Method):
    """
    Coverage of the question's words and of the set itself, with equal weight (MMTok, arXiv 2508.18264).

    A word is compared with the tokens in the language model's embedding space, a token with the others by its features.
    """

    needs = frozenset({"text_rows"})

    def select(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        unit = F.normalize(tokens.features.detach().float(), dim=-1, eps=MIN_NORM)
        rows = (torch.bmm(unit, unit.mT) / VISION_TEMPERATURE).softmax(-1) / (2 * unit.shape[1])
        if tokens.text_rows is not None:
            rows = torch.cat([tokens.text_rows, rows], dim=1)
        return select_coverage(rows, num_kept)


@torch.no_grad()
def select_coverage(rows: torch.Tensor, num_kept: int, saliency: torch.Tensor = None) -> torch.Tensor:
    """
    Greedy facility location: always the token j with the largest s_j sum_r max(0, rows_rj - best_r), where best_r is the
    largest rows_ru of the tokens u kept so far, 0 at first.

    Args:
        rows: (N, R, L) fp32, how well token j covers item r; not negative.
        num_kept: k with 1 <= k <= L.
        saliency: (N, L) fp32, s; all ones when not given.

    Returns:
        LongTensor (N, k), ascending in each set.

    Raises:
        ValueError: rows or saliency are not finite.
    """
    check_finite("features", rows)
    if saliency is not None:
        check_finite("saliency", saliency)
    best = rows.new_zeros(*rows.shape[:2], 1)
    taken = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.bool, device=rows.device)
    picks = []
    for _ in range(num_kept):
        gain = (rows - best).clamp_min(0).sum(1)
        if saliency is not None:
            gain = gain * saliency
        pick = first_largest(gain.masked_fill(taken, -torch.inf))[:, None]
        best = torch.maximum(best, rows.gather(2, pick[:, None].expand(-1, rows.shape[1], 1)))
        taken.scatter_(1, pick, True)
        picks.append(pick)
    return torch.cat(picks, dim=1).sort(dim=1).values
