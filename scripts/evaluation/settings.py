"""Pruning settings as the evaluations take them: a method and, after commas, changes to the pruning block."""

import argparse
from dataclasses import dataclass, replace

from repository import code_module, parse_setting

UNPRUNED = "unpruned"
QUERIES = ("own", "other", "constant")


@dataclass
class Setting:
    """A pruning setting as it was asked for: its text, the changes to the pruning block, and what is selected for."""

    text: str
    changes: dict
    query: str = "own"
    may_be_refused: bool = False  # then a model that refuses it goes without it

    @property
    def seeded(self) -> bool:
        """Whether it runs once for each of `--seeds`."""
        method = self.changes.get("method")
        drawn = self.query == "other" or method is not None and "seeds" in _methods()[method].required_signals
        return drawn and "seed" not in self.changes

    @property
    def takes_ratio(self) -> bool:
        """Whether it runs once for each of `--ratios`."""
        return "keep_tokens" not in self.changes and _block(self.changes).takes_ratio

    def ratio_of_call(self, ratio: float):
        """The keep ratio that the processor is called with: none where the setting has a budget in tokens, or needs none."""
        return ratio if self.takes_ratio else None

    def with_seed(self, seed: int) -> "Setting":
        return replace(self, text=f"{self.text},seed={seed}", changes={**self.changes, "seed": seed})


def _block(changes: dict):
    return code_module("configuration_rediprune").PruningConfig.from_value(changes)


def _methods() -> dict:
    return code_module("methods_registry").METHODS


def as_setting(text: str) -> Setting:
    """`"rediprune,alpha=2"` -> a `Setting`."""
    changes = parse_setting(text)
    query = changes.pop("query", "own")
    if query not in QUERIES:
        raise argparse.ArgumentTypeError(f"{text!r}: query is {query!r}, but must be one of {', '.join(QUERIES)}")
    try:
        block = _block(changes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    reads = (
        _methods()[block.method].required_signals & {"relevance", "text_affinity"} and block.query_weighting != "none"
    )
    if query != "own" and not reads:
        raise argparse.ArgumentTypeError(
            f"{text!r}: this setting does not look at the question; leave query={query} out"
        )
    return Setting(text, changes, query)
