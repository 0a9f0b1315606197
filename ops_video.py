"""What video methods are made of: segments of frames, the share of each part in a budget, clusters around density peaks."""

import math

import torch

from .ops_tokens import RELATIVE_TIE, TIE_TOLERANCE, check_finite, first_largest, in_double, top_tokens


def share_out(shares: list, total: int, most: list) -> list:
    """
    `total` divided in proportion to `shares`: rounded down, what is left to the largest remainders, of equals to the first.

    Args:
        shares: not negative; all equal where they add up to nothing.
        total: at most sum(most).
        most: what each part can take; what is beyond that is divided among the others.
    """
    parts, left, unfilled = [0] * len(shares), total, [index for index, size in enumerate(most) if size > 0]
    while left:
        weight = math.fsum(shares[index] for index in unfilled)
        quotas = {index: left * shares[index] / weight if weight > 0 else left / len(unfilled) for index in unfilled}
        filled = [index for index in unfilled if quotas[index] >= most[index]]
        for index in filled:
            parts[index] = most[index]
            left -= most[index]
        if filled:
            unfilled = [index for index in unfilled if index not in filled]
            continue
        for index in unfilled:
            parts[index] = int(quotas[index])
        left -= sum(parts[index] for index in unfilled)
        # Remainders that differ by a rounding error are equal.
        by_remainder = sorted(unfilled, key=lambda index: (-round(quotas[index] - parts[index], 9), index))
        for index in by_remainder[:left]:
            parts[index] += 1
        left = 0
    return parts


@torch.no_grad()
def most_of_rows(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Bool (..., L): the tokens with the `counts` (...) largest scores of each row. Ties as in `top_tokens`.

    Raises:
        ValueError: scores are NaN or infinite.
    """
    check_finite("scores", scores)
    order = (scores.float() / TIE_TOLERANCE).round().argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return ranks < counts[..., None].to(ranks.device)


@torch.no_grad()
def cut_segments(similarity: torch.Tensor, least: int, threshold: float) -> list:
    """
    The lengths of the segments of a video: it is cut where the similarity is below the threshold, and where it is smallest, so
    that there are at least `least` segments, or as many as frames.

    Args:
        similarity: (F - 1,) of each frame to the next.
        least: at least 1.

    Raises:
        ValueError: similarity is NaN or infinite.
    """
    num_frames = len(similarity) + 1
    cut = similarity < threshold
    cut[top_tokens(-similarity[None], min(least, num_frames) - 1)[0]] = True
    ends = [*(cut.nonzero()[:, 0] + 1).tolist(), num_frames]
    return [end - start for start, end in zip([0, *ends], ends)]


def spans(lengths: list) -> list:
    """Lengths of segments as slices of frames."""
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return [slice(end - length, end) for end, length in zip(ends, lengths)]


def runs(labels: list) -> list:
    """The runs of equal labels as (first, length, label)."""
    found = []
    for index, label in enumerate(labels):
        if found and found[-1][2] == label:
            found[-1][1] += 1
        else:
            found.append([index, 1, label])
    return [tuple(run) for run in found]


@torch.no_grad()
def density_peaks(features: torch.Tensor, neighbours: int) -> tuple:
    """
    How well each token would do as the centre of a cluster.

    A distance is the Euclidean one over the root of C. The density of a token is exp(-mean of the squared distances to its
    nearest `neighbours`, itself included); its peak is the distance to the nearest denser token, and the largest distance of all
    for the densest. Densities that differ by a rounding error are equal; everything is computed in fp64.

    Args:
        features: (n, C) with n >= 1.
        neighbours: all tokens where there are fewer.

    Returns:
        scores (n,), density times peak, and distances (n, n), both fp64.
    """
    values = in_double(features)
    values = values - values.mean(0)
    norms = values.square().sum(1)
    squared = (norms[:, None] + norms - 2 * values @ values.T).clamp_min(0) / max(1, values.shape[1])
    squared.fill_diagonal_(0)
    distances = squared.sqrt()
    spread = squared.topk(min(neighbours, len(squared)), dim=1, largest=False).values.mean(1)
    denser = spread < spread[:, None] - RELATIVE_TIE * spread.max()
    peak = torch.where(denser, distances, torch.inf).amin(1)
    peak = torch.where(peak.isinf(), distances.max(), peak)
    return (-spread).exp() * peak, distances


@torch.no_grad()
def highest(scores: torch.Tensor, number: int) -> torch.LongTensor:
    """Of scores (n,) the places of the `number` largest, the largest first, ties to the first: within 1e-6 of the largest."""
    steps = scores / scores.max().clamp_min(torch.finfo(scores.dtype).tiny) / TIE_TOLERANCE
    return steps.round().argsort(descending=True, stable=True)[:number]


@torch.no_grad()
def cluster_tokens(features: torch.Tensor, number: int, neighbours: int) -> tuple:
    """
    Clusters tokens around the `number` highest density peaks.

    Args:
        features: (n, C) with n >= number >= 1.

    Returns:
        the centres LongTensor (number,), the best first, and for each token the number of the cluster that it belongs to,
        LongTensor (n,): that of the nearest centre, a centre to its own.
    """
    scores, distances = density_peaks(features, neighbours)
    centres = highest(scores, number)
    nearness = -distances[:, centres] / distances.max().clamp_min(torch.finfo(distances.dtype).tiny)
    members = first_largest(nearness)
    members[centres] = torch.arange(number, device=members.device)
    return centres.to(features.device), members.to(features.device)


def cluster_means(features: torch.Tensor, members: torch.Tensor, number: int) -> torch.Tensor:
    """The means (number, C) of the tokens (n, C) of each cluster; gradients flow to the tokens."""
    sums = features.new_zeros(number, features.shape[1]).index_add(0, members, features)
    return sums / torch.bincount(members, minlength=number).to(sums)[:, None]
