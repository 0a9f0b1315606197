"""From pixels to the sets of tokens of every image and video, one encoder for each family.

An encoder lives as long as one call: it is handed the model, and hands its output on in the items.
"""

import itertools
from collections import defaultdict

import torch
import torch.nn.functional as F

from .core_layout import split_budget
from .core_positions import pooled_places
from .methods_registry import METHODS
from .ops_tokens import in_raster_order
from .vision_clip import encode_and_merge


class LlavaEncoder:
    """
    LLaVA-1.5: each image is one view.

    Args:
        model: the model, with `patch_features`, `tower_of`, `joint_space`, `frame_size` and `config`.
        pruning: the `PruningConfig` of the call.
        signals: names of what to add to the features, where the encoder can tell it.
        vision_feature_layer, vision_feature_select_strategy: instead of the config's.
    """

    def __init__(
        self, model, pruning, signals=frozenset(), vision_feature_layer=None, vision_feature_select_strategy=None
    ):
        self.model, self.pruning, self.signals, self.frame = model, pruning, signals, model.frame_size
        self.method = METHODS[pruning.method]
        self.layer, self.strategy = vision_feature_layer, vision_feature_select_strategy

    def encode(self, items: list, pixels: dict) -> None:
        """
        Fills in the sets of every item.

        Args:
            items: images, then videos.
            pixels: for each kind the pixels of its items; `None` where there are none.

        Raises:
            ValueError: the tower's output cannot be pruned: it is not one of patches, or there is no layer to merge in.
        """
        images, videos = ([item for item in items if item.kind == kind] for kind in ("image", "video"))
        merges = self.pruning.prunes and self.method.merges_in_encoder
        if images:
            (self.merge_images if merges else self.encode_images)(images, pixels["image"])
        if videos:
            (self.merge_videos if merges else self.encode_videos)(videos, pixels["video"])

    def encode_images(self, images: list, pixels: torch.Tensor) -> None:
        """`pixels`: (images, 3, height, width)."""
        signals = self.patch_signals(pixels, "image")
        for index, item in enumerate(images):
            item.sets = [_map(signals, lambda values: values[index : index + 1])]

    def merge_images(self, images: list, pixels: torch.Tensor) -> None:
        num_tokens = images[0].layout.num_tokens
        num_kept = self._count_in_encoder(num_tokens, num_tokens)
        tower, _ = self.model.tower_of("image")
        found = encode_and_merge(tower, pixels, self._layers_to_run(), num_kept)
        for item, features, source_indices in zip(images, *(values.split(1) for values in found)):
            item.sets = [{"features": features, "source_indices": source_indices}]

    def patch_signals(self, pixels: torch.Tensor, kind: str) -> dict:
        """Features and signals of the patches of N pictures (N, 3, height, width), each (N, P, ...)."""
        options = {"vision_feature_layer": self.layer, "vision_feature_select_strategy": self.strategy}
        signals = self.model.patch_features(pixels, self.signals, kind=kind, **options)
        if "joint" in self.signals:
            width = self.model.config.vision_config.hidden_size  # of several tapped layers the last
            signals["joint"] = self.model.joint_space().place_tokens(signals["features"][..., -width:])
        return signals

    def _count_in_encoder(self, num_patches: int, num_tokens: int) -> int:
        """How many of a set's patches leave the tower, where `num_tokens` would be there if nothing were pruned."""
        if num_tokens == 0:
            return 0
        return self.method.count_in_encoder(num_patches, self.pruning.count(num_tokens), self.pruning)

    def _layers_to_run(self) -> int:
        """How many layers of the vision tower run before the tapped features, for merging inside it."""
        config = self.model.config
        layer = config.vision_feature_layer if self.layer is None else self.layer
        number = layer % (config.vision_config.num_hidden_layers + 1) if isinstance(layer, int) else 0
        if number == 0:
            raise ValueError(
                f"method={self.pruning.method!r} merges tokens inside the vision tower and needs the output of one of its "
                f"layers, but vision_feature_layer is {layer!r}; choose another method, or a layer such as -2."
            )
        return number


class LlavaNextEncoder(LlavaEncoder):
    """LLaVA-NeXT: each image is a base view and tiles, whose patches are put together and cut to the image."""

    def encode_images(self, images, pixels):
        views = self._views_of_images(images, pixels)
        signals = self.patch_signals(torch.cat(views), "image")
        ends = itertools.accumulate(len(views_) for views_ in views)
        for item, views_, end in zip(images, views, ends):
            start = end - len(views_)
            item.sets = self.sets_of_image(item.layout, _map(signals, lambda values: values[start:end]))

    def sets_of_image(self, layout, signals: dict) -> list:
        """The sets of an image from the signals of its views (1 + tiles, P, ...), the base view first."""
        base = _map(signals, lambda values: values[:1])
        return [base, _map(signals, lambda values: _cropped_tiles(values[1:], layout.crop, self.frame.side))]

    def merge_images(self, images, pixels):
        """Each tile merges down to its part of the budget, and leaves out the patches of its padding."""
        num_patches, device = self.frame.side**2, pixels.device
        everything = torch.arange(num_patches, device=device)
        by_size, found = defaultdict(list), {}
        views = self._views_of_images(images, pixels)
        places = [_places_of_patches(item.layout.crop, self.frame.side).to(device) for item in images]
        for image, (item, views_) in enumerate(zip(images, views)):
            inside = [everything] + [(tile >= 0).nonzero()[:, 0] for tile in places[image]]
            sizes = [grid.tokens_per_set for grid in item.layout.grids]
            counts = [self._count_in_encoder(size, size) for size in sizes]
            budgets = [counts[0], *split_budget(counts[1], [len(patches) for patches in inside[1:]])]
            for view, (pixels_, patches, budget) in enumerate(zip(views_, inside, budgets)):
                if budget:
                    by_size[len(patches), budget].append((image, view, pixels_, patches))
        tower, num_layers = self.model.tower_of("image")[0], self._layers_to_run()
        for (_, budget), group in by_size.items():
            group_pixels, inside = (torch.stack([job[field] for job in group]) for field in (2, 3))
            merged = encode_and_merge(tower, group_pixels, num_layers, budget, inside)
            for (image, view, *_), features, indices in zip(group, *merged):
                found[image, view] = features, indices if view == 0 else places[image][view - 1, indices]
        for image, item in enumerate(images):
            base = found[image, 0]
            tiles = [found[image, view] for view in range(1, len(views[image])) if (image, view) in found]
            features = torch.cat([base[0][:0], *(part for part, _ in tiles)])[None]
            indices = torch.cat([base[1][:0], *(part for _, part in tiles)])[None]
            features, indices = in_raster_order(features, indices)
            item.sets = [
                {"features": base[0][None], "source_indices": base[1][None]},
                {"features": features, "source_indices": indices},
            ]

    def _views_of_images(self, images, pixels) -> list:
        """For each image its views (1 + tiles, 3, height, width), the base view first."""
        crops = [item.layout.crop for item in images]
        numbers = [1 if crop is None else 1 + crop.rows * crop.columns for crop in crops]
        if pixels.dim() == 5:  # (images, views, 3, height, width), padded to the largest number of views
            return [views[:number] for views, number in zip(pixels, numbers)]
        return list(pixels.split(numbers))


class LlavaNextVideoEncoder(LlavaNextEncoder):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT; the frames of a video are pooled, unless `video_pooling` is off."""

    def encode_videos(self, videos: list, pixels: torch.Tensor) -> None:
        """`pixels`: (videos, frames, 3, height, width)."""
        signals = self.patch_signals(pixels.flatten(0, 1), "video")
        if self.pruning.video_pooling:
            features = self.model.model.vision_resampler(signals.pop("features"))
            signals = {"features": features, **_map(signals, self._pool)}
        for index, item in enumerate(videos):
            item.sets = [_map(signals, lambda values: values.chunk(len(videos))[index])]

    def merge_videos(self, videos: list, pixels: torch.Tensor) -> None:
        side, grid = self.frame.side, videos[0].layout.grids[0]
        num_kept = self._count_in_encoder(side**2, grid.tokens_per_set)
        tower, _ = self.model.tower_of("video")
        features, indices = encode_and_merge(tower, pixels.flatten(0, 1), self._layers_to_run(), num_kept)
        if self.pruning.video_pooling:
            places = pooled_places(indices, side, self.frame.pool_stride)
            features, indices = in_raster_order(features, places)
        for item, features, indices in zip(videos, features.chunk(len(videos)), indices.chunk(len(videos))):
            item.sets = [{"features": features, "source_indices": indices}]

    def _pool(self, values: torch.Tensor) -> torch.Tensor:
        """Signals of patches (N, P, D), averaged over the patches that a feature is pooled from."""
        grid = values.mT.unflatten(2, (self.frame.side, self.frame.side))
        return F.avg_pool2d(grid, self.frame.pool_stride).flatten(2).mT


class VideoLlavaEncoder(LlavaEncoder):
    """Video-LLaVA: images as LLaVA-1.5; a tower of its own for videos, whose CLS is a token of each frame."""

    def encode_videos(self, videos: list, pixels: torch.Tensor) -> None:
        """`pixels`: (videos, frames, 3, height, width)."""
        signals = self.patch_signals(pixels.flatten(0, 1), "video")
        for index, item in enumerate(videos):
            item.sets = [_map(signals, lambda values: values.chunk(len(videos))[index])]


class LlavaOnevisionEncoder(LlavaNextEncoder):
    """
    LLaVA-OneVision: images as LLaVA-NeXT, or one view. It pools projected tokens, and its projector, an MLP, does not commute
    with that: the frames of a video, unless `video_pooling` is off, and an image whose tiles are shrunk come projected.
    """

    def sets_of_image(self, layout, signals):
        if layout.crop is None:
            return [signals]
        if not layout.projected:
            return super().sets_of_image(layout, signals)
        signals["features"] = self.model.model.multi_modal_projector(signals["features"])

        def shrunk(values: torch.Tensor) -> torch.Tensor:
            tiles = _cropped_tiles(values[1:], layout.crop, self.frame.side)
            tiles = tiles.mT.unflatten(2, (layout.crop.height, layout.crop.width))
            return F.interpolate(tiles, layout.grids[-1][1:3], mode="bilinear").flatten(2).mT

        return [_map(signals, lambda values: values[:1]), _map(signals, shrunk)]

    def encode_videos(self, videos: list, pixels: torch.Tensor) -> None:
        """`pixels`: (videos, frames, 3, height, width)."""
        signals = self.patch_signals(pixels.flatten(0, 1), "video")
        if self.pruning.video_pooling:
            model = self.model.model
            signals["features"] = model.multi_modal_projector(signals["features"])
            signals = _map(signals, model.apply_pooling)
        for index, item in enumerate(videos):
            item.sets = [_map(signals, lambda values: values.chunk(len(videos))[index])]


def _cropped_tiles(values: torch.Tensor, crop, side: int) -> torch.Tensor:
    """Values of the patches of an image's tiles (tiles, P, D), in the raster order of the image: (1, L, D)."""
    tiles = values.unflatten(0, (crop.rows, crop.columns)).unflatten(2, (side, side))
    tiles = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # rows and columns of the whole image
    tiles = tiles[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return tiles.flatten(0, 1)[None]


def _places_of_patches(crop, side: int) -> torch.LongTensor:
    """For each patch of an image's tiles (tiles, P) its index among the unpadded ones in raster order, -1 for padding."""
    shape = (crop.rows * crop.columns, side**2)
    numbers = torch.arange(shape[0] * shape[1]).view(*shape, 1)
    unpadded = _cropped_tiles(numbers, crop, side).flatten()
    places = torch.full((numbers.numel(),), -1).scatter_(0, unpadded, torch.arange(len(unpadded)))
    return places.view(shape)


def _map(signals: dict, function) -> dict:
    return {name: function(values) for name, values in signals.items()}
