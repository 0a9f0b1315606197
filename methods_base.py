"""The bases of the pruning methods, before the language model and inside it: signals, counts, parameters and results."""

from dataclasses import dataclass
from typing import Optional

import torch

from .ops_tokens import gather_tokens

# What the encoder tells of a tower with a CLS token.
CLS_SIGNALS = frozenset({"cls_attention", "keys", "cls_features", "last_cls_attention", "last_keys"})
# What it tells of any tower of such layers: this, and of one without CLS the last alone.
TOWER_SIGNALS = CLS_SIGNALS | {"last_attention"}


@dataclass
class VisualTokens:
    """
    The signals of N sets of L tokens, for a method. A set is a frame, an image view, or all tokens of an item.

    Only the features are always there; the rest where the method's `required_signals` ask for it.

    Attributes:
        features: (N, L, C) features of the tapped vision layer, any floating dtype; gradients flow to them.
        compared: (N, L, ·) the vectors between which distances are measured: the features, or, with `distance="projected"`,
            the projected tokens.
        times: (N, L) fp32 in [0, 1), the share of the video that lies before the token's frame; 0 in images.
        relevance: (N, L) fp32, of each token to the question; `None` when the text is not used.
        text_affinity: (N, T, L) fp32 or fp64, for each word of the question its share of attention to each token: a row adds up to
            1 / words, or is zero where the question has fewer than T words; `None` when the text is not used.
        projected: (N, L, H) the features after the projector.
        joint: (N, L, D) fp32, the features in CLIP's joint space, for the relevance `"clip"` alone.
        cls_attention: (N, L) fp32, attention of CLS to each token in the tapped layer, mean over heads.
        keys: (N, L, D) keys of the tapped layer, mean over heads.
        cls_features: (N, L, C) CLS of the token's frame in the tapped layer.
        last_cls_attention: (N, L) fp32, attention of CLS in the last layer, its heads taken as one.
        last_keys: (N, L, C) keys of the last layer.
        last_attention: (N, L) fp32, attention that each token receives in the last layer, mean over heads and over all tokens of
            its frame.
        seeds: N integers, one for each set, that depend on the sample alone and not on what else is in the batch.
        grid: the (frames, height, width, leading) of every set, a `TokenGrid`; `None` = one frame of L tokens.
    """

    features: torch.Tensor
    compared: Optional[torch.Tensor] = None
    times: Optional[torch.Tensor] = None
    relevance: Optional[torch.Tensor] = None
    text_affinity: Optional[torch.Tensor] = None
    projected: Optional[torch.Tensor] = None
    joint: Optional[torch.Tensor] = None
    cls_attention: Optional[torch.Tensor] = None
    keys: Optional[torch.Tensor] = None
    cls_features: Optional[torch.Tensor] = None
    last_cls_attention: Optional[torch.Tensor] = None
    last_keys: Optional[torch.Tensor] = None
    last_attention: Optional[torch.Tensor] = None
    seeds: Optional[list] = None
    grid: Optional[tuple] = None

    def split(self, numbers: list) -> list:
        """One `VisualTokens` for each number of consecutive sets; `numbers` add up to N."""
        parts, start = [], 0
        for number in numbers:
            sets = slice(start, start := start + number)
            of_part = {
                name: values[sets] for name, values in vars(self).items() if values is not None and name != "grid"
            }
            parts.append(VisualTokens(**of_part, grid=self.grid))
        return parts


class Method:
    """
    Base of the methods. One that selects defines `select`; one that makes new tokens of old ones defines `reduce`.

    Attributes:
        required_signals: the fields of `VisualTokens`, beside the features, that must be there.
        parameters: the keys of the pruning block that are this method's own, each with its `Setting` and, below it, its line in
            the docstring of the class.
        relevance_with_tower: `relevance` where the configuration names a `text_tower`; `None` = the same.
        inner: a key of `INNER_METHODS`, where it is that stage alone; `None` = it works before the language model.
        after_projector: whether the method works behind the projector: then `features` are the projected tokens, and what it
            returns goes on as it is.

    The others are keys of the pruning block, with the values that they have for this method where the configuration leaves
    them open (`None`): those of its paper.
    """

    required_signals = frozenset()
    parameters = {}
    inner = None
    after_projector = False

    relevance = "pooled"
    relevance_with_tower = None
    words = "all"
    scope = "frame"
    distance = "features"
    time_weight = 0.0
    group_time_weight = None
    proportional_attention = False
    merge_weight = 0.0
    positions = "compact"

    def check(self, values: dict) -> None:
        """
        Raises ValueError where values of this method's parameters exclude others. Asked of every method, whichever is set.

        Args:
            values: all keys of the pruning block, each allowed by itself.
        """

    def count(self, num_tokens: int, pruning) -> int:
        """Tokens that stay of a set of `num_tokens`, for the processor and the model alike."""
        return pruning.nominal(num_tokens)

    def count_in_grid(self, grid, pruning) -> int:
        """The same for a set that is a `TokenGrid`, for methods whose count follows from its height and width."""
        return self.count(grid.num_tokens, pruning)

    @property
    def counts_by_shape(self) -> bool:
        """Whether sets of as many tokens can keep different numbers of them, by their height and width."""
        return type(self).count_in_grid is not Method.count_in_grid

    def count_in_encoder(self, num_patches: int, num_kept: int, pruning) -> int:
        """Of the `num_patches` patches of a set whose count is `num_kept`, how many leave the vision encoder."""
        return num_patches

    @property
    def merges_in_encoder(self) -> bool:
        return type(self).count_in_encoder is not Method.count_in_encoder

    def select(self, tokens: VisualTokens, num_kept: int, pruning) -> torch.LongTensor:
        """Indices (N, num_kept), ascending in each row."""
        raise NotImplementedError

    def reduce(self, tokens: VisualTokens, num_kept: int, pruning) -> tuple:
        """
        The tokens that go on to the projector.

        Returns:
            features (N, num_kept, C) in the dtype of the given ones, and LongTensor (N, num_kept): for each of them the
            index of the token whose place it takes, ascending in each row.
        """
        kept = self.select(tokens, num_kept, pruning)
        return gather_tokens(tokens.features, kept), kept


@dataclass
class InnerTokens:
    """
    What a method is shown of the N visual tokens and the T tokens of the question behind them, of one prompt.

    Only the states are always there; the rest where the method's `required_signals` ask for it.

    Attributes:
        states: (N, H) that enter the layer.
        attention: (N,) fp32, what the last token of the question attends to in the layer before, mean over heads, of all tokens
            of the prompt.
        norms, text_norms: (N,) and (T,) fp32, the sum of the magnitudes of the rotated keys of the layer before.
        final_states, text_states: (N, H) and (T, H), those that enter the layer, behind the norm of the last layer.
    """

    states: torch.Tensor
    attention: Optional[torch.Tensor] = None
    norms: Optional[torch.Tensor] = None
    text_norms: Optional[torch.Tensor] = None
    final_states: Optional[torch.Tensor] = None
    text_states: Optional[torch.Tensor] = None


class InnerMethod:
    """
    Base of what leaves visual tokens behind inside the language model: a value of `pruning.inner_method`.

    Attributes:
        required_signals: the fields of `InnerTokens`, beside the states, that must be there.
        parameters: as in `Method`.
        takes_ratio: whether it needs a budget.
    """

    required_signals = frozenset()
    parameters = {}
    takes_ratio = True

    def first_layer(self, num_layers: int) -> int:
        """The first layer, of `num_layers`, that the others do not reach, where `inner_layer` is open: that of the paper."""
        return 2

    def select(self, tokens: InnerTokens, num_kept: int, pruning) -> torch.LongTensor:
        """Indices (num_kept,), ascending."""
        raise NotImplementedError

    def reduce(self, tokens: InnerTokens, num_kept: int, pruning) -> tuple:
        """The indices, and the states (num_kept, H) with which these tokens go on."""
        kept = self.select(tokens, num_kept, pruning)
        return kept, tokens.states[kept]
