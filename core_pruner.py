"""From the vision encoder's output to the tokens that stay: sets of one size are pruned together, in one call of the method."""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable

import torch

from .core_encoded import ENCODER_SIGNALS, signals_of
from .core_question import Question, seeds_of_sets
from .methods_base import VisualTokens
from .methods_registry import METHODS
from .ops_query import align_query, build_query, cosine_relevance
from .ops_relevance import (
    LATE_LAYERS,
    attention_affinity,
    attention_relevance,
    clip_relevance,
    late_attention,
    read_by_layers,
    read_question,
    spread_relevance,
    stack_affinity,
    word_affinity,
)
from .ops_tokens import group_means, group_sizes, nearest_kept


@dataclass
class Pruner:
    """
    Prunes the items of a prompt as a pruning block says.

    Attributes:
        pruning: the `PruningConfig` of the call.
        project: the model's projector, (..., C) -> (..., H).
        place_tokens: features in CLIP's joint space, for `relevance="clip"`.
        language_model: a decoder with `layers`, for `relevance="attention"`.
        largest_of_heads: of affinities that are the largest of this process's heads, those of all heads.
        sum_of_heads: the same of those that are their sum.
    """

    pruning: object
    project: Callable
    place_tokens: Callable
    language_model: torch.nn.Module
    largest_of_heads: Callable
    sum_of_heads: Callable

    @property
    def method(self):
        return METHODS[self.pruning.method]

    def __call__(self, items: list, question: Question, keep_signals: bool = False) -> None:
        """Fills in `kept`, `tokens` and `token_sizes` of the items, and with `keep_signals` the signals that the method was shown."""
        weighs = self.pruning.prunes and self.pruning.resolved("proportional_attention")
        words = self._words(question)
        seeds = None
        if "seeds" in self.method.required_signals:
            seeds = seeds_of_sets(question, items, self.pruning)
        by_size, results = defaultdict(list), {}
        sets = {id(item): arranged_sets(item, self.pruning) for item in items}
        for item in items:
            for index, (_, grid) in enumerate(item.layout.set_grids(self.pruning)):
                num_tokens = sets[id(item)][index]["features"].shape[1]
                by_size[num_tokens, self.pruning.count_in_grid(grid), grid, item.layout.projected].append((item, index))
        for (_, num_kept, grid, projected), group in by_size.items():
            signals = concatenate([sets[id(item)][index] for item, index in group])
            if projected:
                signals["projected"] = signals["features"]
            numbers = [len(sets[id(item)][index]["features"]) for item, index in group]
            rows = [item.row for (item, _), number in zip(group, numbers) for _ in range(number)]
            if seeds is not None:
                signals["seeds"] = [seed for item, index in group for seed in seeds[id(item)][index]]
            *found, seen = self._prune_sets(signals, num_kept, grid, words, rows, question.clip)
            parts = zip(*(values.split(numbers) for values in found))
            seen = itertools.repeat(None) if seen is None or not keep_signals else seen.split(numbers)
            for (item, index), result, part in zip(group, parts, seen):
                results[id(item), index] = (*result, part)
        for item in items:
            sizes = item.layout.sets(self.pruning)
            features, kept, token_sizes, seen = zip(*(results[id(item), index] for index in range(len(sizes))))
            item.tokens = torch.cat([part.flatten(0, 1) for part in features])
            item.kept = flat_indices(kept, sizes)
            item.token_sizes = torch.cat([part.flatten() for part in token_sizes]) if weighs else None
            item.signals = list(seen) if keep_signals else None

    def _words(self, question: Question) -> list:
        """For each row the text that its tokens are compared with (T, H), of "late_attention" in several layers (n, T, H); `None`
        where the text is not used."""
        reads = self.pruning.prunes and self.method.required_signals & {"relevance", "text_affinity"}
        if not reads or self.pruning.query_weighting == "none":
            return None
        words = question.embeds if question.words is None else question.words
        words = [row[-self.pruning.query_max_tokens :] for row in words]
        if question.words is not None or not self.pruning.reads_layers:
            return words
        first = self.pruning.relevance_layer
        if self._sees_late:
            return [read_by_layers(self.language_model, row, first, LATE_LAYERS) for row in words]
        return [read_question(self.language_model, row, first) for row in words]

    @property
    def _sees_late(self) -> bool:
        return self.pruning.num_relevance_layers > 1

    def _prune_sets(self, signals: dict, num_kept: int, grid, words, rows, clip) -> tuple:
        """
        Prunes N sets of L tokens, each a `grid` of them.

        Returns:
            features (N, num_kept, C), or projected tokens (N, num_kept, H) of a method that works behind the projector;
            indices in the sets (N, num_kept), fp32 numbers of tokens that each stands for (N, num_kept), and the
            `VisualTokens`, or `None` where all tokens stay.
        """
        source_indices = signals.pop("source_indices", None)
        if self.pruning.after_projector and "projected" not in signals:
            signals["features"] = self.project(signals["features"])
        features, tokens = signals["features"], None
        num_sets, num_tokens = features.shape[:2]
        kept = torch.arange(num_tokens, device=features.device).expand(num_sets, -1)
        token_sizes = torch.ones(kept.shape, dtype=torch.float32, device=features.device)
        if num_kept < num_tokens:
            weighs, merge_weight = (self.pruning.resolved(key) for key in ("proportional_attention", "merge_weight"))
            tokens = self._visual_tokens(signals, words, rows, clip)
            tokens.grid = grid
            features, kept = self.method.reduce(tokens, num_kept, self.pruning)
            if weighs or merge_weight:
                time_weight = self.pruning.resolved("group_time_weight")
                time_weight = self.pruning.resolved("time_weight") if time_weight is None else time_weight
                nearest = nearest_kept(tokens.compared, kept, tokens.times, time_weight)
                token_sizes = group_sizes(nearest, num_kept)
            if merge_weight:
                means = group_means(tokens.features, nearest, num_kept)
                features = features.float().lerp(means, merge_weight).to(features.dtype)
        if source_indices is not None:
            kept = source_indices.gather(1, kept)
        return features, kept, token_sizes, tokens

    @torch.no_grad()
    def _visual_tokens(self, signals: dict, words, rows: list, clip) -> VisualTokens:
        """
        The signals of N sets that the method requires: those of the encoder, and what is computed from them.

        Args:
            signals: the encoder's, by name.
            words: for each row of the batch the text (T, H) that tokens are compared with; `None` where it is not used.
            rows: for each set the row of the batch that it belongs to.
            clip: for each row its question in CLIP's joint space (B, D), for the relevance `"clip"`.
        """
        required, pruning = self.method.required_signals, self.pruning
        relevance, distance = pruning.resolved("relevance"), pruning.resolved("distance")
        tokens = VisualTokens(**{name: _without_width(name, values) for name, values in signals.items()})
        reads = required & {"relevance", "text_affinity"} if words is not None else frozenset()
        groups = pruning.resolved("proportional_attention") or pruning.resolved("merge_weight")
        compares_projected = ("compared" in required or groups) and distance == "projected"
        reads_projected = reads and (relevance not in ("pooled", "clip") or "text_affinity" in reads)
        if tokens.projected is None and ("projected" in required or compares_projected or reads_projected):
            tokens.projected = tokens.features if pruning.after_projector else self.project(tokens.features)
        tokens.compared = tokens.projected if distance == "projected" else tokens.features
        if clip is not None and tokens.joint is None:  # merged inside the vision encoder
            tokens.joint = self.place_tokens(tokens.features)
        if "relevance" in reads:
            tokens.relevance = self._relevance(tokens, words, rows, clip)
        if "text_affinity" in reads:
            compare = self._attention_affinity if pruning.reads_layers else word_affinity
            share = lambda text, projected: compare(text, projected) / len(text)  # noqa: E731
            tokens.text_affinity = affinity_by_question(share, words, tokens.projected, rows)
        return tokens

    def _relevance(self, tokens: VisualTokens, words: list, rows: list, clip) -> torch.Tensor:
        """(N, L) fp32: the relevance of the tokens of each set to the question of its sample."""
        relevance = self.pruning.resolved("relevance")
        if relevance == "clip":
            return clip_relevance(tokens.joint, clip.to(tokens.joint.device)[rows])
        if relevance == "late_attention":
            relevance = affinity_by_question(self._late_attention, words, tokens.projected, rows)
            return spread_relevance(relevance.sum(1), tokens.projected)
        if relevance == "attention":
            return attention_relevance(affinity_by_question(self._attention_affinity, words, tokens.projected, rows))
        queries = torch.stack([build_query(text, self.pruning.query_weighting) for text in words])
        if relevance == "pooled":
            queries = align_query(queries, tokens.features.shape[-1])
        features = tokens.features if relevance == "pooled" else tokens.projected
        return cosine_relevance(features, queries.to(features.device)[rows])

    def _attention_affinity(self, words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        layer = self.language_model.layers[self.pruning.relevance_layer]
        return self.largest_of_heads(attention_affinity(layer, words, tokens))

    def _late_attention(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(n, layers, L) for states (layers, T, H)."""
        layers = self.language_model.layers[self.pruning.relevance_layer :]
        rows = [late_attention(layer, words, tokens) for layer, words in zip(layers, states)]
        return self.sum_of_heads(torch.stack(rows, dim=1))


def arranged_sets(item, pruning) -> list:
    """The sets of an item as a pruning block shares its budget, a `dict` for each entry of `layout.sets`: the features, and of the
    signals those that it requires."""
    signals = signals_of(pruning)
    unused = ENCODER_SIGNALS - signals | {"companions"}
    sets = [{name: values for name, values in of_grid.items() if name not in unused} for of_grid in item.sets]
    if "times" in signals and "source_indices" not in sets[0]:
        for grid, of_grid in zip(item.layout.grids, sets):
            starts = torch.arange(grid.frames, device=of_grid["features"].device) / grid.frames
            of_grid["times"] = starts[:, None, None].expand(-1, grid.tokens_per_set, 1)
    if item.layout.shares_budget(pruning):
        as_one_set = [{name: values.flatten(0, 1)[None] for name, values in of_grid.items()} for of_grid in sets]
        return [concatenate(as_one_set, dim=1)]
    return sets


def _without_width(name: str, values):
    """The encoder's scalars of each token (N, L, 1) as (N, L); every other signal as it is."""
    scalars = ("cls_attention", "last_cls_attention", "last_attention", "times")
    return values.squeeze(-1) if name in scalars else values


def affinity_by_question(compare, words: list, projected: torch.Tensor, rows: list) -> torch.Tensor:
    """`compare(words (T, H), tokens (n, L, H)) -> (n, T, L)` for the sets of each sample, as one (N, T', L)."""
    parts, start = [], 0
    for row, group in itertools.groupby(rows):
        end = start + len(list(group))
        tokens, start = projected[start:end], end
        text = words[row].to(tokens.device)
        parts.append(
            compare(text, tokens) if text.shape[-2] else tokens.new_zeros(len(tokens), 0, tokens.shape[1]).float()
        )
    return stack_affinity(parts)


def flat_indices(kept: list, sizes: list) -> torch.LongTensor:
    """Indices (number, k) in the sets of an item, for each (number of sets, tokens in each), counted through all sets."""
    parts, start = [], 0
    for indices, (number, size) in zip(kept, sizes):
        starts = start + torch.arange(number, device=indices.device)[:, None] * size
        parts.append((indices + starts).flatten())
        start += number * size
    return torch.cat(parts)


def concatenate(sets: list, dim: int = 0) -> dict:
    """Signals of several sets as one `dict`."""
    return {name: torch.cat([signals[name] for signals in sets], dim=dim) for name in sets[0]}
