"""Which visual tokens stay: the ReDiPrune selection rule and two controls, as pure tensor functions.

Shapes: N sets (frames or image views) of L tokens with C features each, of which k are kept; J text tokens
with H features each. Section, equation and algorithm numbers are those of the ReDiPrune paper.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
import torch.nn.functional as F

QUERY_WEIGHTINGS = ("exponential", "self_attention", "middle_peak", "average")
CANDIDATE_POOLS = ("all", "algorithm1", "released")

# The pool is at most this many times the number of tokens still to be picked (beta in Algorithm 1).
POOL_FACTOR = 3
# Norms are floored here, so that a zero vector stays zero instead of turning into NaN.
MIN_NORM = 1e-12
# Scores this close are a tie. It is a little above the rounding error of an fp32 cosine; below it, the order
# of summation (batch size, number of threads, device) would decide which of two near-duplicates wins.
TIE_TOLERANCE = 1e-6
# Gains fall with the number of tokens and from pick to pick, so there a tie is this share of the largest one: what fp32 input
# does not tell apart. They are computed in fp64, whose rounding error is far below it.
RELATIVE_TIE = 1e-7
# The largest weight of relevance or time beside a distance of at most 2: far from what an fp32 score can hold, and from
# where rounding leaves nothing of the distance.
LARGEST_WEIGHT = 10**6
CACHE_BYTES = 10 * 2**20
# What the two ways to compare tokens cost on a CPU, in nanoseconds of one thread of an AMD EPYC (`scripts/selection_cost.py`;
# their ratios alone matter). One row of similarities: for each token so much, and for each of its features, from the cache or
# from memory. All pairs at once: for each pair so much, and for each of its features; only one half is computed, block by block.
ROW_TOKEN, ROW_FEATURE, ROW_FEATURE_FAR = 40, 0.12, 0.35
PAIR, PAIR_FEATURE = 5, 0.018
PAIR_BLOCK = 96


def count_kept(num_tokens: int, keep_ratio: float) -> int:
    """How many of `num_tokens` stay: max(1, round(keep_ratio * num_tokens)), halves to even (Sec. 3.4).

    Raises ValueError if `num_tokens` is not an integer >= 1 or `keep_ratio` is not a number in (0, 1].
    """
    if not isinstance(num_tokens, Integral) or isinstance(num_tokens, bool) or num_tokens < 1:
        raise ValueError(f"num_tokens must be an integer >= 1, got {num_tokens!r}")
    if not isinstance(keep_ratio, Real) or isinstance(keep_ratio, bool) or not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be a number in (0, 1], got {keep_ratio!r}")
    return max(1, round(float(keep_ratio) * int(num_tokens)))


def query_tail(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    placeholder_ids: Iterable[int],
    max_tokens: int = 128,
) -> torch.Tensor:
    """The text a query is built from: the ids after the last placeholder (all ids if there is none), at most
    the last `max_tokens` of them.

    `input_ids` (T,) of one sample; `attention_mask` (T,) bool or 0/1 integers; positions that are 0 are
    removed first.
    """
    if attention_mask is not None:
        # Without the cast, an integer mask would be read as positions 0 and 1 instead of as a mask.
        input_ids = input_ids[attention_mask.bool()]
    is_placeholder = torch.isin(input_ids, input_ids.new_tensor(list(placeholder_ids)))
    positions = is_placeholder.nonzero()
    tail = input_ids[positions[-1] + 1 :] if len(positions) else input_ids
    return tail[max(0, len(tail) - max_tokens) :]


@torch.no_grad()
def build_query(embeddings: torch.Tensor, weighting: str = "exponential") -> torch.Tensor:
    """One query vector from the input embeddings of the text, q = sum_j w_j c_j (Eq. 1).

    `embeddings` (J, H) of any floating dtype; returns (H,) in fp32, zeros if J = 0. The weightings:

    - "exponential": c = A e with A = softmax(cosine(e, e)) by rows, w_j proportional to exp(3 j / (J - 1))
      with j from 0 (the authors' code);
    - "self_attention": c = A e, uniform w;
    - "middle_peak": c = e, w_j a Gaussian around the middle of the text with standard deviation J / 4;
    - "average": c = e, uniform w.

    Raises ValueError for any other weighting.
    """
    if weighting not in QUERY_WEIGHTINGS:
        raise ValueError(f"weighting must be one of {QUERY_WEIGHTINGS}, got {weighting!r}")
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have shape (J, H), got {tuple(embeddings.shape)}")
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = embeddings.float()
        num_tokens = embeddings.shape[0]
        if num_tokens == 0:
            return embeddings.new_zeros(embeddings.shape[1])
        position = torch.arange(num_tokens, dtype=torch.float32, device=embeddings.device)
        if weighting == "exponential":
            weights = torch.exp(3 * position / max(1, num_tokens - 1))
        elif weighting == "middle_peak":
            weights = torch.exp(-((position - (num_tokens - 1) / 2) ** 2) / (2 * (num_tokens / 4) ** 2))
        else:
            weights = torch.ones_like(position)
        weights = weights / weights.sum()
        if weighting in ("exponential", "self_attention"):
            unit = F.normalize(embeddings, dim=-1, eps=MIN_NORM)
            weights = weights @ (unit @ unit.T).softmax(dim=-1)  # w (A e) = (w A) e
        return weights @ embeddings


def align_query(query: torch.Tensor, dim: int) -> torch.Tensor:
    """Bring `query` (N, D) to (N, dim) in fp32, without learning: if D > dim, averages of consecutive entries
    (blocks of D / dim, or adaptive average pooling where that is no integer); if D < dim, tiled and cut.
    """
    query = query.float()
    if query.shape[1] > dim:
        return F.adaptive_avg_pool1d(query, dim)
    return query.repeat(1, math.ceil(dim / query.shape[1]))[:, :dim]


@torch.no_grad()
def cosine_relevance(features: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Cosine of every token (N, L, C) with the query (N, C) of its set (Eq. 3), (N, L) fp32; 0 where either is zero."""
    features = features.float()
    return _cosines(features, _inverse_norm(features), query.float())


def _inverse_norm(features: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(features, dim=-1).clamp_min(MIN_NORM).reciprocal()


def _cosines(features: torch.Tensor, inverse_norm: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    # The query is the left factor: so a set has the same sums alone and in a batch (CPU).
    return torch.bmm(F.normalize(query, dim=-1, eps=MIN_NORM)[:, None], features.mT)[:, 0] * inverse_norm


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
        raise ValueError(
            f"threshold {threshold!r} needs candidate_pool 'algorithm1' or 'released', got 'all'"
        )
    if candidate_pool != "all" and query is None and relevance is None:
        raise ValueError(
            f"candidate_pool {candidate_pool!r} ranks tokens by relevance and needs a query, got None"
        )
    if max_candidates is not None and (candidate_pool != "algorithm1" or max_candidates < 1):
        raise ValueError(
            f"max_candidates must be >= 1 with candidate_pool 'algorithm1', got {max_candidates!r}"
        )
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
    inverse_norm = _inverse_norm(features)
    invalid = ~(inverse_norm > 0).all(1)  # 1 / inf is 0, and NaN is not larger than anything
    has_relevance = query is not None or relevance is not None
    if query is not None:
        query = query.float()
        invalid |= ~torch.linalg.vector_norm(query, dim=-1).isfinite()
        relevance = _cosines(features, inverse_norm, query)
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


def top_tokens(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """(N, L) -> (N, k): the tokens with the largest scores, ascending. Scores are compared in steps of `TIE_TOLERANCE`, and
    of equals the lowest index wins. Raises ValueError where scores are NaN or infinite.
    """
    check_finite("scores", scores)
    order = (scores.float() / TIE_TOLERANCE).round().argsort(dim=1, descending=True, stable=True)
    return order[:, :num_kept].sort(dim=1).values


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raises ValueError, with the sets, where `values` (N, ...) are not finite."""
    invalid = ~values.isfinite().flatten(1).all(1)
    if invalid.any():
        raise ValueError(f"{name} hold NaN, infinite or too large values in sets {invalid.nonzero()[:, 0].tolist()}")


def gather_tokens(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` (N, k) of `features` (N, L, C) as (N, k, C), untouched; gradients flow to `features`."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


@torch.no_grad()
def nearest_kept(
    features: torch.Tensor, kept: torch.Tensor, times: torch.Tensor | None = None, time_weight: float = 0.0
) -> torch.Tensor:
    """Which of the kept tokens each token is nearest to; a kept one is its own, also where two are equal.

    The distance is that of `select_rediprune`, 1 - cosine + time_weight |t_i - t_j|. Features (N, L, C), `kept` (N, k)
    ascending indices, times (N, L); returns LongTensor (N, L) with numbers in 0 .. k - 1.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=MIN_NORM)
        nearness = unit @ gather_tokens(unit, kept).mT
        if times is not None and time_weight:
            nearness -= time_weight * (times[:, :, None] - times.gather(1, kept)[:, None]).abs()
    nearest = first_largest(nearness.flatten(0, 1)).view(kept.shape[0], -1)
    return nearest.scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))


def group_sizes(nearest: torch.Tensor, num_kept: int) -> torch.Tensor:
    """How many tokens each kept one stands for, (N, k) fp32, from `nearest_kept`; adds up to L in each set."""
    ones = torch.ones_like(nearest, dtype=torch.float32)
    return ones.new_zeros(len(nearest), num_kept).scatter_add_(1, nearest, ones)


def group_means(features: torch.Tensor, nearest: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The mean (N, k, C) fp32 of the tokens that each kept one stands for; gradients flow to `features` (N, L, C)."""
    features = features.float()
    sums = features.new_zeros(len(features), num_kept, features.shape[-1])
    sums = sums.scatter_add(1, nearest[..., None].expand_as(features), features)
    return sums / group_sizes(nearest, num_kept)[..., None]


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


def in_double(values: torch.Tensor) -> torch.Tensor:
    """`values` in fp64; on the CPU where their device has none (MPS)."""
    return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def first_largest(scores: torch.Tensor, relative: bool = False) -> torch.Tensor:
    """(N, L) -> (N,): in each row the lowest index among the ties for the largest score.

    A tie lies within `TIE_TOLERANCE` of it or, if `relative`, within its `RELATIVE_TIE`-th part.
    """
    largest = scores.amax(1, keepdim=True)
    ties = scores >= largest - (RELATIVE_TIE * largest.abs() if relative else TIE_TOLERANCE)
    return ties.view(torch.uint8).argmax(1)  # argmax is defined to return the first of equals


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
