"""Position ids of a pruned prompt, when every token keeps the position that it has in the unpruned one."""

import torch
import torch.nn.functional as F


def position_gaps(mask: torch.Tensor, offsets: list, lengths: list) -> tuple:
    """
    How many positions of the unpruned prompt are left out at each token of the pruned one.

    Args:
        mask: (B, T) bool, the placeholders of the pruned prompt; the media fill them in order, row by row.
        offsets: for each medium the ascending offsets (k,) of its kept tokens within the unpruned medium.
        lengths: for each medium its number of tokens when nothing is pruned.

    Returns:
        two LongTensors (B, T): positions skipped right before each token, and, at the last token of a medium, right after it.
    """
    before, after = (torch.zeros(mask.shape, dtype=torch.long, device=mask.device) for _ in range(2))
    if offsets:
        starts = [torch.diff(kept, prepend=kept.new_full((1,), -1)) - 1 for kept in offsets]
        before[mask] = torch.cat(starts).to(mask.device)
        ends = [F.pad((length - 1 - kept[-1:]), (len(kept) - 1, 0)) for kept, length in zip(offsets, lengths)]
        after[mask] = torch.cat(ends).to(mask.device)
    return before, after


def image_offsets(base_size: int, width: int, kept_base: torch.Tensor, kept_tiles: torch.Tensor) -> torch.LongTensor:
    """Offsets of an image's kept tokens: the base view first, then rows of `width` tile tokens, each with its newline."""
    return torch.cat([kept_base, base_size + kept_tiles + kept_tiles // max(width, 1)])


def video_offsets(tokens_per_frame: int, kept: torch.Tensor) -> torch.LongTensor:
    """Offsets of a video's kept tokens (frames, k): frame after frame."""
    starts = torch.arange(kept.shape[0], device=kept.device) * tokens_per_frame
    return (kept + starts[:, None]).flatten()


def pooled_places(patches: torch.LongTensor, side: int, stride: int) -> torch.LongTensor:
    """For patches in a grid of `side` x `side` the index of the cell that pooling by `stride` would put them in."""
    pooled = side // stride
    row, column = patches // side // stride, patches % side // stride
    return row.clamp_max(pooled - 1) * pooled + column.clamp_max(pooled - 1)
