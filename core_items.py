"""The images and videos of a prompt: which placeholders they fill, and what is kept of them."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

from .core_layout import Layout


class MediaSizes(NamedTuple):
    """
    What the processor returned about the sizes of media, beside their pixels.

    Attributes:
        image_sizes: (images, 2), height and width of each image; `None` where all are of one size.
        image_grid_thw, video_grid_thw: (items, 3), how many patches each has in time, height and width, where items have grids
            of their own.
        second_per_grid_ts: for each video how long one step of its grid lasts.
    """

    image_sizes: Optional[torch.LongTensor] = None
    image_grid_thw: Optional[torch.LongTensor] = None
    video_grid_thw: Optional[torch.LongTensor] = None
    second_per_grid_ts: Optional[torch.Tensor] = None


@dataclass
class MediaItem:
    """
    One image or video on its way into the prompt.

    Attributes:
        layout: its grids of tokens.
        row: the sample that it belongs to; `None` where a reused cache holds it.
        sets: the vision encoder's output by name, a `dict` for each of `layout.grids`: `"features"` (number of sets, L, C),
            `"companions"` (number of sets, L, levels, H) that go with the tokens into the language model, the signals that the
            method requires, and where tokens were merged in the encoder `"source_indices"` (number of
            sets, L), the place of each in its set.
        kept: (k,) ascending indices of the tokens that stay, counted through all sets; `layout.split` tells the frames apart.
        tokens: (k, C) features of the tokens that stay; projected ones (k, H) of methods that work behind the projector.
        token_sizes: (k,) fp32, how many tokens each of them stands for; `None` without proportional attention.
        signals: the signals that the method was shown, a `VisualTokens` for each entry of `layout.sets`, where that was asked for; `None` for
            a set that keeps all of its tokens.
    """

    layout: Layout
    row: Optional[int] = None
    sets: Optional[list] = None
    kept: Optional[torch.LongTensor] = None
    tokens: Optional[torch.Tensor] = None
    token_sizes: Optional[torch.Tensor] = None
    signals: Optional[list] = None

    @property
    def kind(self) -> str:
        """`"image"` or `"video"`."""
        return self.layout.kind


def place_items(layouts: list, masks: dict, pruning, cached: int = 0) -> list:
    """
    The items of a prompt, each with the row of the batch that its placeholders are in.

    Args:
        layouts: of each image, then of each video.
        masks: for each kind (B, T) bool, where its placeholders are.
        cached: so many tokens of a row are in a reused cache: there either the media of all tokens were passed, and the row
            of those in the cache is `None`, or those of the new tokens alone.

    Raises:
        ValueError: the prompt has more or fewer placeholders than tokens that stay.
    """
    items = [MediaItem(layout) for layout in layouts]
    for kind, mask in masks.items():
        group = [item for item in items if item.kind == kind]
        sizes = [item.layout.num_placeholders(pruning) for item in group]
        in_cache, new = mask[:, :cached].sum(1).tolist(), mask[:, cached:].sum(1).tolist()
        rows = _rows_of_items(new, sizes)
        if rows is None and cached:
            rows = _rows_of_items([old + fresh for old, fresh in zip(in_cache, new)], sizes, in_cache)
        if rows is None:
            raise ValueError(
                f"the prompt has {sum(new)} {kind} placeholders (by row: {new}), but its {len(group)} {kind}s give "
                f"{sum(sizes)} tokens (each: {sizes}) with {pruning.budget}, method={pruning.method!r}, "
                f"video_pooling={pruning.video_pooling}, scope={pruning.resolved('scope')!r}. Prepare the inputs with the "
                "processor of this repository, loaded with the same pruning parameters, and pass all that it returns; a budget "
                "for one call goes to the processor as keep_ratio= or keep_tokens=. To continue a cache, pass the media of the new turn or of "
                "all turns."
            )
        for item, row in zip(group, rows):
            item.row = row
    return items


def _rows_of_items(placeholders: list, sizes: list, in_cache: Optional[list] = None) -> Optional[list]:
    """
    The row that each item is in, items filling the placeholders of each row in order; `None` if they do not fit.

    The row of an item that lies within the first `in_cache` placeholders of its row is `None`.
    """
    rows, row, filled = [], 0, 0
    for size in sizes:
        while filled == placeholders[row] and row + 1 < len(placeholders):
            row, filled = row + 1, 0
        rows.append(None if in_cache and filled < in_cache[row] else row)
        filled += size
        if filled > placeholders[row]:
            return None
    return None if filled < placeholders[row] or any(placeholders[row + 1 :]) else rows


def expanded_order(items: list, batch: int, expand_size: int) -> dict:
    """
    For each kind the indices of its items when every row of a batch is repeated `expand_size` times.

    Items are repeated row by row: repeated one by one, those of a row that has several would change places. Items that a reused
    cache holds are left out.
    """
    order = {"image": [], "video": []}
    for row, kind in itertools.product(range(batch), order):
        group = [item for item in items if item.kind == kind]
        order[kind] += [index for index, item in enumerate(group) if item.row == row] * expand_size
    return order


def take_items(values, indices: list, grids: Optional[torch.LongTensor] = None):
    """The values of the items with these indices, one a row; where items have `grids`, one a patch, item after item."""
    if grids is None:
        return values[indices] if isinstance(values, torch.Tensor) else [values[index] for index in indices]
    patches = values.split(grids.prod(1).tolist())
    return torch.cat([patches[index] for index in indices])


def tokens_by_place(items: list, masks: dict, values: str, fill: float) -> torch.Tensor:
    """(B, T) fp32: the attribute `values` (k,) of the items at their placeholders, and `fill` at all other tokens."""
    mask = next(iter(masks.values()))
    result = torch.full(mask.shape, fill, dtype=torch.float32, device=mask.device)
    for kind, mask in masks.items():
        group = [getattr(item, values) for item in items if item.kind == kind]
        if group:
            result[mask] = torch.cat(group).to(result)
    return result


def check_pixels(pixels: dict) -> None:
    """Raises ValueError, with the indices, where pixels are not finite."""
    for kind, values in pixels.items():
        bad = [index for index, item in enumerate(() if values is None else values) if not torch.isfinite(item).all()]
        if bad:
            raise ValueError(f"the pixels of {kind} {bad} hold NaN or infinity; check the file and its preprocessing.")
