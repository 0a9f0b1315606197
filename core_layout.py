"""How many visual tokens an image or a video makes, and in which grids: plain arithmetic, shared by the processor (which
writes that many placeholders) and the model (which fills them), so that the two cannot disagree."""

from typing import NamedTuple

from transformers.image_processing_utils import select_best_resolution


class TokenGrid(NamedTuple):
    """`frames` equal sets of `height` x `width` visual tokens in raster order; which are pruned separately or jointly."""

    frames: int
    height: int
    width: int

    @property
    def tokens_per_set(self) -> int:
        return self.height * self.width


class TileCrop(NamedTuple):
    """The tiles of one image: `rows` x `columns` tiles, whose joint token grid is cut to the box that holds the image."""

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int


def check_pinpoints(grid_pinpoints, tile_size: int = 1) -> None:
    """Raises ValueError unless `grid_pinpoints` are resolutions (height, width) in tiles of `tile_size` pixels."""

    def is_length(value):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % tile_size == 0

    pairs = grid_pinpoints if isinstance(grid_pinpoints, (list, tuple)) else []
    if not pairs or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_length, pair)) for pair in pairs
    ):
        unit = "positive whole numbers" if tile_size == 1 else f"positive multiples of {tile_size}, the side of a tile"
        raise ValueError(
            f"image_grid_pinpoints is {grid_pinpoints!r}, but must be a list of resolutions [height, width] in pixels, "
            f"{unit}; set it in config.json and in preprocessor_config.json to what the checkpoint was trained with."
        )


def check_pool_stride(stride, side: int = None) -> None:
    """Raises ValueError unless `stride` can pool frames of `side` x `side` tokens."""
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1 or side is not None and stride > side:
        most = "" if side is None else f" and at most {side}, the tokens on the side of a frame"
        raise ValueError(
            f"spatial_pool_stride is {stride!r}, but must be a whole number of at least 1{most}; set it in config.json "
            "to what the checkpoint was trained with (2 for LLaVA-NeXT-Video)."
        )


def crop_of_tiles(image_size, grid_pinpoints, tile_size: int, side: int) -> TileCrop:
    """
    The anyres layout of an image.

    Args:
        image_size: (height, width) of the image in pixels.
        grid_pinpoints: the resolutions (height, width) to choose from.
        tile_size: side of a tile in pixels.
        side: tokens on the side of a tile.

    Raises:
        ValueError: the resolutions are not of whole tiles.
    """
    check_pinpoints(grid_pinpoints, tile_size)
    height, width = (int(length) for length in image_size)
    best_height, best_width = select_best_resolution((height, width), grid_pinpoints)
    rows, columns = best_height // tile_size, best_width // tile_size
    grid_height, grid_width = rows * side, columns * side
    top = left = 0
    if width / height > grid_width / grid_height:
        # Rounded to 7 digits first, as in the stock model, so that 11.9999999 does not become 11.
        top = (grid_height - int(round(height * (grid_width / width), 7))) // 2
    else:
        left = (grid_width - int(round(width * (grid_height / height), 7))) // 2
    return TileCrop(rows, columns, top, left, grid_height - 2 * top, grid_width - 2 * left)


def image_grids(image_size, grid_pinpoints, tile_size: int, side: int) -> list:
    """The two grids of an image: the base view and the unpadded tiles."""
    crop = crop_of_tiles(image_size, grid_pinpoints, tile_size, side)
    return [TokenGrid(1, side, side), TokenGrid(1, crop.height, crop.width)]


def video_grids(num_frames: int, side: int, pooling: str, pool_stride: int) -> list:
    """
    The one grid of a video whose frames have `side` x `side` tokens before pooling.

    Raises:
        ValueError: nothing would be left by pooling with `pool_stride`.
    """
    if pooling == "before":
        check_pool_stride(pool_stride, side)
        side = side // pool_stride
    return [TokenGrid(num_frames, side, side)]


def num_unpruned(grids, newlines: bool) -> int:
    """Tokens of a medium when nothing is pruned; an image's tiles (its last grid) then end each row with a newline."""
    total = sum(grid.frames * grid.tokens_per_set for grid in grids)
    return total + (grids[-1].height if newlines else 0)


def taken_jointly(grids, pruning) -> bool:
    """Whether all tokens of a medium are one set under `pruning` (a `PruningConfig`), instead of each frame or view."""
    scope = pruning.resolved("scope") if pruning.prunes else "frame"
    is_video = len(grids) == 1  # an image has its base view and its tiles
    return scope == "medium" or scope == "video" and is_video


def token_sets(grids, pruning) -> list:
    """The sets that are pruned, each to its own count: (number of sets, tokens in each) of every grid, or one for all."""
    if taken_jointly(grids, pruning):
        return [(1, num_unpruned(grids, newlines=False))]
    return [(grid.frames, grid.tokens_per_set) for grid in grids]


def num_placeholders(grids, pruning, newlines: bool) -> int:
    """Placeholders that a medium takes in the prompt under `pruning` (a `PruningConfig`); newlines go when tokens go."""
    if not pruning.prunes:
        return num_unpruned(grids, newlines)
    return sum(number * pruning.count(size) for number, size in token_sets(grids, pruning))


def split_budget(total: int, sizes: list) -> list:
    """`total` <= sum(sizes) divided in proportion to the sizes: rounded down, what is left to the largest remainders."""
    whole = max(1, sum(sizes))
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(total * sizes[index] % whole), index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts
