"""PruMerge and PruMerge+: tokens that CLS attends to, with their nearest others added to them."""

import math

import torch
import torch.nn.functional as F

from .method_base_rediprune import Method
from .method_visionzip_rediprune import in_raster_order, others
from .selection_rediprune import MIN_NORM, check_finite, count_kept, gather_tokens, top_tokens

NEIGHBOURS = 32


class PruMerge(Method):
    """
    Tokens by the attention of CLS in the last layer; to each its 32 nearest others are added, weighted by that attention;
    one more token is the weighted sum of all that do not stay (LLaVA-PruMerge, arXiv 2403.15388, Sec. 3).

    The form with a fixed count, which takes the extra token from the budget; in the paper the count follows from the outliers
    of the attention. Tokens stand in raster order, the extra one where the last dropped token was.
    """

    needs = frozenset({"last_cls_attention", "last_keys"})

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
        nominal = count_kept(num_tokens, pruning.keep_ratio)
        grid = len(self.grid(num_tokens, pruning))
        return min(num_tokens, grid + round((nominal - 1) * (1 - grid / num_tokens)) + 1)

    @staticmethod
    def grid(num_tokens, pruning) -> range:
        return range(0, num_tokens - 1, max(1, int(math.floor(min(1 / pruning.keep_ratio, 3 * num_tokens)) / 3)))

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
