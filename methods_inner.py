"""Pruning inside the language model: after its first layers, which visual tokens go on to the others."""

import torch

from .methods_base import InnerMethod, Method
from .methods_settings import integer
from .ops_inner import dart_tokens, largest, merged_one_by_one


class FastV(InnerMethod):
    """
    The tokens that the last token of the question attends to most in the layer before (FastV, arXiv 2403.06764).

    The attention of that one token is computed beside the kernel of the model, which may be any. The paper's code drops a share R of N
    tokens and keeps round(N (1 - R)); here `keep_ratio` r keeps `count_kept(N, r)`, which rounds r N.
    """

    required_signals = frozenset({"attention"})

    def select(self, tokens, num_kept, pruning):
        return largest(tokens.attention, num_kept)


class VTW(InnerMethod):
    """
    All visual tokens leave before a layer in the middle (visual token withdrawal, arXiv 2405.05803).

    Right before the middle by default, which is the paper's layer 15 of 32 for LLaVA-1.5-7B. There is no budget.
    """

    takes_ratio = False

    def first_layer(self, num_layers):
        return max(1, num_layers // 2 - 1)

    def select(self, tokens, num_kept, pruning):
        return torch.arange(0, device=tokens.states.device)


class DART(InnerMethod):
    """
    Pivots with large keys, and the tokens least similar to each of them (DART, arXiv 2502.11494).

    The released code goes through the pivots in the order of a Python set, here it is that of the prompt; and exactly the budget stays,
    shared evenly by the pivots, where the released one rounds down.

    Parameters:
        dart_visual_pivots (`int`, defaults to 4): pivots among the visual tokens.
        dart_text_pivots (`int`, defaults to 4): pivots among the tokens of the question.
    """

    required_signals = frozenset({"norms", "text_norms", "final_states", "text_states"})
    parameters = {"dart_visual_pivots": integer(4, 1), "dart_text_pivots": integer(4, 0)}

    def select(self, tokens, num_kept, pruning):
        shown = (tokens.norms, tokens.final_states, tokens.text_norms, tokens.text_states)
        return dart_tokens(*shown, num_kept, pruning.dart_visual_pivots, pruning.dart_text_pivots)


class HoliTomMerging(FastV):
    """
    FastV's choice, with the others averaged into the tokens that stay (the inner part of HoliTom, arXiv 2505.21334).

    Its paper merges before layer 18 of 28, half of the tokens that its outer part (`method="holitom"`) leaves.
    """

    def first_layer(self, num_layers):
        return max(1, 18 * num_layers // 28)

    def reduce(self, tokens, num_kept, pruning):
        kept = self.select(tokens, num_kept, pruning)
        return kept, merged_one_by_one(tokens.states, kept, tokens.attention)


class OnlyInside(Method):
    """One of the methods inside the language model alone: all tokens enter it, and the budget is of those that go on there."""

    def __init__(self, inner: str):
        self.inner = inner
