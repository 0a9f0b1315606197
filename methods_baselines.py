"""The controls of every comparison: tokens at random, evenly spaced tokens, a coarser grid, all tokens."""

import functools
import math

import torch
import torch.nn.functional as F

from .methods_base import Method
from .methods_settings import Setting, is_whole
from .ops_selection import select_random, select_uniform
from .ops_tokens import check_finite


class Random(Method):
    """
    A uniform draw without replacement, seeded for each set.

    Parameters:
        seed (`int`, defaults to 0): not negative.
    """

    required_signals = frozenset({"seeds"})
    parameters = {"seed": Setting(0, lambda value: is_whole(value) and value >= 0, "a non-negative integer")}

    def select(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        return select_random(tokens.features.shape[1], num_kept, tokens.seeds).to(tokens.features.device)


class Uniform(Method):
    """Evenly spaced tokens in raster order."""

    def select(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        num_sets, num_tokens = tokens.features.shape[:2]
        return select_uniform(num_tokens, num_kept).to(tokens.features.device).expand(num_sets, -1)


class Downsample(Method):
    """
    Each frame or view in a coarser grid, by average pooling: a control, which studies of these methods find hard to beat.

    The grid is the largest within the budget whose cells are not stretched more than twofold (`coarser_grid`), so that up to a
    few tokens fewer than the budget stay. A token stands at the centre of its cell, and CLS, where it is a token of the frame,
    stays beside the grid.
    """

    def check(self, values):
        if values["method"] == "downsample" and values["scope"] not in (None, "frame"):
            raise ValueError(
                f"pruning key scope is {values['scope']!r}, but method='downsample' makes each frame and each view of an image "
                "coarser by itself; leave scope at None"
            )

    def count(self, num_tokens, pruning):
        """As many as of a square frame; the whole budget where `num_tokens` make none."""
        side = math.isqrt(num_tokens)
        square = side**2 == num_tokens
        return self._size(1, side, side, 0, pruning) if square else pruning.nominal(num_tokens)

    def count_in_grid(self, grid, pruning):
        return self._size(*grid, pruning)

    @staticmethod
    def _size(frames, height, width, leading, pruning) -> int:
        budget = pruning.nominal(leading + height * width)
        leading = leading if leading < budget else 0
        return leading + math.prod(coarser_grid(height, width, budget - leading))

    def reduce(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        _, height, width, leading = tokens.grid
        kept_leading = leading if leading < num_kept else 0
        size = coarser_grid(height, width, num_kept - kept_leading)
        features = tokens.features[:, leading:].float().mT.unflatten(2, (height, width))
        pooled = F.adaptive_avg_pool2d(features, size).flatten(2).mT.to(tokens.features.dtype)
        rows, columns = (
            cell_centres(length, number, pooled.device) for length, number in zip((height, width), size, strict=True)
        )
        places = leading + (rows[:, None] * width + columns).flatten()
        places = torch.cat([torch.arange(kept_leading, device=places.device), places]).expand(len(pooled), -1)
        return torch.cat([tokens.features[:, :kept_leading], pooled], dim=1), places


@functools.lru_cache(maxsize=256)
def coarser_grid(height: int, width: int, most: int) -> tuple:
    """
    The coarser grid (rows, columns) of a frame of height x width tokens: of those of at most `most` tokens whose cells are not
    stretched more than twofold (or no more than needed) the one of most tokens, then the least stretched, then the highest.
    """
    grids = [
        (rows, columns)
        for rows in range(1, min(height, most) + 1)
        for columns in range(1, min(width, most // rows) + 1)
    ]
    stretch = {(h, w): max(h * width / (height * w), height * w / (h * width)) for h, w in grids}
    limit = max(2, min(stretch.values()))
    fitting = [grid for grid in grids if stretch[grid] <= limit]
    return max(fitting, key=lambda grid: (math.prod(grid), -stretch[grid], grid[0]))


def cell_centres(length: int, number: int, device) -> torch.LongTensor:
    """For each of `number` cells of adaptive average pooling the place of its centre among `length`, rounded down: (number,)."""
    cell = torch.arange(number, device=device)
    first, last = cell * length // number, -(-(cell + 1) * length // number) - 1
    return (first + last) // 2


class NoPruning(Method):
    """Every token stays: the stock model."""

    def count(self, num_tokens, pruning):
        return num_tokens
