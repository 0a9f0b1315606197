"""DivPrune: the most different tokens, after the projector, without looking at the question."""

from .method_base_rediprune import Method
from .selection_rediprune import select_rediprune


class DivPrune(Method):
    """
    Max-min diversity of the projected tokens, greedily (arXiv 2503.02175, Sec. 3): first the token whose nearest other
    token is farthest, then always the one farthest from all kept ones.

    The paper takes all tokens of a prompt jointly, so that the frames of a video get unequal shares. Kept tokens cannot be
    picked again, and at least one stays.
    """

    needs = frozenset({"compared", "times"})
    scope = "medium"
    distance = "projected"

    def select(self, tokens, num_kept, pruning):
        time_weight = pruning.resolved("time_weight")
        return select_rediprune(tokens.compared, None, num_kept, times=tokens.times, time_weight=time_weight)
