"""Where the tokens of a pruned prompt stand in the unpruned one."""

import torch
import torch.nn.functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)
ANSWER_SHARE = 1 / 16  # of the positions, that shrunk ones leave for the answer
_WARNED_CONTEXTS = set()  # lengths that were warned about


def unpruned_columns(masks: dict, items: list) -> tuple:
    """
    The column of the unpruned prompt that each token of the pruned one comes from.

    Args:
        masks: for each kind of media (B, T) bool, the placeholders of the pruned prompt; the items of that kind fill them in
            order, row by row.
        items: `MediaItem`s with their kept indices.

    Returns:
        columns (B, T), and (B, T) how many columns are left out at each token: right before it, and, at the last token of an
        item, right after it. Two LongTensors.
    """
    mask = next(iter(masks.values()))
    before, after = (torch.zeros(mask.shape, dtype=torch.long, device=mask.device) for _ in range(2))
    for kind, mask in masks.items():
        group = [item for item in items if item.layout.kind == kind]
        if group:
            columns = [item.layout.columns(item.kept) for item in group]
            starts = [torch.diff(kept, prepend=kept.new_full((1,), -1)) - 1 for kept in columns]
            before[mask] = torch.cat(starts).to(mask.device)
            ends = [
                F.pad(item.layout.num_unpruned - 1 - kept[-1:], (len(kept) - 1, 0))
                for item, kept in zip(group, columns)
            ]
            after[mask] = torch.cat(ends).to(mask.device)
    skipped = before + after
    places = torch.arange(mask.shape[1], device=mask.device)
    return places + skipped.cumsum(1) - after, skipped


def shrunk_columns(columns: torch.Tensor, skipped: torch.Tensor, room: torch.Tensor) -> tuple:
    """
    Columns whose gaps are shrunk in proportion, so that a row leaves out no more than `room` in all. Their order is kept, and
    tokens with nothing between them stay neighbours, those of the text among them.

    Args:
        columns, skipped: (B, T), those of `unpruned_columns`.
        room: (B,) LongTensor, at least 0; rows that leave out less are as they were.

    Returns:
        Both, (B, T).
    """
    places = torch.arange(columns.shape[1], device=columns.device)
    total, room = skipped.sum(1, keepdim=True), room[:, None]

    def shrink(gaps):
        return torch.where(total > room, gaps * room // total.clamp_min(1), gaps)

    return places + shrink(columns - places), torch.diff(shrink(skipped.cumsum(1)), prepend=torch.zeros_like(total))


def room_for_gaps(limit: int, lengths: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """
    How many positions the rows of a prompt may leave out, (B,): all that they do while their unpruned prompts fit, else what
    leaves `ANSWER_SHARE` of the limit for the answer.

    Args:
        limit: the most positions of a prompt.
        lengths: (B,) tokens of each row, and positions that its cache has left out.
        skipped: (B,) what it leaves out.
    """
    shrunk = (limit - int(limit * ANSWER_SHARE) - lengths).clamp_min(0)
    return torch.where(lengths + skipped > limit, torch.minimum(shrunk, skipped), skipped)


def pooled_places(patches: torch.LongTensor, side: int, stride: int) -> torch.LongTensor:
    """For patches in a grid of `side` x `side` the index of the cell that pooling by `stride` would put them in."""
    pooled = side // stride
    row, column = patches // side // stride, patches % side // stride
    return row.clamp_max(pooled - 1) * pooled + column.clamp_max(pooled - 1)


def context_length(text_config) -> int:
    """How many positions the language model was made for."""
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    return int(text_config.max_position_embeddings * (rope.get("factor") or 1))


def check_context(text_config, length: int) -> None:
    """Raises ValueError where a prompt of `length` tokens, those of its cache included, is longer than the context."""
    if length > context_length(text_config):
        raise ValueError(
            f"the prompt has {length} tokens, but the language model takes at most {context_length(text_config)}; shorten the "
            "question, sample fewer frames, or lower keep_ratio or keep_tokens."
        )


def warn_beyond_context(text_config, position_ids: torch.Tensor) -> None:
    """
    Warns, once for each model size, where a prompt reaches positions that the language model was not made for. Compiled code
    does not ask, which would split its graph.
    """
    limit = context_length(text_config)
    if torch.compiler.is_compiling() or position_ids.shape[-1] == 1 or limit in _WARNED_CONTEXTS:
        return
    length = int(position_ids.max()) + 1
    if length > limit:
        _WARNED_CONTEXTS.add(limit)
        logger.warning(
            f"With positions='original' the tokens of this prompt keep the positions of the unpruned one, which has {length} "
            f"tokens, but the language model was made for {limit}. Beyond them answers get worse, without an error. Sample "
            "fewer frames (num_frames=), or set positions='scaled', which shrinks them into it. This is said once."
        )
