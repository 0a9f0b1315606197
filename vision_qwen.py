"""Qwen vision towers: tokens behind the merger of patches, in raster order, and the DeepStack features that belong to them."""

import torch

from .core_items import MediaSizes, check_pixels
from .core_layout import PatchSize
from .hub_versions import merged_patches
from .vision_encoders import LlavaEncoder


class QwenEncoder(LlavaEncoder):
    """Images and videos go through one tower, which merges squares of patches and puts windows back in order."""

    def encode_images(self, images: list, pixels: torch.Tensor) -> None:
        """`pixels`: (patches of all items, pixels of a patch)."""
        visual, merge_size = self.model.model.visual, self.frame.merge_size
        grids = [[frames, height * merge_size, width * merge_size] for (frames, height, width, _) in map(_grid, images)]
        grids = torch.tensor(grids, device=pixels.device)
        features, companions = merged_patches(visual(pixels.type(visual.dtype), grid_thw=grids))
        numbers = [item.layout.num_tokens for item in images]
        signals = {"features": features, **({"companions": torch.stack(companions, dim=1)} if companions else {})}
        of_items = zip(*(values.split(numbers) for values in signals.values()))
        for item, parts in zip(images, of_items):
            frames = _grid(item).frames
            item.sets = [{name: part.unflatten(0, (frames, -1)) for name, part in zip(signals, parts)}]

    def encode_videos(self, videos: list, pixels: torch.Tensor) -> None:
        """As `encode_images`."""
        self.encode_images(videos, pixels)


def _grid(item):
    (grid,) = item.layout.grids
    return grid


class QwenMediaMixin:
    """For model classes, before `MediaStagesMixin`: media of any size, as flat patches beside their grids."""

    @property
    def frame_size(self) -> PatchSize:
        return PatchSize(self.config.vision_config.spatial_merge_size)

    def tower_of(self, kind: str) -> tuple:
        """The tower of all media; it has no CLS."""
        return self.model.visual, False

    def layouts_of(self, pixels, sizes, pruning, encoded=None):
        if encoded is not None:
            return encoded.layouts
        images, videos = (
            [] if grids is None else grids.tolist() for grids in (sizes.image_grid_thw, sizes.video_grid_thw)
        )
        seconds = (
            [None] * len(videos)
            if sizes.second_per_grid_ts is None
            else [float(value) for value in sizes.second_per_grid_ts]
        )
        layouts = [self.layout_class.image(self.frame_size, grid) for grid in images if pixels["image"] is not None]
        if pixels["video"] is not None:
            layouts += [self.layout_class.video(self.frame_size, *of_video) for of_video in zip(videos, seconds)]
        return layouts

    def check_media(self, pixels: dict, sizes: MediaSizes) -> None:
        """Raises ValueError where pixels are not finite, or the grids are not theirs."""
        for kind, grids in (("image", sizes.image_grid_thw), ("video", sizes.video_grid_thw)):
            patches = pixels[kind]
            if patches is None:
                continue
            numbers = None if grids is None else grids.prod(1).tolist()
            if numbers is None or sum(numbers) != len(patches):
                raise ValueError(
                    f"{len(patches)} patches of {kind}s were passed, but {kind}_grid_thw, which tells how they lie, "
                    f"{'is missing' if numbers is None else f'has {sum(numbers)}'}; pass all that the processor returned."
                )
            check_pixels({kind: patches.split(numbers)})

    def stock_pixels(self, pixels, sizes) -> dict:
        given = {"pixel_values": pixels["image"], "pixel_values_videos": pixels["video"], **sizes._asdict()}
        given.pop("second_per_grid_ts")  # which tells positions, and those are given
        return {name: values for name, values in given.items() if values is not None}
