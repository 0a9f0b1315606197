"""ReDiPrune, rediprune_plus and DivPrune: max-min diversity, with or without the question."""

from .methods_base import Method
from .methods_settings import choice, integer, number
from .ops_selection import CANDIDATE_POOLS, LARGEST_WEIGHT, select_rediprune


class ReDiPrune(Method):
    """
    Relevance plus max-min diversity, greedily (arXiv 2603.24680, Sec. 3 and Algorithm 1).

    Parameters:
        alpha (`float`, defaults to 0.5): weight of the relevance beside the diversity (paper, §3.4), in [-1e6, 1e6].
        threshold (`float`, defaults to 0.0): the tau of Algorithm 1, a cosine. Used by the candidate pools
            `"algorithm1"` and `"released"`; at most 0 filters nothing.
        candidate_pool (`str`, defaults to `"all"`): `"all"` = every token is a candidate; `"algorithm1"` = the paper's
            Algorithm 1 to the letter; `"released"` = what the authors' code does.
        max_candidates (`int`, *optional*): the cap M of Algorithm 1; `None` = no cap. Used by `"algorithm1"`.
    """

    required_signals = frozenset({"relevance", "compared", "times"})
    parameters = {
        "alpha": number(
            0.5,
            -LARGEST_WEIGHT,
            LARGEST_WEIGHT,
            f"a number in [{-LARGEST_WEIGHT}, {LARGEST_WEIGHT}] (0 leaves diversity alone)",
        ),
        "threshold": number(0.0, -1, 1, "a cosine in [-1, 1]"),
        "candidate_pool": choice("all", CANDIDATE_POOLS),
        "max_candidates": integer(None, 1),
    }

    def check(self, values):
        pool, threshold, max_candidates = (values[key] for key in ("candidate_pool", "threshold", "max_candidates"))
        if pool == "all" and threshold > 0:
            raise ValueError(
                f"pruning key threshold={threshold!r} chooses among candidates, but candidate_pool='all' takes every "
                "token; set candidate_pool to 'algorithm1' or 'released' first"
            )
        if pool != "algorithm1" and max_candidates is not None:
            raise ValueError(
                f"pruning key max_candidates={max_candidates!r} caps the candidates of Algorithm 1, but candidate_pool="
                f"{pool!r} has no cap; set candidate_pool to 'algorithm1' first"
            )
        if pool != "all" and values["query_weighting"] == "none":
            raise ValueError(
                f"pruning key candidate_pool={pool!r} ranks tokens by their relevance to the question, but "
                "query_weighting='none' drops the question; set one of them to its default first"
            )

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
    query-key space of early layers, by the words that have read the question (FastV, arXiv 2403.06764, looks at the last one), and
    shared by tokens that look alike; to be far in time is also to be far; a kept token weighs in attention as much as the tokens
    that it stands for (ToMe's proportional attention, arXiv 2210.09461; in pruned models PACT and RESTORE, 2606.01711), takes on
    a part of their features, and stands where it stood (RESTORE; V-CAST, 2603.27650). This relevance, the term of time, the part of
    the features and the combination are this project's own. docs/methods.md has it step by step.
    """

    relevance = "late_attention"
    scope = "video"
    distance = "projected"
    time_weight = 0.25
    group_time_weight = 1.0
    proportional_attention = True
    merge_weight = 0.3
    positions = "original"


class DivPrune(Method):
    """
    Max-min diversity of the projected tokens, greedily (arXiv 2503.02175, Sec. 3): first the token whose nearest other
    token is farthest, then always the one farthest from all kept ones.

    The paper takes all tokens of a prompt jointly, so that the frames of a video get unequal shares. Kept tokens cannot be
    picked again, and at least one stays.
    """

    required_signals = frozenset({"compared", "times"})
    scope = "item"
    distance = "projected"

    def select(self, tokens, num_kept, pruning):
        time_weight = pruning.resolved("time_weight")
        return select_rediprune(tokens.compared, None, num_kept, times=tokens.times, time_weight=time_weight)
