"""The base of the pruning methods: the signals of visual tokens, the count, the parameters and the result."""

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
        after_projector: whether the method works behind the projector: then `features` are the projected tokens, and what it
            returns goes on as it is.

    The others are keys of the pruning block, with the values that they have for this method where the configuration leaves
    them open (`None`): those of its paper.
    """

    required_signals = frozenset()
    parameters = {}
    after_projector = False

    relevance = "pooled"
    relevance_with_tower = None
    words = "all"
    scope = "frame"
    distance = "features"
    time_weight = 0.0
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
