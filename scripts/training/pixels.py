"""Preprocessing, the same here and in the processor files that are exported."""

import numpy as np
import torch
from PIL import Image
from toy_world import FRAME_SIZE, PATCH_SIZE, Scene
from transformers import LlavaNextImageProcessor

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
GRID_PINPOINTS = [[FRAME_SIZE, 2 * FRAME_SIZE], [2 * FRAME_SIZE, FRAME_SIZE]]
GRID = FRAME_SIZE // PATCH_SIZE  # patches per side of a view


def frames_to_pixels(frames: np.ndarray) -> torch.Tensor:
    """Frames, uint8 (N, H, W, 3), as the stock video processors give them: float32 (N, 3, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels - mean) / std


def build_image_processor() -> LlavaNextImageProcessor:
    return LlavaNextImageProcessor(
        size={"shortest_edge": FRAME_SIZE},
        crop_size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        image_grid_pinpoints=GRID_PINPOINTS,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_pad=True,
    )


def image_to_pixels(processor: LlavaNextImageProcessor, scene: Scene) -> torch.Tensor:
    """The views of an image scene: float32 (3, 3, 96, 96), the base view and two tiles."""
    return processor(Image.fromarray(scene.frames[0]), return_tensors="pt")["pixel_values"][0]


def view_maps(objects: np.ndarray) -> list[np.ndarray]:
    """The object maps (see `toy_world.object_map`) of an image's views, in the order of `image_to_pixels`."""
    base = Image.fromarray(objects).resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.NEAREST)
    if objects.shape == (FRAME_SIZE, FRAME_SIZE):  # a square image is centred in a wide pair of tiles
        objects = np.pad(objects, ((0, 0), (FRAME_SIZE // 2, FRAME_SIZE // 2)))
    rows, columns = range(0, objects.shape[0], FRAME_SIZE), range(0, objects.shape[1], FRAME_SIZE)
    return [np.asarray(base), *(objects[i : i + FRAME_SIZE, j : j + FRAME_SIZE] for i in rows for j in columns)]


def stack_frames(scenes: list[Scene]) -> np.ndarray:
    """All frames of scenes of one size, one after the other: uint8 (N, H, W, 3)."""
    return np.concatenate([scene.frames for scene in scenes])
