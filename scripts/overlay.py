"""Pictures of what was kept: frames and image views with the kept patches bright and the rest dimmed."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from repository import PICTURES, write_whole

CELL = 240  # side of one frame in the picture, pixels
MARGIN = 14
BACKGROUND, INK, FRAME = (18, 20, 26), (235, 238, 245), (255, 196, 61)
DIMMED = 0.22


def draw_overlay(model, processor, inputs, caption: str, path: Path) -> None:
    """Writes a contact sheet of the media in `inputs`, with what `model` keeps of them.

    Args:
        inputs: what the processor returned, with `pixel_values` or `pixel_values_videos`.
        caption: a line above the pictures.
        path: the picture's file.
    """
    panels = []
    with torch.inference_mode():
        items = model.select_tokens(**inputs)
    images = iter(inputs.get("pixel_values", []))
    videos = iter(inputs.get("pixel_values_videos", []))
    for number, item in enumerate(items, 1):
        kept = item.layout.split(item.kept.cpu())
        if item.kind == "video":
            frames = to_pictures(next(videos), processor.video_processor)
            grid = item.layout.grids[0]
            for index, frame in enumerate(frames):
                panels.append((f"frame {index + 1}", panel(frame, grid, kept[index])))
        else:
            views = to_pictures(next(images), processor.image_processor)
            panels.append((f"image {number}, base view", panel(views[0], item.layout.grids[0], kept[0])))
            size = inputs["image_sizes"][number - 1].tolist()
            if item.layout.grids[1].tokens_per_set:
                tiles = untile(model, views[1:], size)
                panels.append((f"image {number}, tiles", panel(tiles, item.layout.grids[1], kept[1])))
    save(sheet(panels, caption), path)


def to_pictures(pixels: torch.Tensor, preprocessing) -> list:
    """Preprocessed pixels (N, 3, height, width) as N pictures, uint8 (height, width, 3)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.image_mean, preprocessing.image_std))
    pictures = (pixels.cpu().float() * std + mean).clamp(0, 1) * 255
    return list(pictures.round().byte().permute(0, 2, 3, 1).numpy())


def untile(model, tiles: list, image_size) -> np.ndarray:
    """The tiles of an image put together, without their padding."""
    from importlib import import_module

    geometry = import_module(type(model).__module__.rpartition(".")[0] + ".core_layout")
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    crop = geometry.crop_of_tiles(image_size, model.config.image_grid_pinpoints, vision.image_size, side)
    rows = [np.concatenate(tiles[r * crop.columns : (r + 1) * crop.columns], axis=1) for r in range(crop.rows)]
    whole = np.concatenate(rows)
    top, left, height, width = (vision.patch_size * value for value in crop[2:])
    return whole[top : top + height, left : left + width]


def panel(picture: np.ndarray, grid, kept: torch.Tensor) -> Image.Image:
    """One picture with its kept cells bright and framed."""
    scale = CELL / min(picture.shape[:2])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    bright = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    mask = np.zeros(grid.tokens_per_set, dtype=np.uint8)
    mask[kept.numpy()] = 255
    mask = Image.fromarray(mask.reshape(grid.height, grid.width)).resize(size, Image.Resampling.NEAREST)
    dimmed = Image.fromarray((np.asarray(bright.convert("L").convert("RGB")) * DIMMED).astype(np.uint8))
    result = Image.composite(bright, dimmed, mask)
    draw = ImageDraw.Draw(result)
    for index in kept.tolist():
        row, column = divmod(index, grid.width)
        box = [column * size[0] / grid.width, row * size[1] / grid.height]
        box += [(column + 1) * size[0] / grid.width - 1, (row + 1) * size[1] / grid.height - 1]
        draw.rectangle(box, outline=FRAME)
    return result


def sheet(panels: list, caption: str, columns: int = 4) -> Image.Image:
    """Captioned pictures in rows."""
    font, small = ImageFont.load_default(22), ImageFont.load_default(15)
    columns = min(columns, len(panels))
    width = max(picture.width for _, picture in panels)
    height = max(picture.height for _, picture in panels)
    rows = -(-len(panels) // columns)
    header, label = 54, 24
    canvas = Image.new(
        "RGB",
        (MARGIN + columns * (width + MARGIN), header + rows * (height + label + MARGIN) + MARGIN),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 16), caption, fill=INK, font=font)
    for index, (name, picture) in enumerate(panels):
        x = MARGIN + index % columns * (width + MARGIN)
        y = header + index // columns * (height + label + MARGIN)
        canvas.paste(picture, (x, y + label))
        draw.text((x, y + 3), name, fill=INK, font=small)
    return canvas


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture, of a kind that `PICTURES` names, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format=PICTURES[path.suffix.lower()])
    write_whole(path, buffer.getvalue())
