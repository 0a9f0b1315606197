"""ReDiPrune: relevance and max-min diversity, before the projector."""

from .method_base_rediprune import Method
from .selection_rediprune import select_rediprune


class ReDiPrune(Method):
    """Relevance plus max-min diversity, greedily (arXiv 2603.24680, Sec. 3 and Algorithm 1)."""

    needs = frozenset({"relevance"})

    def select(self, tokens, num_kept, pruning):
        return select_rediprune(
            tokens.features,
            None,
            num_kept,
            relevance=tokens.relevance,
            alpha=pruning.alpha,
            threshold=pruning.threshold,
            candidate_pool=pruning.candidate_pool,
            max_candidates=pruning.max_candidates,
        )
