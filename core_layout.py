"""How many visual tokens an image or a video makes, and in which grids: plain arithmetic, shared by the processor (which
writes that many placeholders) and the model (which fills them), so that the two cannot disagree."""

import itertools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from transformers.image_processing_utils import select_best_resolution


class TokenGrid(NamedTuple):
    """`frames` equal sets of visual tokens: `leading` ones, such as CLS, then `height` x `width` in raster order."""

    frames: int
    height: int
    width: int
    leading: int = 0

    @property
    def tokens_per_set(self) -> int:
        return self.leading + self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.frames * self.tokens_per_set


class TileCrop(NamedTuple):
    """The tiles of one image: `rows` x `columns` tiles, whose joint token grid is cut to the box that holds the image."""

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Layout:
    """
    The visual tokens of one image or video: its grids one after another, each frame by frame (or view by view).

    Attributes:
        kind: `"image"` or `"video"`.
        grids: tuple of `TokenGrid`.
        row_newlines: whether each row of the last grid ends with a newline token when nothing is pruned.
        closing_newline: whether a newline token follows all others when nothing is pruned.
        crop: how the tiles of an image lie, whose tokens are its last grid; `None` = it has no tiles.
        projected: whether the encoder gives its tokens behind the projector, where this family pools or merges them.
        seconds: how long a frame of a video lasts, where its prompt tells; `None` = not known.
        frames_apart: whether there is text between the frames of a video, whose placeholders so stand in several runs.
    """

    kind: str
    grids: tuple
    row_newlines: bool = False
    closing_newline: bool = False
    crop: Optional[TileCrop] = None
    projected: bool = False
    seconds: Optional[float] = None
    frames_apart: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that can be kept; newlines go when tokens go."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def num_unpruned(self) -> int:
        """Tokens when nothing is pruned, newlines included."""
        return self.num_tokens + (self.grids[-1].height if self.row_newlines else 0) + self.closing_newline

    def shares_budget(self, pruning) -> bool:
        """Whether all tokens are one set under `pruning` (a `PruningConfig`), instead of each frame or view."""
        scope = pruning.resolved("scope") if pruning.prunes else "frame"
        return scope == "item" or scope == "video" and self.kind == "video"

    def set_grids(self, pruning) -> list:
        """The sets that are pruned, each to its own count: (number of sets, `TokenGrid` of each) of every grid, or one for all."""
        if not self.shares_budget(pruning):
            return [(grid.frames, grid._replace(frames=1)) for grid in self.grids]
        one = len(self.grids) == 1
        return [
            (1, self.grids[0] if one else TokenGrid(1, 1, self.num_tokens))
        ]  # grids of several sizes are a row of tokens

    def sets(self, pruning) -> list:
        """The same, each as (number of sets, tokens in each)."""
        return [(number, grid.num_tokens) for number, grid in self.set_grids(pruning)]

    def num_placeholders(self, pruning) -> int:
        """Placeholders in the prompt under `pruning`."""
        if not pruning.prunes:
            return self.num_unpruned
        return sum(number * pruning.count_in_grid(grid) for number, grid in self.set_grids(pruning))

    def split(self, kept: torch.LongTensor) -> list:
        """Flat ascending indices (k,) as one LongTensor for each frame or view, with the indices within it."""
        sizes = [grid.tokens_per_set for grid in self.grids for _ in range(grid.frames)]
        parts, start = [], 0
        for size in sizes:
            parts.append(kept[(kept >= start) & (kept < start + size)] - start)
            start += size
        return parts

    def columns(self, kept: torch.LongTensor) -> torch.LongTensor:
        """Where tokens with flat indices (k,) stand in the unpruned item, newlines counted: (k,)."""
        if not self.row_newlines:
            return kept
        grid = self.grids[-1]
        rows_before = (kept - (self.num_tokens - grid.num_tokens)).clamp_min(0) // max(grid.width, 1)
        return kept + rows_before


class FrameSize(NamedTuple):
    """
    What a checkpoint makes of a picture.

    Attributes:
        pixels: side of a tile or frame.
        side: patches on that side.
        pinpoints: the resolutions (height, width) that an image may be tiled in; `None` = it is one tile.
        pool_stride: stride of the pooling of video frames; `None` = none.
        max_tiles: an image whose tiles have more tokens than so many whole tiles is shrunk to these; `None` = none is.
    """

    pixels: int
    side: int
    pinpoints: Optional[list] = None
    pool_stride: Optional[int] = None
    max_tiles: Optional[int] = None


class LlavaLayouts:
    """LLaVA-1.5: an image is one grid of patches; there are no videos."""

    kinds = ("image",)

    @staticmethod
    def image(frame: FrameSize, image_size) -> Layout:
        """The layout of an image of (height, width) pixels."""
        return Layout("image", (TokenGrid(1, frame.side, frame.side),))

    @staticmethod
    def video(frame: FrameSize, num_frames: int, pruning) -> Layout:
        """The layout of a video; `pruning` says whether its frames are pooled."""
        raise NotImplementedError("this model takes no videos")


class LlavaNextLayouts(LlavaLayouts):
    """LLaVA-NeXT: an image is a base view and its unpadded tiles, whose rows end with newlines."""

    @staticmethod
    def image(frame, image_size):
        crop = crop_of_tiles(image_size, frame.pinpoints, frame.pixels, frame.side)
        grids = (TokenGrid(1, frame.side, frame.side), TokenGrid(1, crop.height, crop.width))
        return Layout("image", grids, row_newlines=True, crop=crop)


class LlavaNextVideoLayouts(LlavaNextLayouts):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT; the frames of a video are pooled, unless `video_pooling` is off."""

    kinds = ("image", "video")

    @staticmethod
    def video(frame, num_frames, pruning):
        side = frame.side
        if pruning.video_pooling:
            check_pool_stride(frame.pool_stride, side)
            side = side // frame.pool_stride
        return Layout("video", (TokenGrid(num_frames, side, side),))


class VideoLlavaLayouts(LlavaLayouts):
    """Video-LLaVA: an image is one grid; each frame of a video is CLS and one grid."""

    kinds = ("image", "video")

    @staticmethod
    def video(frame, num_frames, pruning):
        return Layout("video", (TokenGrid(num_frames, frame.side, frame.side, leading=1),))


class LlavaOnevisionLayouts(LlavaNextLayouts):
    """
    LLaVA-OneVision: an image as LLaVA-NeXT, with fewer tokens of its tiles where these are too many, or one view, which ends
    with a newline. A video ends with one, too; its frames are pooled, unless `video_pooling` is off.
    """

    kinds = ("image", "video")

    @staticmethod
    def image(frame, image_size):
        """The layout of an image of (height, width) pixels, or of (0, 0) for one that is not tiled."""
        base = TokenGrid(1, frame.side, frame.side)
        if not any(image_size):
            return Layout("image", (base,), closing_newline=True)
        crop = crop_of_tiles(image_size, frame.pinpoints, frame.pixels, frame.side)
        height, width = shrunk_size(crop, frame)
        shrinks, grids = (height, width) != (crop.height, crop.width), (base, TokenGrid(1, height, width))
        return Layout("image", grids, row_newlines=True, crop=crop, projected=shrinks)

    @staticmethod
    def video(frame, num_frames, pruning):
        side = math.ceil(frame.side / 2) if pruning.video_pooling else frame.side
        grids = (TokenGrid(num_frames, side, side),)
        return Layout("video", grids, closing_newline=True, projected=pruning.video_pooling)


def shrunk_size(crop: TileCrop, frame: FrameSize) -> tuple:
    """(height, width) of the tokens that an image's tiles make: those of the crop, or fewer where they are too many."""
    ratio = math.sqrt(crop.height * crop.width / (frame.max_tiles * frame.side**2))
    return (int(crop.height // ratio), int(crop.width // ratio)) if ratio > 1.1 else (crop.height, crop.width)


def max_tiles_of(aspect_ratio) -> int:
    """The number in LLaVA-OneVision's `vision_aspect_ratio`, such as 9 in "anyres_max_9"."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect_ratio))
    if not found:
        raise ValueError(
            f'vision_aspect_ratio is {aspect_ratio!r}, but must be "anyres_max_" and a number of tiles; set it in config.json '
            'to what the checkpoint was trained with ("anyres_max_9" for LLaVA-OneVision).'
        )
    return int(found[1])


def sizes_of_tiled(image_sizes: torch.LongTensor, batch_num_images) -> torch.LongTensor:
    """
    Sizes of images, (0, 0) for those that are not tiled: LLaVA-OneVision tiles an image that is alone in its prompt.

    Args:
        image_sizes: (images, 2), height and width.
        batch_num_images: (prompts,) how many of them each prompt has; `None` = as the sizes say.

    Raises:
        ValueError: these are not as many images.
    """
    if batch_num_images is None or image_sizes is None:
        return image_sizes
    tiled = are_tiled(batch_num_images)
    if len(tiled) != len(image_sizes):
        raise ValueError(
            f"image_sizes hold {len(image_sizes)} images, but batch_num_images {len(tiled)}; pass all that the processor returned."
        )
    return image_sizes * torch.tensor(tiled, device=image_sizes.device)[:, None]


def are_tiled(batch_num_images) -> list:
    """For each image whether it is alone in its prompt, from the numbers of images of each prompt."""
    return [number == 1 for number in map(int, batch_num_images) for _ in range(number)]


def images_of_prompts(image_sizes: torch.LongTensor) -> torch.LongTensor:
    """Of `sizes_of_tiled` the numbers of images that prompts have; those that are not tiled count as of one prompt."""
    groups = itertools.groupby(image_sizes.any(1).tolist())
    numbers = [[1] * len(list(group)) if tiled else [len(list(group))] for tiled, group in groups]
    return torch.tensor(sum(numbers, []), device=image_sizes.device)


class PatchSize(NamedTuple):
    """What a checkpoint makes of pictures of any size: squares of `merge_size` x `merge_size` patches become tokens."""

    merge_size: int


class QwenLayouts:
    """Qwen2.5-VL: every image and video has a grid of patches of its own, of which squares are merged to one token."""

    kinds = ("image", "video")
    frames_apart = False

    @classmethod
    def image(cls, frame: PatchSize, grid) -> Layout:
        """The layout of an image of (1, height, width) patches."""
        return Layout("image", (cls._merged(frame, grid),), projected=True)

    @classmethod
    def video(cls, frame: PatchSize, grid, seconds: Optional[float] = None) -> Layout:
        """The layout of a video of (frames, height, width) patches, whose frames last so many seconds each."""
        grids = (cls._merged(frame, grid),)
        return Layout("video", grids, projected=True, seconds=seconds, frames_apart=cls.frames_apart)

    @staticmethod
    def _merged(frame, grid):
        frames, height, width = (int(number) for number in grid)
        return TokenGrid(frames, height // frame.merge_size, width // frame.merge_size)


class Qwen3Layouts(QwenLayouts):
    """Qwen3-VL: the same, with a timestamp before each frame of a video."""

    frames_apart = True


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


def split_budget(total: int, sizes: list) -> list:
    """`total` <= sum(sizes) divided in proportion to the sizes: rounded down, what is left to the largest remainders."""
    whole = max(1, sum(sizes))
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(total * sizes[index] % whole), index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts
