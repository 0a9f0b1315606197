"""Selection of visual tokens: the ReDiPrune rule and two controls, as pure tensor functions.

Shapes: N sets (frames or image views) of L tokens with C features each, of which k are kept; J text tokens
with H features each. Section, equation and algorithm numbers are those of the ReDiPrune paper.
"""

import itertools
from collections.abc import Sequence
from numbers import Integral, Real

import torch

from .ops_tokens import cosines, first_largest, inverse_norms

CANDIDATE_POOLS = ("all", "algorithm1", "released")

# The pool is at most this many times the number of tokens still to be picked (beta in Algorithm 1).
POOL_FACTOR = 3
# The largest weight of relevance or time beside a distance of at most 2: far from what an fp32 score can hold, and from
# where rounding leaves nothing of the distance.
LARGEST_WEIGHT = 10**6
CACHE_BYTES = 10 * 2**20
# Costs of the two ways to compare tokens on a CPU, in nanoseconds of one thread of an AMD EPYC (`scripts/selection_cost.py`;
# their ratios alone matter). One row of similarities: for each token so much, and for each of its features, from the cache or
# from memory. All pairs at once: for each pair so much, and for each of its features; only one half is computed, block by block.
ROW_TOKEN, ROW_FEATURE, ROW_FEATURE_FAR = 40, 0.12, 0.35
PAIR, PAIR_FEATURE = 5, 0.018
PAIR_BLOCK = 96


def count_kept(num_tokens: int, keep_ratio: float) -> int:
    """Number of `num_tokens` that stay: max(1, round(keep_ratio * num_tokens)), halves to even (Sec. 3.4).

    Raises ValueError if `num_tokens` is not an integer >= 1 or `keep_ratio` is not a number in (0, 1].
    """
    if not isinstance(num_tokens, Integral) or isinstance(num_tokens, bool) or num_tokens < 1:
        raise ValueError(f"num_tokens must be an integer >= 1, got {num_tokens!r}")
    if not isinstance(keep_ratio, Real) or isinstance(keep_ratio, bool) or not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be a number in (0, 1], got {keep_ratio!r}")
    return max(1, round(float(keep_ratio) * int(num_tokens)))


@torch.no_grad()
def select_rediprune(
    features: torch.Tensor,
    query: torch.Tensor | None,
    num_kept: int,
    *,
    relevance: torch.Tensor | None = None,
    alpha: float = 0.5,
    threshold: float = 0.0,
    candidate_pool: str = "all",
    max_candidates: int | None = None,
    times: torch.Tensor | None = None,
    time_weight: float = 0.0,
) -> torch.Tensor:
    """Greedy selection of relevant and mutually different tokens in every set (Sec. 3.3-3.4, Algorithm 1).

    With cosine relevance s_i = <x_i, q> (Eq. 3) and distance D_ij = 1 - <x_i, x_j> (Eq. 4), the most relevant
    token comes first, then always the one with the largest min_{u kept} D_ui + alpha s_i (Eq. 6). Scores
    within `TIE_TOLERANCE` of the best are a tie, which the lowest index wins.

    Args:
        features: (N, L, C), any floating dtype, not normalized.
        query: (N, C), one per set (see `align_query`), or None for no relevance term at all: the token whose
            nearest neighbour is farthest comes first, then always the one with the largest min_{u kept} D_ui
            (DivPrune's rule). A query of zeros makes every relevance 0, so that token 0 comes first.
        num_kept: k >= 1; k >= L keeps all tokens, unread.
        relevance: (N, L), s_i from elsewhere, in place of the cosine with a query.
        alpha: weight of the relevance.
        threshold: tau, the least relevance of a candidate; no limit if <= 0.
        candidate_pool: which tokens can be picked.
            "all": every token; there is no threshold.
            "algorithm1": the paper's Algorithm 1. Before each pick, with r picks to go, the pool is made anew
            of the tokens not yet kept: those with s_i >= tau (all of them if fewer than r reach it), of these
            the 3 r most relevant, at most `max_candidates` but at least r.
            "released": the authors' code. One pool for all picks: every token if tau <= 0; else the 3 k most
            relevant if k < L // 2, whatever the value of tau; else those with s_i >= tau, or the k most
            relevant if fewer than k reach it.
        max_candidates: M of Algorithm 1, None for no cap.
        times: (N, L) fp32, when each token is seen; not in the paper.
        time_weight: with `times`, D_ij becomes 1 - <x_i, x_j> + time_weight |t_i - t_j|.

    Returns:
        LongTensor (N, k), ascending in each set.

    Raises:
        ValueError: an argument is out of range, or sets hold NaN, infinite or (norm above 1e19) too large
            values; the message names the sets.

    Cosines are computed in fp32 whatever the dtype and autocast (on CUDA in TF32, with errors around 1e-3, if
    the caller has allowed TF32 matrix products). On a CPU with C a multiple of 4, a set is selected from
    bit-identical scores alone and in any batch; on a GPU the matrix product may sum in another order for
    another batch size, and the tie rule is what keeps that from deciding between near-duplicates.
    """
    if features.ndim != 3:
        raise ValueError(f"features must have shape (N, L, C), got {tuple(features.shape)}")
    num_sets, num_tokens, num_features = features.shape
    if query is not None and query.shape != (num_sets, num_features):
        raise ValueError(f"query must have shape {(num_sets, num_features)}, got {tuple(query.shape)}")
    if relevance is not None and (query is not None or relevance.shape != (num_sets, num_tokens)):
        raise ValueError(
            f"relevance must have shape {(num_sets, num_tokens)} and takes the place of the query, got "
            f"{tuple(relevance.shape)} {'with' if query is not None else 'without'} a query"
        )
    _check_counts(num_tokens, num_kept)
    for name, weight in (("alpha", alpha), ("time_weight", time_weight)):
        if not isinstance(weight, Real) or not -LARGEST_WEIGHT <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"{name} must be a number in [{-LARGEST_WEIGHT}, {LARGEST_WEIGHT}], got {weight!r}")
    if not isinstance(threshold, Real) or not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a number in [-1, 1], got {threshold!r}")
    if candidate_pool not in CANDIDATE_POOLS:
        raise ValueError(f"candidate_pool must be one of {CANDIDATE_POOLS}, got {candidate_pool!r}")
    if candidate_pool == "all" and threshold > 0:
        raise ValueError(f"threshold {threshold!r} needs candidate_pool 'algorithm1' or 'released', got 'all'")
    if candidate_pool != "all" and query is None and relevance is None:
        raise ValueError(f"candidate_pool {candidate_pool!r} ranks tokens by relevance and needs a query, got None")
    if max_candidates is not None and (candidate_pool != "algorithm1" or max_candidates < 1):
        raise ValueError(f"max_candidates must be >= 1 with candidate_pool 'algorithm1', got {max_candidates!r}")
    if num_kept >= num_tokens:
        return torch.arange(num_tokens, device=features.device).repeat(num_sets, 1)

    # On a CPU, as many sets at a time as a cache holds: a pick reads all features of its set.
    size = max(1, num_sets)
    if features.device.type == "cpu":
        size = max(1, CACHE_BYTES // max(1, 4 * num_tokens * num_features))
    moments = time_weight * times if times is not None and time_weight else None
    values = (features, query, relevance, moments)
    groups = [part.split(size) if part is not None else itertools.repeat(None) for part in values]
    with torch.autocast(features.device.type, enabled=False):
        parts = [
            _select_group(*group, num_kept, alpha, threshold, candidate_pool, max_candidates) for group in zip(*groups)
        ]
    kept, invalid = (torch.cat(part) for part in zip(*parts))

    # Asked last: on a GPU this is the one point where the host waits.
    if invalid.any():
        sets = invalid.nonzero()[:, 0].tolist()
        raise ValueError(f"features, query or relevance hold NaN, infinite or too large values in sets {sets}")
    return kept


def _select_group(
    features, query, relevance, moments, num_kept, alpha, threshold, candidate_pool, max_candidates
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept indices (N, k) of sets that are worked on together, and (N,) bool which of them hold invalid values."""
    features = features.float()
    inverse_norm = inverse_norms(features)
    invalid = ~(inverse_norm > 0).all(1)  # 1 / inf is 0, and NaN is not larger than anything
    has_relevance = query is not None or relevance is not None
    if query is not None:
        query = query.float()
        invalid |= ~torch.linalg.vector_norm(query, dim=-1).isfinite()
        relevance = cosines(features, inverse_norm, query)
    elif relevance is not None:
        relevance = relevance.float().clone()
        invalid |= ~relevance.isfinite().all(1)
    else:
        relevance = torch.zeros_like(inverse_norm)
    weighted_relevance = alpha * relevance
    if candidate_pool == "released" and threshold > 0:
        excluded = ~_released_pool(relevance, num_kept, threshold)
        relevance.masked_fill_(excluded, -torch.inf)
        weighted_relevance.masked_fill_(excluded, -torch.inf)
    elif candidate_pool == "algorithm1":
        order = relevance.argsort(dim=1, descending=True, stable=True)
        reaches_threshold = relevance >= (threshold if threshold > 0 else -torch.inf)
    # A row of scores, that of token u, is alpha s_i - cos(u, i): Eq. 6 for a single kept token u, less the constant 1.
    # Adding alpha s_i keeps the order, so Eq. 6 for several kept tokens is the minimum over their rows.
    scores = None
    if features.device.type != "cpu" or not has_relevance or not rows_are_cheaper(*features.shape[1:], num_kept):
        scores = _gram(features).mul_(inverse_norm[:, :, None])
        torch.addcmul(weighted_relevance[:, None], scores, inverse_norm[:, None], value=-1, out=scores)
        if moments is not None:
            scores += (moments[:, :, None] - moments[:, None]).abs()
    best = relevance
    if not has_relevance:
        scores.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        best = scores.amin(1)
    if scores is not None:
        scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # a kept token cannot be picked again

    picks, sets = [], torch.arange(len(features), device=features.device)[:, None]
    for step in range(num_kept):
        candidates = best
        if candidate_pool == "algorithm1":
            remaining = ~best.isneginf()
            pool = _algorithm1_pool(remaining, order, reaches_threshold, num_kept - step, max_candidates)
            candidates = best.masked_fill(~pool, -torch.inf)
        pick = first_largest(candidates)[:, None]
        picks.append(pick)
        if scores is not None:
            row = scores[sets, pick][:, 0]
        else:
            cosine = torch.bmm(features[sets, pick], features.mT)[:, 0] * inverse_norm
            row = torch.addcmul(weighted_relevance, cosine, inverse_norm.gather(1, pick), value=-1)
            if moments is not None:
                row += (moments - moments.gather(1, pick)).abs()
            row.scatter_(1, pick, -torch.inf)
        best = row if step == 0 else torch.minimum(best, row, out=best)
    return torch.cat(picks, dim=1).sort(dim=1).values, invalid


def select_random(num_tokens: int, num_kept: int, seeds: Sequence[int]) -> torch.Tensor:
    """Control: k of L tokens at random without replacement for each of the N `seeds`.

    Returns LongTensor (N, k) on the CPU, ascending. A set's choice depends on its seed alone, not on the
    other sets nor on the model's device. Raises ValueError if L or k is < 1; k >= L keeps all.
    """
    _check_counts(num_tokens, num_kept)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    orders = [torch.randperm(num_tokens, generator=generator, device="cpu") for generator in generators]
    return torch.stack(orders)[:, :num_kept].sort(dim=1).values


def select_uniform(num_tokens: int, num_kept: int) -> torch.Tensor:
    """Control: k of L tokens evenly spaced, floor((j + 0.5) L / k) for j = 0 .. k - 1.

    Returns LongTensor (k,) on the CPU, ascending. Raises ValueError if L or k is < 1; k >= L keeps all.
    """
    _check_counts(num_tokens, num_kept)
    num_kept = min(num_kept, num_tokens)
    return (2 * torch.arange(num_kept, device="cpu") + 1) * num_tokens // (2 * num_kept)


def _check_counts(num_tokens: int, num_kept: int) -> None:
    if num_tokens < 1:
        raise ValueError(f"there must be at least 1 token to select from, got {num_tokens}")
    if num_kept < 1:
        raise ValueError(f"num_kept must be >= 1, got {num_kept}")


def rows_are_cheaper(num_tokens: int, num_features: int, num_kept: int) -> bool:
    """Whether, on a CPU, comparing k kept tokens with all others one by one is less work than all L^2 pairs at once."""
    in_cache = 4 * num_tokens * num_features <= CACHE_BYTES
    row = num_tokens * (ROW_TOKEN + num_features * (ROW_FEATURE if in_cache else ROW_FEATURE_FAR))
    computed = min(2, 1 + PAIR_BLOCK / num_tokens)  # of the half, as the blocks on the diagonal are whole
    pairs = num_tokens**2 * (PAIR + num_features * PAIR_FEATURE * computed)
    return num_kept * row < pairs


def _gram(features: torch.Tensor) -> torch.Tensor:
    """(N, L, C) -> (N, L, L): all inner products within each set."""
    if features.device.type != "cpu":
        return torch.bmm(features, features.mT)
    # On a CPU this product is nine tenths of the time, so compute the lower blocks only and mirror them.
    num_sets, num_tokens, _ = features.shape
    block = PAIR_BLOCK
    gram = features.new_empty(num_sets, num_tokens, num_tokens)
    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        torch.bmm(features[:, rows], features[:, : start + block].mT, out=gram[:, rows, : start + block])
        gram[:, :start, rows] = gram[:, rows, :start].mT
    return gram


def _released_pool(relevance: torch.Tensor, num_kept: int, threshold: float) -> torch.Tensor:
    """(N, L) bool: the candidates of the authors' code for a threshold > 0."""
    num_tokens = relevance.shape[1]
    by_threshold = num_kept >= num_tokens // 2
    num_top = num_kept if by_threshold else POOL_FACTOR * num_kept
    top = relevance.argsort(dim=1, descending=True, stable=True)[:, :num_top]
    pool = torch.zeros_like(relevance, dtype=torch.bool).scatter_(1, top, True)
    if by_threshold:
        # If k tokens reach the threshold, the k most relevant ones are among them.
        reaching = relevance >= threshold
        pool |= reaching & (reaching.sum(1, keepdim=True) >= num_kept)
    return pool


def _algorithm1_pool(
    remaining: torch.Tensor,
    order: torch.Tensor,
    reaches_threshold: torch.Tensor,
    num_left: int,
    max_candidates: int | None,
) -> torch.Tensor:
    """(N, L) bool: the candidates of lines 14-19 (and 6-11) of Algorithm 1 with `num_left` picks to go.

    Each of these pools is the first so many of the remaining tokens in `order` of relevance; what differs is
    how many. The pool may hold tokens that are no longer remaining.
    """
    num_tokens = remaining.shape[1]
    cap = num_tokens if max_candidates is None else max(num_left, max_candidates)
    size = (remaining & reaches_threshold).sum(1, keepdim=True)
    size = size.masked_fill(size < num_left, cap).clamp_max(min(cap, POOL_FACTOR * num_left))
    place = remaining.gather(1, order).cumsum(1)
    return torch.zeros_like(remaining).scatter_(1, order, place <= size)
