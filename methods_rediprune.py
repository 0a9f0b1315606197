"""The pruning methods: small units that say how many tokens of a set stay and which ones.

A method knows tensors and its parameters, nothing of the model that calls it. To add one: write a subclass of `Method`,
give it a line in `METHODS`, and add its name to the tests' list.
"""

from dataclasses import dataclass
from typing import Optional

import torch

from .selection_rediprune import count_kept, select_random, select_rediprune, select_uniform


@dataclass
class VisualTokens:
    """
    What a method may look at: N sets (frames, image views) of L tokens.

    Attributes:
        features: (N, L, C) raw features of the tapped vision layer, any floating dtype.
        query: (N, C) fp32 query vector of the sample that each set belongs to; `None` when text is not used.
        seeds: N integers, one for each set, that depend on the sample alone and not on what else is in the batch.
    """

    features: torch.Tensor
    query: Optional[torch.Tensor] = None
    seeds: Optional[list] = None


class Method:
    """Base of the methods that select: `count` says how many tokens stay, `select` says which."""

    needs = frozenset()  # of "query", "seeds": what `VisualTokens` must hold beside the features

    def count(self, num_tokens: int, pruning) -> int:
        """Tokens that stay of a set of `num_tokens`. The processor and the model both ask here."""
        return count_kept(num_tokens, pruning.keep_ratio)

    def select(self, tokens: VisualTokens, num_kept: int, pruning) -> torch.LongTensor:
        """Indices (N, num_kept), ascending in each row."""
        raise NotImplementedError


class ReDiPrune(Method):
    """Relevance plus max-min diversity, greedily (arXiv 2603.24680, §3 and Algorithm 1)."""

    needs = frozenset({"query"})

    def select(self, tokens, num_kept, pruning):
        return select_rediprune(
            tokens.features,
            tokens.query,
            num_kept,
            alpha=pruning.alpha,
            threshold=pruning.threshold,
            candidate_pool=pruning.candidate_pool,
            max_candidates=pruning.max_candidates,
        )


class Random(Method):
    """Control: a uniform draw without replacement, seeded for each set."""

    needs = frozenset({"seeds"})

    def select(self, tokens, num_kept, pruning):
        num_tokens = tokens.features.shape[1]
        return select_random(num_tokens, num_kept, tokens.seeds).to(tokens.features.device)


class Uniform(Method):
    """Control: evenly spaced tokens in raster order."""

    def select(self, tokens, num_kept, pruning):
        num_sets, num_tokens = tokens.features.shape[:2]
        kept = select_uniform(num_tokens, num_kept).to(tokens.features.device)
        return kept.expand(num_sets, -1)


class NoPruning(Method):
    """Every token stays: the stock model."""

    def count(self, num_tokens, pruning):
        return num_tokens


METHODS = {
    "rediprune": ReDiPrune(),
    "random": Random(),
    "uniform": Uniform(),
    "none": NoPruning(),
}
