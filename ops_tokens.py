"""Building blocks of selection and merging: ties, cosines, gathering, and groups of tokens around kept ones.

Shapes: N sets of L tokens with C features each, of which k are kept.
"""

import torch
import torch.nn.functional as F

# Norms are floored here, so that a zero vector stays zero instead of turning into NaN.
MIN_NORM = 1e-12
# Scores this close are a tie. It is a little above the rounding error of an fp32 cosine; below it, the order
# of summation (batch size, number of threads, device) would decide which of two near-duplicates wins.
TIE_TOLERANCE = 1e-6
# Gains fall with the number of tokens and from pick to pick, so there a tie is this share of the largest one: what fp32 input
# does not tell apart. They are computed in fp64, whose rounding error is far below it.
RELATIVE_TIE = 1e-7


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raises ValueError, with the sets, where `values` (N, ...) are not finite."""
    invalid = ~values.isfinite().flatten(1).all(1)
    if invalid.any():
        raise ValueError(f"{name} hold NaN, infinite or too large values in sets {invalid.nonzero()[:, 0].tolist()}")


def gather_tokens(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` (N, k) of `features` (N, L, C) as (N, k, C), untouched; gradients flow to `features`."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


def first_largest(scores: torch.Tensor, relative: bool = False) -> torch.Tensor:
    """(N, L) -> (N,): in each row the lowest index among the ties for the largest score.

    A tie lies within `TIE_TOLERANCE` of it or, if `relative`, within its `RELATIVE_TIE`-th part.
    """
    largest = scores.amax(1, keepdim=True)
    ties = scores >= largest - (RELATIVE_TIE * largest.abs() if relative else TIE_TOLERANCE)
    return ties.view(torch.uint8).argmax(1)  # argmax is defined to return the first of equals


def top_tokens(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """(N, L) -> (N, k): the tokens with the largest scores, ascending. Scores are compared in steps of `TIE_TOLERANCE`, and
    of equals the lowest index wins. Raises ValueError where scores are NaN or infinite.
    """
    check_finite("scores", scores)
    order = (scores.float() / TIE_TOLERANCE).round().argsort(dim=1, descending=True, stable=True)
    return order[:, :num_kept].sort(dim=1).values


def in_double(values: torch.Tensor) -> torch.Tensor:
    """`values` in fp64; on the CPU where their device has none (MPS)."""
    return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def inverse_norms(features: torch.Tensor) -> torch.Tensor:
    """1 / norm of each token (N, L), finite for zeros."""
    return torch.linalg.vector_norm(features, dim=-1).clamp_min(MIN_NORM).reciprocal()


def cosines(features: torch.Tensor, inverse_norm: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Cosines (N, L) of tokens (N, L, C), whose `inverse_norms` are known, with queries (N, C)."""
    # The query is the left factor: so a set has the same sums alone and in a batch (CPU).
    return torch.bmm(F.normalize(query, dim=-1, eps=MIN_NORM)[:, None], features.mT)[:, 0] * inverse_norm


@torch.no_grad()
def nearest_kept(
    features: torch.Tensor, kept: torch.Tensor, times: torch.Tensor | None = None, time_weight: float = 0.0
) -> torch.Tensor:
    """The kept token that each token is nearest to; of a kept one itself, also where two are equal.

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
    """Numbers of tokens that each kept one stands for, (N, k) fp32, from `nearest_kept`; adds up to L in each set."""
    ones = torch.ones_like(nearest, dtype=torch.float32)
    return ones.new_zeros(len(nearest), num_kept).scatter_add_(1, nearest, ones)


def group_means(features: torch.Tensor, nearest: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The mean (N, k, C) fp32 of the tokens that each kept one stands for; gradients flow to `features` (N, L, C)."""
    features = features.float()
    sums = features.new_zeros(len(features), num_kept, features.shape[-1])
    sums = sums.scatter_add(1, nearest[..., None].expand_as(features), features)
    return sums / group_sizes(nearest, num_kept)[..., None]


def others(kept: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(N, k) -> (N, L - k): the indices that are not among the kept ones, ascending."""
    dropped = torch.ones(kept.shape[0], num_tokens, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return dropped.nonzero()[:, 1].view(kept.shape[0], -1)


def in_raster_order(features: torch.Tensor, source_indices: torch.Tensor) -> tuple:
    """Features (N, k, C) and the indices (N, k) whose places they take, both by ascending index."""
    source_indices, order = source_indices.sort(dim=1, stable=True)
    return gather_tokens(features, order), source_indices
