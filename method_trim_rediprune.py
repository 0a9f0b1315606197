"""TRIM: tokens by their relevance to the question, and one for the rest."""

import torch

from .method_base_rediprune import Method
from .method_visionzip_rediprune import in_raster_order, others
from .selection_rediprune import check_finite, gather_tokens, top_tokens


class Trim(Method):
    """
    The most relevant tokens, and the mean of all others as one more (TRIM, arXiv 2409.10994, Sec. 3).

    The training-free form with a fixed count, which takes the mean token from the budget; the paper finds the count from the
    outliers of the relevance, and trains with it. The mean stands where the last dropped token was. A budget of one token
    is the most relevant one.
    """

    needs = frozenset({"relevance"})
    relevance = "projected"
    relevance_with_tower = "clip"

    def reduce(self, tokens, num_kept, pruning):
        features = tokens.features
        check_finite("features", features)
        relevance = tokens.relevance
        if relevance is None:  # nothing tells the tokens apart
            relevance = torch.zeros(features.shape[:2], device=features.device)
        kept = top_tokens(relevance, max(1, num_kept - 1))
        if num_kept == 1:
            return gather_tokens(features, kept), kept
        dropped = others(kept, features.shape[1])
        mean = gather_tokens(features, dropped).float().mean(1, keepdim=True).to(features.dtype)
        merged = torch.cat([gather_tokens(features, kept), mean], dim=1)
        return in_raster_order(merged, torch.cat([kept, dropped[:, -1:]], dim=1))
