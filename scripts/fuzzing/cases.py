"""Random prompts for small random models: what they hold, how their tokens are pruned, and what is done with a cache.

A case follows from a seed and its number alone.
"""

from dataclasses import asdict, dataclass
from typing import Optional

import numpy as np
from repository import code_module

WORDS = "what colour is the star ? where which way does it move red blue left right top how many".split()
RATIOS = (0.01, 0.05, 0.1, 0.15, 0.25, 0.3, 0.5, 0.75, 0.9, 0.999, 1.0)
# Keys of the pruning block that a case may set, and to what. Those of a method that refuses them are drawn again.
OPTIONS = {
    "scope": ("frame", "video", "item"),
    "relevance": ("pooled", "projected", "attention", "late_attention", "clip"),
    "relevance_layer": (0, 1),
    "words": ("all", "content"),
    "distance": ("features", "projected"),
    "time_weight": (0.0, 0.25, 5.0),
    "group_time_weight": (0.0, 1.0),
    "proportional_attention": (True, False),
    "merge_weight": (0.0, 0.3, 1.0),
    "positions": ("compact", "original"),
    "alpha": (-1.0, 0.0, 0.5, 2.0, 1e6),
    "candidate_pool": ("all", "algorithm1", "released"),
    "threshold": (-0.2, 0.0, 0.1),
    "max_candidates": (1, 5, 40),
    "query_weighting": ("exponential", "self_attention", "middle_peak", "average", "none"),
    "query_max_tokens": (1, 3, 128),
    "encoder_keep_ratio": (0.3, 0.5, 1.0),
    "video_pooling": (True, False),
    "seed": (0, 1, 2**40),
}
READS_TOWER = ("cdpruner", "trim")  # whose own relevance is "clip" where there is a text tower
TEXT_TOWER = "TEXT_TOWER"  # stands for the folder of a small CLIP checkpoint
# What is done with a cache. Those of `PADDED` take rows of different lengths.
CACHES = (
    "none",
    "dynamic",
    "static",
    "offloaded",
    "beams",
    "crop",
    "second turn",
    "copy",
    "select",
    "repeat",
    "reorder",
    "reset",
)
PADDED = ("none", "dynamic", "static", "beams", "copy", "select", "repeat", "reorder")
SHARE_SET = 0.3  # how often a case sets a key


@dataclass
class Part:
    """A piece of a prompt: some words, or an image or video of random pixels of a seed and (height, width)."""

    kind: str
    text: str = ""
    seed: int = 0
    size: tuple = ()


@dataclass
class Case:
    """
    Attributes:
        pruning: the pruning block.
        keep_ratio: of this call, or `None`.
        rows: the prompts, each a list of `Part`.
        rest: what follows a cache that is used again, a list of `Part`.
        frames: of every video; the processor samples at most four.
        padding_side, attention, weights: of the tokenizer and the model, whose weights have a seed.
        cache: one of `CACHES`.
        new_tokens: generated.
        cut: where a cache is cropped, as a share of the places where that can be done.
    """

    number: int
    pruning: dict
    keep_ratio: Optional[float]
    rows: list
    rest: list
    frames: int
    padding_side: str
    attention: str
    weights: int
    cache: str
    new_tokens: int
    cut: float

    def as_record(self) -> dict:
        return asdict(self)


def draw_case(seed: int, number: int) -> Case:
    rng = np.random.default_rng((seed, number))
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    cache = pick(CACHES)
    num_rows = int(rng.integers(1, 4)) if cache in PADDED else 1
    rows = [_draw_row(rng) for _ in range(num_rows)]
    padding_side = pick(("left", "left", "right")) if num_rows > 1 else "left"
    return Case(
        number=number,
        pruning=_draw_pruning(rng),
        keep_ratio=_draw_ratio(rng) if rng.random() < 0.3 else None,
        rows=rows,
        rest=_draw_row(rng, most_media=1),
        frames=int(rng.integers(1, 7)),
        padding_side=padding_side,
        attention=pick(("sdpa", "sdpa", "eager")),
        weights=int(rng.integers(3)),
        cache=cache,
        new_tokens=int(rng.integers(1, 5)),
        cut=float(rng.random()),
    )


def _draw_ratio(rng) -> float:
    return float(RATIOS[rng.integers(len(RATIOS))]) if rng.random() < 0.7 else float(rng.uniform(0.01, 1))


def _draw_pruning(rng) -> dict:
    """A pruning block that the configuration takes."""
    make = code_module("configuration_rediprune").PruningConfig
    methods = [name for name, method in code_module("methods_registry").METHODS.items() if method.inner is None]
    method = methods[rng.integers(len(methods))]
    while True:
        block = {"method": method, "keep_ratio": _draw_ratio(rng)}
        block |= {key: values[rng.integers(len(values))] for key, values in OPTIONS.items() if rng.random() < SHARE_SET}
        if block.get("relevance") == "clip" or method in READS_TOWER and rng.random() < 0.5:
            block["text_tower"] = TEXT_TOWER
        try:
            make(**block)
        except ValueError:
            continue
        return block


def _draw_row(rng, most_media: int = 3) -> list:
    """Words and media in any order; one in ten rows has no medium, one in ten no word after the last one."""
    row = []
    for _ in range(rng.choice(4, p=(0.1, 0.6, 0.2, 0.1))):
        if rng.random() < 0.6:
            row.append(_draw_words(rng, 5))
        if len(row) < 2 * most_media and sum(part.kind != "text" for part in row) < most_media:
            row.append(_draw_medium(rng))
    if rng.random() < 0.9 or not row:
        row.append(_draw_words(rng, 9))
    return row


def _draw_words(rng, most: int) -> Part:
    return Part("text", text=" ".join(rng.choice(WORDS, rng.integers(1, most))))


def _draw_medium(rng) -> Part:
    kind = "video" if rng.random() < 0.5 else "image"
    size = tuple(int(length) for length in rng.integers(16, 90, 2))
    return Part(kind, seed=int(rng.integers(1000)), size=size)
