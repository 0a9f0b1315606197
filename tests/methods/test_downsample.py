"""The coarser grid that stands for a frame as a control: its size, its means, its places, and what refuses it."""

import pytest
import torch
import torch.nn.functional as F
from rediprune.configuration_rediprune import PruningConfig
from rediprune.core_layout import TokenGrid
from rediprune.methods_base import VisualTokens
from rediprune.methods_baselines import cell_centres, coarser_grid
from rediprune.methods_registry import METHODS


@pytest.mark.parametrize("size, most, expected", [
    ((12, 12), 22, (5, 4)), ((12, 12), 14, (4, 3)), ((12, 12), 29, (7, 4)), ((6, 6), 5, (2, 2)), ((6, 6), 2, (2, 1)),
    ((6, 6), 36, (6, 6)), ((24, 24), 1, (1, 1)), ((8, 16), 8, (2, 4)), ((2, 30), 1, (1, 1)), ((3, 5), 14, (3, 4)),
])  # fmt: skip
def test_the_size_of_the_grid(size, most, expected):
    assert coarser_grid(*size, most) == expected


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (12, 12), (4, 30)])
def test_no_grid_that_fits_has_more_tokens(size):
    height, width = size
    for most in range(1, height * width + 1):
        h, w = coarser_grid(height, width, most)
        assert h * w <= most and h <= height and w <= width
        stretch = lambda h, w: max(h * width / (height * w), height * w / (h * width))  # noqa: E731
        for rows in range(1, height + 1):
            for columns in range(1, width + 1):
                if rows * columns <= most and stretch(rows, columns) <= 2:
                    assert stretch(h, w) <= 2 and rows * columns <= h * w


def test_cells_are_means_at_their_centres():
    features = torch.randn(3, 35, 4, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens(features, grid=TokenGrid(1, 5, 7))
    merged, kept = METHODS["downsample"].reduce(tokens, 6, PruningConfig(method="downsample"))
    expected = F.adaptive_avg_pool2d(features.mT.unflatten(2, (5, 7)), (2, 3))
    torch.testing.assert_close(merged, expected.flatten(2).mT)
    # Rows 0-2 and 2-4, columns 0-2, 2-4 and 4-6.
    assert kept.tolist() == [[7 * row + column for row in (1, 3) for column in (1, 3, 5)]] * 3
    torch.testing.assert_close(merged[:, 0], features.unflatten(1, (5, 7))[:, :3, :3].flatten(1, 2).mean(1))


@pytest.mark.parametrize("length", range(1, 15))
def test_centres_lie_within_their_cells_and_do_not_repeat(length):
    for number in range(1, length + 1):
        centres = cell_centres(length, number, "cpu")
        assert (centres.diff() > 0).all()
        for cell, centre in enumerate(centres.tolist()):
            assert cell * length // number <= centre < -(-(cell + 1) * length // number)


def test_cls_stays_beside_the_grid_where_there_is_room():
    method, features = METHODS["downsample"], torch.arange(10.0)[None, :, None]
    tokens = VisualTokens(features, grid=TokenGrid(1, 3, 3, leading=1))
    for ratio, places in ((0.1, [5]), (0.2, [0, 5]), (0.5, [0, 1, 2, 4, 5])):
        pruning = PruningConfig(method="downsample", keep_ratio=ratio)
        merged, kept = method.reduce(tokens, pruning.count_in_grid(tokens.grid), pruning)
        assert kept.tolist() == [places] and (merged[0, 0] == 0) == (places[0] == 0)


def test_counts_follow_from_the_sides_of_a_grid():
    pruning = PruningConfig(method="downsample", keep_ratio=0.15)
    assert pruning.count(144) == pruning.count_in_grid(TokenGrid(1, 12, 12)) == 20
    assert pruning.count_in_grid(TokenGrid(1, 8, 18)) == 21 and pruning.count_in_grid(TokenGrid(1, 0, 18)) == 0


@pytest.mark.parametrize("scope", ["video", "item"])
def test_frames_are_made_coarser_one_by_one(scope):
    with pytest.raises(ValueError, match=f"scope is '{scope}', but method='downsample'.*leave scope at None"):
        PruningConfig(method="downsample", scope=scope)


def test_a_budget_in_tokens_is_one_of_each_frame():
    pruning = PruningConfig(method="downsample", keep_tokens=22)
    assert pruning.count(144) == pruning.count_in_grid(TokenGrid(1, 12, 12)) == 20
    assert pruning.count_in_grid(TokenGrid(1, 3, 5)) == 15 and pruning.count(22) == 22
