"""Pictures of what was kept: frames and image views with the kept patches bright and the rest dimmed."""

import io
from pathlib import Path

import numpy as np
import torch
from drawing.pictures import patches_of, pictures_of
from PIL import Image, ImageDraw, ImageFont
from writing import PICTURES, write_whole

CELL = 240  # side of one frame in the picture, pixels
MARGIN = 14
BACKGROUND, INK, FRAME = (18, 20, 26), (235, 238, 245), (255, 196, 61)
DIMMED = 0.22


def draw_overlay(model, processor, inputs, caption: str, path: Path) -> None:
    """Writes a contact sheet of the media in `inputs`, with what `model` keeps of them.

    Args:
        inputs: what the processor returned.
        caption: a line above the pictures.
        path: the picture's file.
    """
    with torch.inference_mode():
        items = model.select_tokens(**inputs)
    panels = []
    of_items = pictures_of(model, processor, inputs, [item.layout for item in items])
    for item, pictures in zip(items, of_items):
        grids = [grid for grid in item.layout.grids for _ in range(grid.frames)]
        for (label, picture), grid, patches in zip(pictures, grids, patches_of(item.layout)):
            if picture.size:
                panels.append((label, panel(picture, grid, torch.isin(patches, item.kept.cpu()))))
    save(sheet(panels, caption), path)


def panel(picture: np.ndarray, grid, kept: torch.Tensor) -> Image.Image:
    """One picture with its kept cells, true in (height * width,) bool, bright and framed."""
    scale = CELL / min(picture.shape[:2])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    bright = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    mask = 255 * kept.numpy().astype(np.uint8).reshape(grid.height, grid.width)
    mask = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    dimmed = Image.fromarray((np.asarray(bright.convert("L").convert("RGB")) * DIMMED).astype(np.uint8))
    result = Image.composite(bright, dimmed, mask)
    draw = ImageDraw.Draw(result)
    for index in kept.nonzero()[:, 0].tolist():
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
