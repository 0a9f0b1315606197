"""The media of a prompt as the model sees them: one picture for each frame, image or view, beside the grid of its tokens."""

import numpy as np
import torch

PIXELS = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
}  # in inputs; 4.57 has the second


def pictures_of(model, processor, inputs, layouts) -> list:
    """
    The pictures of every image, then of every video of a prompt, in the order of its grids and frames.

    Args:
        inputs: what the processor returned.
        layouts: of each image, then of each video.

    Returns:
        for each layout a list of (label, uint8 (height, width, 3)); tiles of an image that has no token of them are empty.
    """
    pixels = {
        kind: iter(() if values is None else pixels_of_items(values, inputs, processor, kind))
        for kind, values in pixels_of(inputs).items()
    }
    several, found = sum(layout.kind == "image" for layout in layouts) > 1, []
    for number, layout in enumerate(layouts, 1):
        views = to_pictures(next(pixels[layout.kind]), getattr(processor, f"{layout.kind}_processor"))
        name = f"image {number}" if several else "image"
        if layout.kind == "video":
            found.append([(f"frame {index}", view) for index, view in enumerate(views, 1)])
        elif len(layout.grids) == 1:
            found.append([(name, views[0])])
        else:
            name = f"{name}, " if several else ""
            tiles = untile(model, views[1:], layout.crop)
            found.append([(f"{name}base view", views[0]), (f"{name}tiles", tiles)])
    return found


def pixels_of(inputs) -> dict:
    """For each kind of media its pixels; `None` where there are none."""
    return {kind: next((inputs[name] for name in names if name in inputs), None) for kind, names in PIXELS.items()}


def pixels_of_items(values, inputs, processor, kind: str):
    """
    The pixels of each image or video: as they are, or of flat patches the first frame of each step, put together
    (frames, 3, height, width).
    """
    grids, part = inputs.get(f"{kind}_grid_thw"), getattr(processor, f"{kind}_processor")
    if grids is None:
        return values
    items, merge, patch = values.split(grids.prod(1).tolist()), part.merge_size, part.patch_size
    return [of_patches(item.cpu(), *grid, merge, patch) for item, grid in zip(items, grids.tolist())]


def of_patches(values, frames: int, height: int, width: int, merge: int, patch: int) -> torch.Tensor:
    """Patches (frames * height * width, 3 * steps * patch * patch), square after square, as (frames, 3, height, width) pixels."""
    squares = values.view(frames, height // merge, width // merge, merge, merge, 3, -1, patch, patch)[
        :, :, :, :, :, :, 0
    ]
    return squares.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(frames, 3, height * patch, width * patch)


def patches_of(layout) -> list:
    """For each frame or view the flat indices (height * width,) of the tokens that have a place in its picture: CLS has none."""
    places, start = [], 0
    for grid in layout.grids:
        for _ in range(grid.frames):
            places.append(torch.arange(start + grid.leading, start + grid.tokens_per_set))
            start += grid.tokens_per_set
    return places


def to_pictures(pixels: torch.Tensor, preprocessing) -> list:
    """Preprocessed pixels (N, 3, height, width), or those of one picture, as N pictures, uint8 (height, width, 3)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.image_mean, preprocessing.image_std))
    pictures = (pixels.cpu().float().unflatten(0, (-1, 3)) if pixels.dim() == 3 else pixels.cpu().float()) * std + mean
    return list((pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())


def untile(model, tiles: list, crop) -> np.ndarray:
    """The tiles of an image put together, without their padding."""
    patch = model.config.vision_config.patch_size
    rows = [np.concatenate(tiles[r * crop.columns : (r + 1) * crop.columns], axis=1) for r in range(crop.rows)]
    whole = np.concatenate(rows)
    top, left, height, width = (patch * value for value in crop[2:])
    return whole[top : top + height, left : left + width]
