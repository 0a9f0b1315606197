"""VidCom2, FastVID and FlashVID: tokens of a video by what is unusual in it, and by segments of similar frames."""

import math

import torch
import torch.nn.functional as F

from .methods_base import Method
from .methods_settings import integer, number, switch
from .ops_tokens import MIN_NORM, check_finite, first_largest
from .ops_video import (
    cluster_means,
    cluster_tokens,
    cut_segments,
    density_peaks,
    highest,
    most_of_rows,
    share_out,
    spans,
)

# Settings that several video methods share.
LEAST_SEGMENTS = integer(8, 1)
SEGMENT_THRESHOLD = number(0.9, -1, 1, "a cosine in [-1, 1]")
STILL_THRESHOLD = number(0.8, -1, 1, "a cosine in [-1, 1]")

WIDTHS = tuple(2.0**exponent for exponent in range(-3, 2))  # of VidCom2's Gaussians
FRAME_TEMPERATURE = 0.01
CHANNEL_SHARE = 0.5
CONTEXT_SHARE, ANCHOR_INTERVAL, ANCHOR_WEIGHT, NEIGHBOURS = 0.4, 4, 0.6, 4  # FastVID's d, p, beta and k

ATTENDED_SHARE, MOST_NEIGHBOURS = 0.7, 7  # FlashVID's alpha, and k of its clusters


def frames_of(tokens, name: str) -> torch.Tensor:
    """A signal (N, L, ...) of sets of F frames as (N, F, P, ...); one frame where the grid of the sets is not known."""
    values = getattr(tokens, name)
    check_finite(name, values)
    num_frames = 1 if tokens.grid is None else tokens.grid[0]
    return values.unflatten(1, (num_frames, -1))


def frame_counts(shares: list, total: int, num_tokens: int) -> list:
    """`total` tokens divided among frames of `num_tokens` by their shares (largest remainder), each at least one if they suffice."""
    least = int(total >= len(shares))
    whole = sum(shares)
    beyond = [max(0, total * share / whole - least) for share in shares]
    parts = share_out(beyond, total - least * len(shares), [num_tokens - least] * len(shares))
    return [least + part for part in parts]


class VidCom2(Method):
    """
    The tokens that are least like the mean of the video and of their frame; frames that are unlike the others keep more (VidCom2,
    arXiv 2505.14454).

    The shares of the frames are rounded so that they add up to the budget; the authors' code rounds each by itself.
    """

    required_signals = frozenset({"projected"})
    scope = "video"

    @torch.no_grad()
    def select(self, tokens, num_kept, pruning):
        videos = frames_of(tokens, "projected")
        num_sets, _, num_tokens, _ = videos.shape
        counts, unusual = [], []
        for video in videos:
            scores, shares = vidcom2_scores(video, num_kept / tokens.projected.shape[1])
            counts.append(frame_counts(shares.tolist(), num_kept, num_tokens))
            unusual.append(scores)
        kept = most_of_rows(torch.stack(unusual), torch.tensor(counts))
        return kept.flatten(1).nonzero()[:, 1].view(num_sets, num_kept)


@torch.no_grad()
def vidcom2_scores(features: torch.Tensor, keep_ratio: float) -> tuple:
    """
    Args:
        features: (F, P, D) projected tokens of a video.
        keep_ratio: the share of tokens that stay of the video.

    Returns:
        (F, P) how unusual each token is, and (F,) the share of its tokens that each frame keeps, at most 1; both fp32.
    """
    features = features.float()
    flat = features.flatten(0, 1)
    variance = flat.var(0, unbiased=False)
    steady = variance.argsort(stable=True)[: int(flat.shape[1] * CHANNEL_SHARE)].sort().values
    unit = F.normalize(features[..., steady], dim=-1, eps=MIN_NORM)
    to_video = _closeness(unit, unit.mean((0, 1)))
    to_frame = _closeness(unit, unit.mean(1, keepdim=True))
    unlike = -to_video.mean(1)
    weights = ((unlike - unlike.max()) / FRAME_TEMPERATURE).softmax(0)
    shares = (keep_ratio * (1 + weights - weights.mean())).clamp_max(1)
    return -(to_video + to_frame), shares


def _closeness(unit: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The sum of Gaussians of several widths of the distance to a centre."""
    squared = (unit - centre).square().sum(-1)
    return sum((-squared / (2 * width)).exp() for width in WIDTHS)


class FastVID(Method):
    """
    Of each frame the tokens that CLS attends to most, and for each segment of similar frames anchors into which its other
    tokens are merged (FastVID, arXiv 2503.11187).

    The paper's towers have a pooling head; here the attention and the features of CLS take its place. The budget is met exactly:
    parts that the authors' code rounds down are rounded so that they add up to it. Where a segment has more anchors than its
    anchor frames have tokens, there are more anchor frames.

    Parameters:
        least_segments (`int`, defaults to 8): into so many segments at least a video is cut, where its frames are least similar.
        segment_threshold (`float`, defaults to 0.9): it is cut wherever the cosine of two frames in turn is below this.
    """

    required_signals = frozenset({"cls_attention", "cls_features"})
    parameters = {"least_segments": LEAST_SEGMENTS, "segment_threshold": SEGMENT_THRESHOLD}
    after_projector = True
    scope = "video"
    positions = "original"

    def reduce(self, tokens, num_kept, pruning):
        videos = frames_of(tokens, "features")
        attention, of_frames = frames_of(tokens, "cls_attention"), frames_of(tokens, "cls_features")[:, :, 0]
        found = []
        for video, received, frames in zip(videos, attention, of_frames):
            similarity = neighbour_cosines(frames)
            segments = cut_segments(similarity, pruning.least_segments, pruning.segment_threshold)
            plan = fastvid_plan(segments, video.shape[1], num_kept)
            found.append(merge_fastvid(video, received, segments, *plan))
        features, kept = (torch.stack(part) for part in zip(*found))
        return features.to(tokens.features.dtype), kept


@torch.no_grad()
def neighbour_cosines(frames: torch.Tensor) -> torch.Tensor:
    """(F, C) -> (F - 1,) fp32: the cosine of each frame with the next."""
    unit = F.normalize(frames.float(), dim=-1, eps=MIN_NORM)
    return (unit[1:] * unit[:-1]).sum(-1)


def fastvid_plan(segments: list, num_tokens: int, num_kept: int) -> tuple:
    """
    How many tokens of each frame are salient, and how many are anchors, so that `num_kept` stay.

    Returns:
        two lists, a number for each frame, and the set of segments whose frames have anchors of their own.
    """
    num_frames = sum(segments)
    context = int(num_kept * CONTEXT_SHARE)
    salient = share_out([1] * num_frames, num_kept - context, [num_tokens] * num_frames)
    free = [num_tokens - number for number in salient]
    of_segments = share_out(segments, context, [sum(free[span]) for span in spans(segments)])
    anchors, own = [0] * num_frames, set()
    for index, (span, total) in enumerate(zip(spans(segments), of_segments)):
        interval = ANCHOR_INTERVAL
        while sum(free[frame] for frame in anchor_frames(span, interval)) < total:
            interval -= 1
        frames = anchor_frames(span, interval)
        for frame, share in zip(frames, share_out([1] * len(frames), total, [free[frame] for frame in frames])):
            anchors[frame] = share
        if len(frames) == span.stop - span.start:
            own.add(index)
    return salient, anchors, own


def anchor_frames(span: slice, interval: int) -> list:
    """The last frame of a segment, and every so many before it."""
    return list(range(span.stop - 1, span.start - 1, -interval))[::-1]


def merge_fastvid(features, attention, segments, salient, anchors, own=frozenset(), weight=ANCHOR_WEIGHT) -> tuple:
    """
    Salient tokens as they are, and anchors with the tokens that are merged into them.

    Args:
        features: (F, P, D); gradients flow to them.
        attention: (F, P).
        segments: lengths of the segments of frames.
        salient, anchors: for each frame how many of its tokens are salient, and how many of the rest are anchors.
        own: segments in each of whose frames the anchors merge tokens of that frame alone.
        weight: the least weight of an anchor beside the mean of what is merged into it.

    Returns:
        fp32 (k, D) and LongTensor (k,) f P + p, by ascending place.
    """
    num_tokens, device = features.shape[1], features.device
    features = features.float()
    is_salient = most_of_rows(attention * num_tokens, torch.tensor(salient))
    places = is_salient.flatten().nonzero()[:, 0]
    parts, indices = [features.flatten(0, 1)[places]], [places]
    for index, span in enumerate(spans(segments)):
        rest = (~is_salient[span]).flatten().nonzero()[:, 0] + span.start * num_tokens
        for frame in range(span.start, span.stop):
            if not anchors[frame]:
                continue
            of_frame = (~is_salient[frame]).nonzero()[:, 0]
            scores, _ = density_peaks(features[frame, of_frame].detach(), NEIGHBOURS)
            chosen = of_frame[highest(scores, anchors[frame]).sort().values.to(device)] + frame * num_tokens
            merged = of_frame + frame * num_tokens if index in own else rest
            parts.append(_merge_into_anchors(features.flatten(0, 1), chosen, merged, weight))
            indices.append(chosen)
    places, order = torch.cat(indices).sort()
    return torch.cat(parts)[order], places


def _merge_into_anchors(tokens, anchors, merged, weight: float) -> torch.Tensor:
    """Anchors (a,) with the mean of the `merged` tokens (n,), themselves included, that are most similar to each: (a, D)."""
    with torch.no_grad():
        unit = F.normalize(tokens, dim=-1, eps=MIN_NORM)
        nearest = first_largest(unit[merged] @ unit[anchors].T)
        nearest[torch.searchsorted(merged, anchors)] = torch.arange(len(anchors), device=nearest.device)
        sizes = torch.bincount(nearest, minlength=len(anchors)).to(tokens)[:, None]
        share = (1 / (sizes + 1)).clamp_min(weight)
    sums = tokens.new_zeros(len(anchors), tokens.shape[1]).index_add(0, nearest, tokens[merged])
    return share * tokens[anchors] + (1 - share) * sums / sizes


class FlashVID(Method):
    """
    Of each frame tokens that are attended to and far from one another; the others are merged along trees through the frames of a
    segment, and the roots of each frame by clusters (FlashVID, arXiv 2602.08024; its part before the language model).

    The budget is the one that goes to the language model; the paper's is 1.25 times its ratio, since a layer of the model prunes
    again. The budget is met exactly, the clusters of a segment shared out among its frames by largest remainder. In a
    segment of one frame the tokens that were picked are not merged once more.

    Parameters:
        least_segments (`int`, defaults to 8): as in `FastVID`. With so many segments as frames no tree is ever built.
        segment_threshold (`float`, defaults to 0.9): as in `FastVID`; the frames are compared by their mean tokens.
        still_threshold (`float`, defaults to 0.8): a token is merged into the one of the frame before that is most similar to it
            if their cosine is above this.
        weigh_by_segment (`bool`, defaults to `True`): tokens that are like the mean of their segment's frames are picked first, as
            in the authors' code for LLaVA; their code for Qwen leaves that out.
        mean_of_trees (`bool`, defaults to `False`): a tree becomes the mean of its tokens. The authors' code divides by the number
            of those that were merged into the root itself, so that a chain through three frames or more grows.
    """

    required_signals = frozenset({"last_attention"})
    parameters = {
        "least_segments": LEAST_SEGMENTS,
        "segment_threshold": SEGMENT_THRESHOLD,
        "still_threshold": STILL_THRESHOLD,
        "weigh_by_segment": switch(True),
        "mean_of_trees": switch(False),
    }
    after_projector = True
    scope = "video"

    def reduce(self, tokens, num_kept, pruning):
        found = []
        for video, received in zip(frames_of(tokens, "features"), frames_of(tokens, "last_attention")):
            num_frames, num_tokens, _ = video.shape
            similarity = neighbour_cosines(video.float().mean(1))
            segments = cut_segments(similarity, pruning.least_segments, pruning.segment_threshold)
            budgets = share_out([1] * num_frames, num_kept, [num_tokens] * num_frames)
            counts = [math.ceil(ATTENDED_SHARE * budget) for budget in budgets]
            picked = pick_attended(video, received, counts, segments if pruning.weigh_by_segment else None)
            found.append(
                merge_flashvid(video, picked, segments, budgets, pruning.still_threshold, pruning.mean_of_trees)
            )
        features, kept = (torch.stack(part) for part in zip(*found))
        return features.to(tokens.features.dtype), kept


@torch.no_grad()
def pick_attended(features, attention, counts: list, segments: list = None) -> torch.Tensor:
    """
    Max-min diversity in each frame, where the distance to a token is weighted by the attention that it receives.

    Args:
        features: (F, P, D).
        attention: (F, P).
        counts: how many tokens of each frame are picked.
        segments: lengths of segments; with them a token's weight is also its product with the mean of its segment's frames.

    Returns:
        bool (F, P).
    """
    features, weights = features.float(), attention.float()
    weights = weights / weights.mean(1, keepdim=True).clamp_min(MIN_NORM)
    if segments is not None:
        means = features.mean(1)
        of_segments = torch.cat(
            [means[span].mean(0, keepdim=True).expand(len(means[span]), -1) for span in spans(segments)]
        )
        likeness = (features @ of_segments[..., None])[..., 0]
        weights = weights * likeness / likeness.abs().amax(1, keepdim=True).clamp_min(MIN_NORM)
    unit = F.normalize(features, dim=-1, eps=MIN_NORM)
    distances = 1 - unit @ unit.mT
    distances.diagonal(dim1=1, dim2=2).zero_()
    scores = distances * weights[:, None]
    frames = torch.arange(len(features), device=features.device)
    picked = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    best = scores.kthvalue(min(2, scores.shape[1]), dim=1).values
    left = torch.tensor(counts, device=scores.device)
    for step in range(max(counts)):
        pick = first_largest(best.masked_fill(picked, -torch.inf))
        picked[frames, pick] |= step < left
        row = scores[frames, pick]
        best = row if step == 0 else torch.minimum(best, row)
    return picked


def merge_flashvid(features, picked, segments, budgets, threshold: float, mean_of_trees: bool = False, released=False):
    """
    Picked tokens as they are, and of each frame the roots of the trees of the others, clustered to what is left of the budget.

    Args:
        features: (F, P, D); gradients flow to them.
        picked: bool (F, P), at most as many as the budgets.
        segments: lengths of the segments of frames.
        budgets: tokens of each frame.
        threshold: cosine above which a token is merged into one of the frame before.
        mean_of_trees: see `FlashVID`.
        released: as in the authors' code: the clusters of each frame are rounded up, and in a segment of one frame all tokens are
            clustered, so that places may repeat.

    Returns:
        fp32 (k, D) and LongTensor (k,) f P + p, by ascending place.
    """
    features, num_tokens = features.float(), features.shape[1]
    places = picked.flatten().nonzero()[:, 0]
    parts, indices = [features.flatten(0, 1)[places]], [places]
    for span in spans(segments):
        values, roots = features[span], ~picked[span]
        budget = sum(budgets[span])
        if len(values) > 1:
            values, roots = merge_trees(values, picked[span], threshold, budget, mean_of_trees)
        elif released:
            roots = torch.ones_like(roots)
        sizes, wanted = roots.sum(1).tolist(), budget - int(picked[span].sum())
        if released:
            share = wanted / max(1, sum(sizes))
            clusters = [math.ceil(size * share) if share < 1 else size for size in sizes]
        else:
            clusters = share_out(sizes, wanted, sizes)
        for frame, count in enumerate(clusters):
            of_frame = roots[frame].nonzero()[:, 0]
            tokens = values[frame, of_frame]
            if 0 < count < len(tokens):
                centres, members = cluster_tokens(tokens.detach(), count, min(count, MOST_NEIGHBOURS))
                tokens, of_frame = cluster_means(tokens, members, count), of_frame[centres]
            if count:
                parts.append(tokens)
                indices.append(of_frame + (span.start + frame) * num_tokens)
    places, order = torch.cat(indices).sort(stable=True)
    return torch.cat(parts)[order], places


def merge_trees(features, picked, threshold: float, least: int, mean_of_trees: bool) -> tuple:
    """
    Links each token of a segment of frames (m, P, D) to the most similar one of the frame before, and merges along links above the
    threshold, or a higher one, so that at least `least` tokens are left; picked ones (m, P) neither merge nor are merged into.

    Returns:
        the merged tokens (m, P, D), and bool (m, P), which are roots that were not picked.
    """
    num_frames, num_tokens, width = features.shape
    with torch.no_grad():
        unit = F.normalize(features, dim=-1, eps=MIN_NORM)
        similarity = (unit[1:] @ unit[:-1].mT).masked_fill(picked[1:, :, None] | picked[:-1, None], -1)
        links = first_largest(similarity.flatten(0, 1))
        strength = similarity.flatten(0, 1).gather(1, links[:, None])[:, 0].view(num_frames - 1, num_tokens)
        strength, links = F.pad(strength, (0, 0, 1, 0), value=-1.0), links.view(num_frames - 1, num_tokens)
        most = strength.numel() - least  # that may be merged
        if (strength > threshold).sum() > most:
            threshold = (
                max(float(strength.flatten().sort(descending=True).values[most - 1]), -1 + 1e-6) if most else 2.0
            )
        merged = strength > threshold
    sums, counts = list(features), [features.new_ones(num_tokens) for _ in range(num_frames)]
    for frame in range(num_frames - 1, 0, -1):
        leaving = merged[frame].nonzero()[:, 0]
        parents = links[frame - 1, leaving]
        members = counts[frame][leaving] if mean_of_trees else torch.ones_like(counts[frame][leaving])
        sums[frame - 1] = sums[frame - 1].index_add(0, parents, sums[frame][leaving])
        counts[frame - 1] = counts[frame - 1].index_add(0, parents, members)
    return torch.stack(sums) / torch.stack(counts)[..., None], ~merged & ~picked
