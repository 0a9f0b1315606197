"""DivPrune: the most different tokens, after the projector, without looking at the question."""

from .method_base_rediprune import Method
from .selection_rediprune import select_rediprune


class DivPrune(Method):
    """
    Max-min diversity of the projected tokens, greedily (arXiv 2503.02175, Sec. 3): first the token whose nearest other
    token is farthest, then always the one farthest from all kept ones.

    The paper takes all tokens of a prompt jointly, so that the frames of a video get unequal shares. Kept tokens cannot be
    picked again, and at least one stays.

    Args:
        scope: `"medium"` as in the paper, or `"frame"`.
    """

    needs = frozenset({"projected"})

    def __init__(self, scope: str = "medium"):
        self.scope = scope

    def select(self, tokens, num_kept, pruning):
        return select_rediprune(tokens.projected, None, num_kept)
