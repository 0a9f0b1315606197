"""SCOPE and MMTok: kept tokens that cover the others (facility location)."""

import torch
import torch.nn.functional as F

from .methods_base import Method
from .methods_settings import choice
from .ops_tokens import MIN_NORM, check_finite, first_largest, in_double

VISION_TEMPERATURE = 0.2
VISION_WEIGHT = 0.5  # that of the words is 1
# A gain below this share of the first one is a rounding error: there is nothing left to cover.
SPENT_GAIN = 1e-12


class Scope(Method):
    """Coverage of the set, weighted by the attention of CLS (SCOPE, arXiv 2510.24214)."""

    required_signals = frozenset({"cls_attention"})

    def select(self, tokens, num_kept, pruning):
        rows = cosines(tokens.features).clamp_min(0)
        return select_coverage(rows, num_kept, tokens.cls_attention).to(tokens.features.device)


class MMTok(Method):
    """
    Coverage of the question's words with weight 1, and of the set itself with weight 0.5 (MMTok, arXiv 2508.18264).

    A word is compared with the tokens in the language model's embedding space, a token with the others by its features. The
    words are the content words of the question (`content_words`), as in the authors' code.

    Parameters:
        words (`str`, *optional*): which tokens of the question are covered. `"content"` = those of its content words, which the
            processor finds; `"all"` = all of the text. `None` = `"content"`. With the relevance `"attention"` or `"late_attention"`,
            which are the same here, it is always all.
    """

    required_signals = frozenset({"text_affinity"})
    parameters = {"words": choice(None, ("all", "content"))}
    words = "content"

    def check(self, values):
        if values["words"] == "content" and values["relevance"] in ("attention", "late_attention"):
            raise ValueError(
                f"pruning key words is 'content', which looks words up one by one, but relevance={values['relevance']!r} reads the "
                "whole question; set words to 'all', or choose another relevance"
            )

    def select(self, tokens, num_kept, pruning):
        rows = (cosines(tokens.features) / VISION_TEMPERATURE).softmax(-1)
        rows = rows * VISION_WEIGHT / rows.shape[1]
        if tokens.text_affinity is not None:
            rows = torch.cat([in_double(tokens.text_affinity), rows], dim=1)
        return select_coverage(rows, num_kept).to(tokens.features.device)


def cosines(features: torch.Tensor) -> torch.Tensor:
    """(N, L, C) -> (N, L, L) fp64: cosines of all pairs in each set. Raises ValueError where features are not finite."""
    check_finite("features", features)
    unit = F.normalize(in_double(features.detach()), dim=-1, eps=MIN_NORM)
    return torch.bmm(unit, unit.mT)


@torch.no_grad()
def select_coverage(rows: torch.Tensor, num_kept: int, saliency: torch.Tensor = None) -> torch.Tensor:
    """
    Greedy facility location: always the token j with the largest s_j sum_r max(0, rows_rj - best_r), where best_r is the
    largest rows_ru of the tokens u kept so far, 0 at first. Gains are summed in fp64, and a tie is relative to the largest.

    Args:
        rows: (N, R, L), how well token j covers item r; not negative.
        num_kept: k with 1 <= k <= L.
        saliency: (N, L), s; all ones when not given.

    Returns:
        LongTensor (N, k), ascending in each set.

    Raises:
        ValueError: rows or saliency are not finite.
    """
    check_finite("features", rows)
    if saliency is not None:
        check_finite("saliency", saliency)
        saliency = in_double(saliency)
    rows = in_double(rows)
    best, uncovered = rows.new_zeros(*rows.shape[:2], 1), torch.empty_like(rows)
    spent = SPENT_GAIN * rows.sum(1).amax(1, keepdim=True)
    taken = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.bool, device=rows.device)
    picks = []
    for _ in range(num_kept):
        gain = torch.sub(rows, best, out=uncovered).clamp_min_(0).sum(1)
        score = gain.masked_fill(gain < spent, 0)
        if saliency is not None:
            score = score * saliency
        pick = first_largest(score.masked_fill(taken, -torch.inf), relative=True)[:, None]
        best = torch.maximum(best, rows.gather(2, pick[:, None].expand(-1, rows.shape[1], 1)))
        taken.scatter_(1, pick, True)
        picks.append(pick)
    return torch.cat(picks, dim=1).sort(dim=1).values
