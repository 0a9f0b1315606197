"""HoliTom and PruneVid: what stands still in a part of a video becomes one token for all of its frames."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .methods_base import Method
from .methods_video import STILL_THRESHOLD, frames_of
from .ops_tokens import MIN_NORM
from .ops_video import cluster_means, cluster_tokens, most_of_rows, runs, share_out

STILL_WEIGHT = 0.6  # HoliTom's beta
NEIGHBOURS = 7
LONGEST_WINDOW = 1024  # frames
SEGMENT_SHARE = 0.25  # of the frames, PruneVid's number of segments
CLUSTER_SHARE, LEAST_CLUSTERED = 0.5, 15  # what PruneVid's clusters leave, and of how many tokens


class Window(NamedTuple):
    """Frames `start` to `stop` - 1, and which of their places stand still: bool (P,), none where it is one frame."""

    start: int
    stop: int
    still: torch.Tensor

    @property
    def sizes(self) -> list:
        """Tokens that are left when those that stand still became one for all frames: these, then of each frame the others."""
        number = int(self.still.sum())
        return [number, *[len(self.still) - number] * (self.stop - self.start)]


def loosened(windows: list, strengths: list, least: int) -> list:
    """
    The windows with so few places standing still that `least` tokens are left; the places that move most are given up first.

    Args:
        windows: of all frames.
        strengths: for each window (P,), how much its places stand still.
        least: at most the tokens of the video.
    """
    left = sum(sum(window.sizes) for window in windows)
    if left >= least:
        return windows
    still = [window.still.tolist() for window in windows]
    by_strength = sorted(
        (round(value, 6), number, place)
        for number, strength in enumerate(strengths)
        for place, value in enumerate(strength.tolist())
        if still[number][place]
    )
    for _, number, place in by_strength:
        if left < least:
            still[number][place] = False
            left += windows[number].stop - windows[number].start - 1
    return [
        window._replace(still=torch.tensor(places, device=window.still.device))
        for window, places in zip(windows, still)
    ]


class HoliTom(Method):
    """
    Windows of frames in which as much as can be stands still: what does becomes means over the window, clustered; of the rest
    of each frame the tokens that are attended to most stay (HoliTom, arXiv 2505.21334; its part before the language model).

    The budget is met exactly: it is shared out among the still tokens of each window and the other tokens of each frame by
    largest remainder. Where merging alone would leave fewer tokens, the places that move most are not merged.

    Parameters:
        still_threshold (`float`, defaults to 0.8): a place stands still from one frame to the next if the cosine of its tokens is
            above this; the paper has 0.65 at a keep ratio of 0.10.
    """

    required_signals = frozenset({"last_attention"})
    parameters = {"still_threshold": STILL_THRESHOLD}
    after_projector = True
    scope = "video"

    def reduce(self, tokens, num_kept, pruning):
        found = []
        for video, received in zip(frames_of(tokens, "features"), frames_of(tokens, "last_attention")):
            similarity = place_cosines(video)
            windows = still_windows(similarity > pruning.still_threshold)
            # A window of one frame has no similarity, and no place that stands still.
            strengths = [
                F.pad(similarity[start : stop - 1], (0, 0, 0, 1), value=1.0).amin(0) for start, stop, _ in windows
            ]
            windows = loosened(windows, strengths, num_kept)
            sizes = [size for window in windows for size in window.sizes]
            merged, places = merge_holitom(video, received, windows, share_out(sizes, num_kept, sizes))
            order = places.argsort()
            found.append((merged[order], places[order]))
        features, kept = (torch.stack(part) for part in zip(*found))
        return features.to(tokens.features.dtype), kept


@torch.no_grad()
def place_cosines(features: torch.Tensor) -> torch.Tensor:
    """(F, P, D) -> (F - 1, P) fp32: the cosine of each token with the one at its place in the next frame."""
    unit = F.normalize(features.float(), dim=-1, eps=MIN_NORM)
    return (unit[1:] * unit[:-1]).sum(-1)


def still_windows(still: torch.Tensor, longest: int = LONGEST_WINDOW) -> list:
    """
    Cuts a video into windows so that merging what stands still saves as many tokens as possible.

    Args:
        still: bool (F - 1, P), which places stand still from a frame to the next.
        longest: frames of a window, at most.

    Returns:
        `Window`s of all frames. Of equal ways the one with the shorter last window.
    """
    num_frames, steps_still = len(still) + 1, still.to("cpu", torch.long)
    # Up to each frame: for how many steps each place has stood still, the most that is saved, and the size of the last window.
    lasting, saved, sizes = torch.zeros_like(steps_still[:1].sum(0)), [0], [1]
    for frame in range(1, num_frames):
        lasting = (lasting + 1) * steps_still[frame - 1]
        steps = (
            torch.bincount(lasting, minlength=num_frames).flip(0).cumsum(0).flip(0).tolist()
        )  # places, by least steps
        best, size = saved[-1], 1
        for length in range(2, min(frame + 1, longest) + 1):
            before = saved[frame - length] if frame >= length else 0
            if before + (length - 1) * steps[length - 1] > best:
                best, size = before + (length - 1) * steps[length - 1], length
        saved.append(best)
        sizes.append(size)
    windows, stop, nowhere = [], num_frames, still.new_zeros(still.shape[1])
    while stop:
        start = stop - sizes[stop - 1]
        places = still[start : stop - 1].all(0) if stop - start > 1 else nowhere
        windows.append(Window(start, stop, places))
        stop = start
    return windows[::-1]


def merge_holitom(features, attention, windows, counts, weight=STILL_WEIGHT, neighbours=NEIGHBOURS) -> tuple:
    """
    Args:
        features: (F, P, D); gradients flow to them.
        attention: (F, P).
        windows: of all frames.
        counts: how many tokens stay of each part, in the order of `Window.sizes`.
        weight: of the centre of a cluster beside the mean of its other members.
        neighbours: of the density peaks.

    Returns:
        fp32 (k, D) and LongTensor (k,) f P + p, window by window; a token of a window stands in its first frame.
    """
    features, num_tokens = features.float(), features.shape[1]
    parts, indices, counts = [], [], iter(counts)
    for start, stop, still in windows:
        places, count = still.nonzero()[:, 0], next(counts)
        if count:
            means = features[start:stop, places].mean(0)
            centres, members = cluster_tokens(means.detach(), count, min(count, neighbours))
            others = torch.bincount(members, minlength=count).to(means)[:, None] - 1
            sums = cluster_means(means, members, count) * (others + 1) - means[centres]
            mixed = weight * means[centres] + (1 - weight) * sums / others.clamp_min(1)
            tokens = torch.where(others > 0, mixed, means[centres])
            order = centres.argsort()
            parts.append(tokens[order])
            indices.append(places[centres[order]] + start * num_tokens)
        moving = (~still).nonzero()[:, 0]
        of_frames = torch.tensor([next(counts) for _ in range(start, stop)])
        kept = most_of_rows(attention[start:stop, moving] * num_tokens, of_frames)
        frames, chosen = kept.nonzero(as_tuple=True)
        indices.append((frames + start) * num_tokens + moving[chosen])
        parts.append(features.flatten(0, 1)[indices[-1]])
    return torch.cat(parts), torch.cat(indices)


class PruneVid(Method):
    """
    Segments of similar frames; what stands still in one becomes its mean over the segment, and both the still tokens of a segment
    and the other tokens of each frame become means of clusters (PruneVid, arXiv 2412.16117; its part before the language model).

    In the paper each set of tokens is halved, here the budget is met exactly: it is shared out among the sets by largest
    remainder. Where merging alone would leave fewer tokens, the places that move most are not merged. A video has at least one
    segment.

    Parameters:
        still_threshold (`float`, defaults to 0.8): a place stands still in a segment if the mean cosine of its tokens in different
            frames is above this.
    """

    required_signals = frozenset()
    parameters = {"still_threshold": STILL_THRESHOLD}
    after_projector = True
    scope = "video"

    def reduce(self, tokens, num_kept, pruning):
        found = []
        for video in frames_of(tokens, "features"):
            windows, strengths = still_segments(video, frame_segments(video), pruning.still_threshold)
            windows = loosened(windows, strengths, num_kept)
            sizes = [size for window in windows for size in window.sizes]
            merged, places = merge_prunevid(video, windows, share_out(sizes, num_kept, sizes))
            order = places.argsort()
            found.append((merged[order], places[order]))
        features, kept = (torch.stack(part) for part in zip(*found))
        return features.to(tokens.features.dtype), kept


@torch.no_grad()
def frame_segments(features: torch.Tensor, share: float = SEGMENT_SHARE) -> list:
    """The lengths of the segments of a video (F, P, D): clusters of its frames by their mean tokens, made contiguous."""
    frames = features.float().mean(1)
    _, clusters = cluster_tokens(frames, max(1, int(share * len(frames))), NEIGHBOURS)
    return [length for _, length, _ in runs(contiguous(clusters.tolist()))]


def contiguous(labels: list) -> list:
    """
    Labels of frames of which each label keeps its longest runs alone, if they are longer than one frame. What lies between takes
    the label of the longer of the runs beside it, from left to right, of equal ones the left.
    """
    found = runs(labels)
    longest = {label: max(length for _, length, of in found if of == label) for label in labels}
    kept = [label if length == longest[label] > 1 else None for _, length, label in found for _ in range(length)]
    labels, index = list(kept), 0
    while index < len(labels):
        if labels[index] is not None:
            index += 1
            continue
        stop = index
        while stop < len(labels) and labels[stop] is None:
            stop += 1
        left = runs(labels[:index])[-1] if index else (0, 0, 0)
        right = runs(labels[stop:])[0] if stop < len(labels) else (0, 0, 0)
        labels[index:stop] = [(right if right[1] > left[1] else left)[2]] * (stop - index)
        index = stop
    return labels


@torch.no_grad()
def still_segments(features: torch.Tensor, segments: list, threshold: float) -> tuple:
    """The segments of a video (F, P, D) as `Window`s, and for each how much its places stand still: (P,) fp32."""
    unit = F.normalize(features.float(), dim=-1, eps=MIN_NORM)
    windows, strengths, start = [], [], 0
    for length in segments:
        sums = unit[start : start + length].sum(0).square().sum(-1)
        strengths.append((sums - length) / max(1, length * (length - 1)))
        still = (strengths[-1] > threshold) if length > 1 else torch.zeros_like(sums, dtype=torch.bool)
        windows.append(Window(start, start + length, still))
        start += length
    return windows, strengths


def released_count(size: int, share: float = CLUSTER_SHARE) -> int:
    """How many tokens the authors' code leaves of a set of PruneVid's."""
    return int(share * size) if size >= LEAST_CLUSTERED else size


def merge_prunevid(features, windows, counts) -> tuple:
    """
    Args:
        features: (F, P, D); gradients flow to them.
        windows: of all frames.
        counts: how many tokens stay of each set, in the order of `Window.sizes`.

    Returns:
        fp32 (k, D) and LongTensor (k,) f P + p: segment by segment its still tokens, in its first frame, then the others frame by
        frame. In a set that was clustered the best centres come first.
    """
    features, num_tokens = features.float(), features.shape[1]
    parts, indices, counts = [], [], iter(counts)
    for start, stop, still in windows:
        places, moving = still.nonzero()[:, 0], (~still).nonzero()[:, 0]
        sets = [(features[start:stop, places].mean(0), places, start)]
        sets += [(features[frame, moving], moving, frame) for frame in range(start, stop)]
        for tokens, of_set, frame in sets:
            count = next(counts)
            if not count:
                continue
            if count < len(tokens):
                centres, members = cluster_tokens(tokens.detach(), count, NEIGHBOURS)
                tokens, of_set = cluster_means(tokens, members, count), of_set[centres]
            parts.append(tokens)
            indices.append(of_set + frame * num_tokens)
    return torch.cat(parts), torch.cat(indices)
