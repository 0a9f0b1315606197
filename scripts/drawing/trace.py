"""What a method keeps of a medium at every keep ratio of a grid, in which order, and what it looks at while it chooses."""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Optional

import numpy as np
import torch
from drawing.pictures import PIXELS, patches_of, pictures_of, pixels_of
from media import chat_prompt, process
from repository import code_module

# What a method may look at, beside the features themselves, and how a caption calls it; of several the first is shown.
LOOKS = {
    "relevance": "relevance to the question",
    "text_affinity": "closeness to the question's words",
    "last_cls_attention": "attention of CLS, last layer",
    "last_attention": "attention received, last layer",
    "cls_attention": "attention of CLS",
}


@dataclass
class Panel:
    """A picture that stands for one set of tokens: a frame, a base view, the tiles of an image."""

    label: str
    picture: np.ndarray  # uint8 (height, width, 3)


@dataclass
class Trace:
    """
    One question and one method through all keep ratios. Tokens are counted through all panels, in raster order in each;
    those without a place in a picture, such as CLS, count in `counts` alone.

    Attributes:
        question, setting: what was asked, and the method with its changes to the pruning block.
        pruning: the whole pruning block, as a dictionary.
        grids: (height, width) in tokens of each panel.
        joint: whether all panels of a medium are one set.
        medium_of: for each panel the medium it belongs to.
        ratios: the keep ratios, ascending, the last one 1.
        counts: (R,) tokens that go on at each ratio.
        masks: (R, tokens) bool, the places that have a token at each ratio.
        look: (tokens,) what the method compared the tokens by, `None` where it looks at the features alone.
        look_name: the name of that in `LOOKS`.
    """

    question: str
    setting: str
    pruning: dict
    grids: list
    joint: bool
    medium_of: list
    ratios: list
    counts: np.ndarray
    masks: np.ndarray
    look: Optional[np.ndarray] = None
    look_name: Optional[str] = None

    @property
    def num_tokens(self) -> int:
        return self.masks.shape[1]

    @cached_property
    def panel_slices(self) -> list:
        ends = np.cumsum([height * width for height, width in self.grids]).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends)]

    @cached_property
    def set_slices(self) -> list:
        """The tokens that compete with one another."""
        if not self.joint:
            return self.panel_slices
        panels = [
            [part for part, owner in zip(self.panel_slices, self.medium_of) if owner == medium]
            for medium in dict.fromkeys(self.medium_of)
        ]
        return [slice(parts[0].start, parts[-1].stop) for parts in panels]

    @cached_property
    def entry(self) -> np.ndarray:
        """(tokens,) the step of `ratios` at which a token first stays."""
        return self.masks.argmax(0)

    @cached_property
    def nested(self) -> bool:
        """Whether what stays at a ratio also stays at every larger one."""
        return bool((self.masks[:-1] <= self.masks[1:]).all())

    @cached_property
    def exact(self) -> bool:
        """Whether `rank` is the order of the picks: choices are nested, and none of the steps adds two tokens to a set."""
        sizes = np.stack([self.masks[:, part].sum(1) for part in self.set_slices], axis=1)
        return self.nested and bool((sizes[0] <= 1).all() and (np.diff(sizes, axis=0) <= 1).all())

    @cached_property
    def rank(self) -> np.ndarray:
        """(tokens,) from 1, in its set: one more than the tokens that first stay at a smaller ratio."""
        rank = np.empty(self.num_tokens, dtype=int)
        for part in self.set_slices:
            rank[part] = 1 + (self.entry[part][:, None] > self.entry[part]).sum(1)
        return rank

    def step(self, ratio: float) -> int:
        return self.ratios.index(ratio)


class PreparedMedia:
    """The media of all questions: decoded, preprocessed and encoded once."""

    def __init__(self, args, model, processor, media: dict):
        self.model, self.processor, self.media = model, processor, media
        inputs = process(args, processor, media, "?", keep_ratio=1.0, return_metadata=True)
        names = (*sum(PIXELS.values(), ()), "image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw")
        self.metadata = inputs.get("video_metadata")
        self.pixels = {name: inputs[name] for name in names if name in inputs}
        self.on_device = {
            name: values.to(model.device, model.dtype if values.is_floating_point() else None)
            for name, values in self.pixels.items()
        }

    def inputs(self, question: str, pruning) -> dict:
        """What the processor would return for the question under `pruning`, without reading the media again."""
        caller = copy.copy(self.processor)
        caller.pruning = pruning
        kind, expand = "video", caller.replace_video_token
        if "images" in self.media:
            kind, expand = "image", caller.replace_image_token
        token = getattr(self.processor, f"{kind}_token")
        number_of_media = len(self.media[f"{kind}s"])
        numbers = iter(range(number_of_media))
        prompt = chat_prompt(self.processor, self.media, question)
        read = {name: values.to(self.model.device) for name, values in caller.question_inputs([prompt]).items()}
        prompt = re.sub(
            caller.written(kind) if code_module("hub_versions").TRANSFORMERS_4 else re.escape(token),
            lambda match: expand({**self.pixels, "video_metadata": self.metadata}, next(numbers)),
            prompt,
            count=number_of_media,
        )
        tokens = self.processor.tokenizer([prompt], return_tensors="pt").to(self.model.device)
        return {**tokens, **read, **self.on_device, "keep_ratio": pruning.keep_ratio}

    def panels(self) -> list:
        """The pictures as the model sees them."""
        get = self.pixels.get
        sizes = code_module("core_layout").sizes_of_tiled(get("image_sizes"), get("batch_num_images"))
        sizes = code_module("core_items").MediaSizes(sizes, get("image_grid_thw"), get("video_grid_thw"))
        layouts = self.model.layouts_of(pixels_of(self.pixels), sizes, self.processor.pruning)
        of_items = pictures_of(self.model, self.processor, self.pixels, layouts)
        return [Panel(label, picture) for pictures in of_items for label, picture in pictures]


def ratio_grid(model, prepared: PreparedMedia, pruning, asked, max_steps: int) -> list:
    """The ratios that are asked for, and one for each count of the largest set of tokens, but at most `max_steps`."""
    inputs = prepared.inputs("?", pruning.with_budget(1.0))
    model.config.pruning = pruning
    pruned = pruning.with_budget(asked[0])
    items = model.select_tokens(**inputs)
    steps = min(max_steps, max(size for item in items for _, size in item.layout.sets(pruned)))
    return sorted({*asked, *((step + 1) / steps for step in range(steps))})


def trace(model, prepared: PreparedMedia, question: str, setting: str, pruning, ratios) -> Trace:
    """Selects at every ratio. The vision tower is asked once where the model remembers what it gave (`FeatureMemory`)."""
    model.config.pruning = pruning
    counts, masks, look, look_name = [], [], None, None
    for ratio in ratios:
        block = pruning.with_budget(ratio)
        items = model.select_tokens(**prepared.inputs(question, block), return_signals=True)
        if look is None:
            look, look_name = looked_at(items)
        counts.append(sum(len(item.kept) for item in items))
        patches = [torch.cat(patches_of(item.layout)) for item in items]
        masks.append(np.concatenate([np.isin(of_item, item.kept.cpu()) for of_item, item in zip(patches, items)]))
    grids = [
        (number, grid) for number, item in enumerate(items) for grid in item.layout.grids for _ in range(grid.frames)
    ]
    return Trace(
        question=question,
        setting=setting,
        pruning=pruning.to_dict(),
        grids=[(grid.height, grid.width) for _, grid in grids],
        joint=items[0].layout.shares_budget(pruning.with_budget(ratios[0])),
        medium_of=[number for number, _ in grids],
        ratios=list(ratios),
        counts=np.array(counts),
        masks=np.stack(masks),
        look=look,
        look_name=look_name,
    )


def looked_at(items) -> tuple:
    """
    What a method compared the tokens by, in the order of the tokens, and its name; (`None`, `None`) where it was the features
    alone, or tokens that the encoder had merged.

    Args:
        items: what was selected, with signals.
    """
    parts, names = [], set()
    for item in items:
        of_item = []
        for signals, tokens in zip(item.sets, item.signals):
            if tokens is None or "source_indices" in signals:
                return None, None
            name = next((name for name in LOOKS if getattr(tokens, name) is not None), None)
            if name is None:
                return None, None
            values = getattr(tokens, name)
            of_item.append((values.sum(1) if name == "text_affinity" else values).float().cpu().flatten())
            names.add(name)
        parts.append(torch.cat(of_item)[torch.cat(patches_of(item.layout))])
    return torch.cat(parts).numpy(), names.pop()
