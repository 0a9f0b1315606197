"""VisionZip: tokens that CLS attends to, and merged tokens of the rest."""

import torch
import torch.nn.functional as F

from .method_base_rediprune import Method
from .selection_rediprune import MIN_NORM, check_finite, first_largest, gather_tokens, top_tokens

CONTEXTUAL_SHARE = 10 / 64  # of all tokens that stay, as in the paper's setting of 54 + 10


class VisionZip(Method):
    """
    Dominant tokens by the attention of CLS, contextual tokens by merging the rest around evenly spaced ones with similar
    keys (VisionZip, arXiv 2412.04467, Sec. 3).

    All tokens stand in raster order, a contextual one where its centre was, and CLS itself is left out: the projector
    has never seen it. The authors' code puts CLS first and the contextual tokens last.
    """

    needs = frozenset({"cls_attention", "keys"})

    def reduce(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        num_contextual = round(num_kept * CONTEXTUAL_SHARE)
        num_tokens = tokens.features.shape[1]
        dominant = top_tokens(tokens.cls_attention * num_tokens, num_kept - num_contextual)
        rest = others(dominant, num_tokens)
        centres, members = around_centres(gather_tokens(tokens.keys, rest), num_contextual)
        old = gather_tokens(tokens.features, rest).float()
        merged = old[:, centres] + torch.bmm(members / members.sum(2, keepdim=True).clamp_min(1), old)
        features = torch.cat([gather_tokens(tokens.features, dominant), merged.to(tokens.features.dtype)], dim=1)
        return in_raster_order(features, torch.cat([dominant, rest[:, centres]], dim=1))


@torch.no_grad()
def around_centres(keys: torch.Tensor, num_centres: int) -> tuple:
    """
    Evenly spaced centres, and for each the tokens whose keys are most similar to its own.

    Args:
        keys: (N, R, D) of the tokens in raster order.
        num_centres: c with 0 <= c <= R.

    Returns:
        the centres' places LongTensor (c,), and fp32 (N, c, R): 1 where a token belongs to a centre; centres do not.
    """
    check_finite("keys", keys)
    num_sets, num_tokens, _ = keys.shape
    centres = torch.arange(num_centres, device=keys.device) * max(1, num_tokens // max(1, num_centres))
    members = keys.new_zeros(num_sets, num_centres, num_tokens, dtype=torch.float32)
    if num_centres:
        unit = F.normalize(keys.float(), dim=-1, eps=MIN_NORM)
        similarity = torch.bmm(unit, unit[:, centres].mT)  # (N, R, c)
        members.scatter_(1, first_largest(similarity.flatten(0, 1)).view(num_sets, 1, num_tokens), 1)
        members[:, :, centres] = 0
    return centres, members


def others(kept: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(N, k) -> (N, L - k): the indices that are not among the kept ones, ascending."""
    dropped = torch.ones(kept.shape[0], num_tokens, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return dropped.nonzero()[:, 1].view(kept.shape[0], -1)


def in_raster_order(features: torch.Tensor, anchors: torch.Tensor) -> tuple:
    """Features (N, k, C) and the indices (N, k) whose places they take, both by ascending index."""
    anchors, order = anchors.sort(dim=1, stable=True)
    return gather_tokens(features, order), anchors
