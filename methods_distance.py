"""ReDiPrune, rediprune_plus and DivPrune: max-min diversity, with or without the question."""

from .methods_base import Method
from .ops_selection import select_rediprune


class ReDiPrune(Method):
    """Relevance plus max-min diversity, greedily (arXiv 2603.24680, Sec. 3 and Algorithm 1)."""

    needs = frozenset({"relevance", "compared", "times"})

    def select(self, tokens, num_kept, pruning):
        return select_rediprune(
            tokens.compared,
            None,
            num_kept,
            relevance=tokens.relevance,
            alpha=pruning.alpha,
            threshold=pruning.threshold,
            candidate_pool=pruning.candidate_pool,
            max_candidates=pruning.max_candidates,
            times=tokens.times,
            time_weight=pruning.resolved("time_weight"),
        )


class ReDiPrunePlus(ReDiPrune):
    """
    ReDiPrune's rule with other choices around it, not the paper's.

    The frames of a video share one budget, and distance is that of projected tokens (DivPrune's); relevance is measured in the
    query-key space of an early layer; to be far in time is also to be far; a kept token weighs in attention as much as the tokens
    that it stands for (ToMe's proportional attention, arXiv 2210.09461; in pruned models PACT and RESTORE, 2606.01711), takes on
    a part of their features, and stands where it stood (RESTORE; V-CAST, 2603.27650). This relevance, the term of time, the part of
    the features and the combination are this project's own. docs/methods.md has it step by step.
    """

    relevance = "attention"
    scope = "video"
    distance = "projected"
    time_weight = 0.25
    proportional_attention = True
    merging = 0.3
    positions = "original"


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
