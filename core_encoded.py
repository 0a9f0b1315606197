"""Media that were encoded once, for many questions: what the vision encoder made of them, before anything is selected.

They hold what does not depend on the question, the keep ratio or the scope. A reuse is right as long as the encoder would make the
same again, which `identity` tells: the tapped layer, the pooling, the dtype and the weights.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .core_items import MediaItem
from .core_layout import Layout
from .methods_base import TOWER_SIGNALS
from .methods_registry import METHODS

ENCODER_SIGNALS = TOWER_SIGNALS | {"joint"}
SAMPLED_VALUES = 16  # of each weight, for the fingerprint


class EncodedItem(NamedTuple):
    """
    One encoded image or video.

    Attributes:
        layout: its grids of tokens.
        sets: for each grid a `dict` of tensors (sets, L, ...), as in [`MediaItem`].
    """

    layout: Layout
    sets: list


@dataclass(frozen=True)
class EncodedMedia:
    """
    The images, then the videos of one call of `model.encode_media`, in the order of their placeholders.

    Never changed by a use, so that threads can share it.

    Attributes:
        items: tuple of `EncodedItem`.
        identity: what the encoder's output depends on, beside the pixels; see `encoder_identity`.
    """

    items: tuple
    identity: dict

    @property
    def layouts(self) -> list:
        """The `Layout` of every image, then of every video."""
        return [item.layout for item in self.items]

    @property
    def device(self) -> torch.device:
        return self.items[0].sets[0]["features"].device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; an item that is taken several times counts once."""
        tensors = {id(values): values for item in self.items for signals in item.sets for values in signals.values()}
        return sum(values.nbytes for values in tensors.values())

    def to(self, device) -> "EncodedMedia":
        """The same on another device: the CPU for what waits for its next question. Each question moves what it needs back."""
        return replace(self, items=tuple(EncodedItem(item.layout, _moved(item.sets, device)) for item in self.items))

    def take(self, images=(), videos=()) -> "EncodedMedia":
        """Images and videos by their indices, which may repeat: `take(videos=[0, 0])` for a batch of two questions."""
        of_kind = {kind: [item for item in self.items if item.layout.kind == kind] for kind in ("image", "video")}
        chosen = [of_kind["image"][index] for index in images] + [of_kind["video"][index] for index in videos]
        return replace(self, items=tuple(chosen))

    @classmethod
    def join(cls, parts: list) -> "EncodedMedia":
        """
        The media of several calls as those of one: the images of all, then the videos of all.

        Raises:
            ValueError: they were encoded in different ways.
        """
        for part in parts[1:]:
            _check_identity(part.identity, parts[0].identity, "they cannot be joined with others, which have")
        items = [item for part in parts for item in part.items]
        items.sort(key=lambda item: item.layout.kind == "video")
        return cls(tuple(items), parts[0].identity)

    def check(self, identity: dict, signals: frozenset) -> None:
        """
        Refuses a reuse that would not be what encoding again is.

        Args:
            identity: `encoder_identity` of the call.
            signals: those that the method of the call requires of the encoder.

        Raises:
            ValueError: the encoder would make something else, or did not keep a signal.
        """
        mine = dict(self.identity)
        if all(layout.kind == "image" for layout in self.layouts):
            mine.pop("video_pooling")
        if None in (mine["text_tower"], identity["text_tower"]):  # CLIP's joint space is not used, or missing below
            mine.pop("text_tower")
        _check_identity(mine, identity, "this call has")
        held = [of_grid.keys() for item in self.items for of_grid in item.sets]
        missing = sorted(signals & ENCODER_SIGNALS - frozenset.intersection(ENCODER_SIGNALS, *held))
        if missing and not mine["merged"]:
            raise ValueError(
                f"this call needs {', '.join(missing)} of the vision encoder, which the encoded media do not hold; encode them with "
                "model.encode_media(..., methods=[...]), naming every method that is going to be asked."
            )

    def fill(self, items: list, device) -> None:
        """Fills in the sets of every `MediaItem` on a device."""
        for item, encoded in zip(items, self.items):
            item.sets = _moved(encoded.sets, device)


def freeze(items: list, identity: dict, device=None) -> EncodedMedia:
    """`MediaItem`s with their sets as [`EncodedMedia`] that hold no more memory than their tensors, on a device."""

    def kept(item: MediaItem) -> EncodedItem:
        device_ = item.sets[0]["features"].device if device is None else device
        # A view would keep alive all that it is cut from, such as CLS and the other items of the call.
        sets = [
            {name: values.detach().to(device_, copy=True).contiguous() for name, values in signals.items()}
            for signals in item.sets
        ]
        return EncodedItem(item.layout, sets)

    return EncodedMedia(tuple(map(kept, items)), identity)


def signals_of(pruning) -> frozenset:
    """Names of the signals that the method of a pruning block is shown where it prunes."""
    signals = METHODS[pruning.method].required_signals
    return signals | {"joint"} if pruning.compares_in_clip else signals


def encoder_identity(model, pruning, signals, vision_feature_layer=None, vision_feature_select_strategy=None) -> dict:
    """
    What the output of a model's encoder depends on, beside the pixels.

    Args:
        model: with `encoder_modules`, `frame_size` and `config`.
        pruning: the `PruningConfig` of the call.
        signals: names of those that the encoder is asked for.
        vision_feature_layer, vision_feature_select_strategy: of the call, instead of the config's.
    """
    config, modules = model.config, model.encoder_modules()
    merges = pruning.prunes and METHODS[pruning.method].merges_in_encoder
    layer = vision_feature_layer if vision_feature_layer is not None else getattr(config, "vision_feature_layer", None)
    strategy = vision_feature_select_strategy or getattr(config, "vision_feature_select_strategy", None)
    merging = ("method", "keep_ratio", "keep_tokens", "encoder_keep_ratio")
    return {
        "model_type": config.model_type,
        "vision_feature_layer": list(layer) if isinstance(layer, (list, tuple)) else layer,
        "vision_feature_select_strategy": strategy,
        "frame_size": tuple(model.frame_size),
        "video_pooling": pruning.video_pooling,
        "dtype": next(modules[0].parameters()).dtype,
        "text_tower": pruning.text_tower if "joint" in signals else None,
        "merged": {key: getattr(pruning, key) for key in merging} if merges else None,
        "weights": weights_fingerprint(modules),
    }


@torch.no_grad()
def weights_fingerprint(modules: list) -> str:
    """
    A hash of names, shapes and `SAMPLED_VALUES` values, spread evenly, of every weight of some modules.

    The same in every process. It notices another checkpoint, training and adapters, which change all values of a weight, but not
    somebody who writes into a few of them by hand. Weights that are offloaded from the device, and there have no values, count
    by their names and shapes alone.
    """
    digest, samples = hashlib.sha256(), []
    for module in modules:
        for name, weight in module.named_parameters():
            weight = weight.to_local() if hasattr(weight, "to_local") else weight
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if weight.device.type != "meta" and weight.numel():
                values = weight.detach().flatten()
                samples.append(values[:: max(1, len(values) // SAMPLED_VALUES)][:SAMPLED_VALUES].double())
    for device in sorted({values.device for values in samples}, key=str):
        on_device = torch.cat([values for values in samples if values.device == device])
        digest.update(on_device.cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_identity(encoded: dict, other: dict, what: str) -> None:
    for key, value in encoded.items():
        if other[key] != value:
            shown = f"other {key}" if key == "weights" else f"{key}={other[key]!r}"
            mine = "other weights" if key == "weights" else f"{key}={value!r}"
            raise ValueError(
                f"the encoded media were made with {mine}, but {what} {shown}; encode them again with model.encode_media(...)."
            )


def _moved(sets: list, device) -> list:
    return [{name: values.to(device) for name, values in signals.items()} for signals in sets]
