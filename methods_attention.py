"""VisionZip, PruMerge and PruMerge+: tokens by the attention of CLS in the vision tower, with merged tokens of the rest."""

import math

import torch
import torch.nn.functional as F

from .methods_base import Method
from .ops_tokens import (
    MIN_NORM,
    check_finite,
    first_largest,
    gather_tokens,
    in_raster_order,
    others,
    top_tokens,
)

CONTEXTUAL_SHARE = 10 / 64  # of all tokens that stay, as in the paper's setting of 54 + 10


class VisionZip(Method):
    """
    Dominant tokens by the attention of CLS, contextual tokens by merging the rest around evenly spaced ones with similar
    keys (VisionZip, arXiv 2412.04467, Sec. 3).

    All tokens stand in raster order, a contextual one where its centre was, and CLS itself is left out: the projector
    has never seen it. The authors' code puts CLS first and the contextual tokens last.
    """

    required_signals = frozenset({"cls_attention", "keys"})

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


NEIGHBOURS = 32


class PruMerge(Method):
    """
    Tokens by the attention of CLS in the last layer; to each its 32 nearest others are added, weighted by that attention;
    one more token is the weighted sum of all that do not stay (LLaVA-PruMerge, arXiv 2403.15388, Sec. 3).

    The form with a fixed count, which takes the extra token from the budget; in the paper the count follows from the outliers
    of the attention. Tokens stand in raster order, the extra one where the last dropped token was.
    """

    required_signals = frozenset({"last_cls_attention", "last_keys"})

    def choose(self, attention, num_kept, pruning) -> torch.LongTensor:
        """Indices (N, num_kept) of the tokens that stay beside the extra one."""
        return top_tokens(attention * attention.shape[1], num_kept)

    def reduce(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        check_finite("attention", tokens.last_cls_attention)
        attention, features = tokens.last_cls_attention.float(), tokens.features.float()
        num_extra = int(num_kept > 1)
        kept = self.choose(attention, num_kept - num_extra, pruning)
        near = nearest_others(tokens.last_keys, kept)
        merged = gather_tokens(features, kept) + torch.bmm(near * attention[:, None], features)
        if num_extra:
            dropped = others(kept, features.shape[1])
            weights = attention.gather(1, dropped)
            extra = torch.bmm(weights[:, None], gather_tokens(features, dropped))
            merged, kept = torch.cat([merged, extra], dim=1), torch.cat([kept, dropped[:, -1:]], dim=1)
        return in_raster_order(merged.to(tokens.features.dtype), kept)


class PruMergePlus(PruMerge):
    """
    PruMerge with a grid of evenly spaced tokens added (the "+" of arXiv 2403.15388): about four times the nominal budget, and
    counted as such.

    With the ratio r the grid's step is int(int(1 / r) / 3), so that r above 1/6 keeps everything. Of PruMerge's tokens as
    many are added as do not fall on the grid on average; in the authors' code it is as many as happen not to.
    """

    def count(self, num_tokens, pruning):
        nominal = pruning.nominal(num_tokens)
        grid = len(self.grid(num_tokens, pruning))
        return min(num_tokens, grid + round((nominal - 1) * (1 - grid / num_tokens)) + 1)

    @staticmethod
    def grid(num_tokens, pruning) -> range:
        step = int(math.floor(min(1 / pruning.share(num_tokens), 3 * num_tokens)) / 3)
        return range(0, num_tokens - 1, max(1, step))

    def choose(self, attention, num_kept, pruning):
        grid = torch.tensor(self.grid(attention.shape[1], pruning)[:num_kept], device=attention.device)
        grid = grid.expand(len(attention), -1)
        if grid.shape[1] == num_kept:
            return grid
        off_grid = others(grid, attention.shape[1])
        top = top_tokens(attention.gather(1, off_grid) * attention.shape[1], num_kept - grid.shape[1])
        return torch.cat([grid, off_grid.gather(1, top)], dim=1).sort(dim=1).values


@torch.no_grad()
def nearest_others(keys: torch.Tensor, kept: torch.Tensor, neighbours: int = NEIGHBOURS) -> torch.Tensor:
    """
    The tokens most similar to each kept one.

    Args:
        keys: (N, L, D) of all tokens.
        kept: (N, k) indices of the kept ones.
        neighbours: how many of all other tokens, kept ones too; all where there are fewer.

    Returns:
        fp32 (N, k, L): 1 where a token is among those with the most similar keys (cosine) to a kept one.
    """
    check_finite("keys", keys)
    unit = F.normalize(keys.float(), dim=-1, eps=MIN_NORM)
    similarity = torch.bmm(gather_tokens(unit, kept), unit.mT)
    similarity.scatter_(2, kept[..., None], -2.0)  # below every cosine
    nearest = top_tokens(similarity.flatten(0, 1), min(neighbours, keys.shape[1] - 1)).view(*kept.shape, -1)
    return torch.zeros_like(similarity).scatter_(2, nearest, 1)
