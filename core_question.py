"""The question of each prompt: which of its tokens it is, and what the methods compare the visual tokens with."""

import itertools
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Optional

import torch


@dataclass
class Question:
    """
    The questions of a batch.

    Attributes:
        embeds: for each row the input embeddings (T, H) of its question.
        ids: for each row its token ids (T,); `None` where the prompt was passed as embeddings.
        clip: (B, D) fp32, the questions in CLIP's joint space; `None` where they are not compared there.
        words: for each row the input embeddings (T', H) of its content words; `None` where they are not looked up.
    """

    embeds: list
    ids: Optional[list] = None
    clip: Optional[torch.Tensor] = None
    words: Optional[list] = None


def question_mask(is_medium, attention_mask=None, labels=None, query_mask=None) -> torch.Tensor:
    """(B, T) bool: the text after the last placeholder (B, T) of each row that is neither padding nor an answer."""
    num_tokens = is_medium.shape[1]
    is_question = is_medium.flip(1).cumsum(1).flip(1) == 0
    if isinstance(attention_mask, dict):  # one for each kind of attention layer
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is not None:
        is_question &= _visible(attention_mask, num_tokens).to(is_question.device)
    if query_mask is not None:
        is_question &= query_mask[:, -num_tokens:].bool().to(is_question.device)
    elif labels is not None:
        is_question &= (labels == -100).to(is_question.device)
    return is_question


def _visible(attention_mask, num_tokens: int) -> torch.Tensor:
    """Which of the last `num_tokens` tokens are not padding, (B, num_tokens) bool, from a 2-D or an expanded 4-D mask."""
    if attention_mask.dim() == 2:
        return attention_mask[:, -num_tokens:].bool()
    # The last token sees every token but padding. A static cache is longer than the prompt, which it starts with.
    last_row = attention_mask[:, 0, -1, :num_tokens]
    return last_row if last_row.dtype == torch.bool else last_row == 0


def check_masks(shape, num_cached: int, attention_mask, query_mask=None) -> None:
    """
    Refuses masks that do not cover the tokens of the cache and of the prompt, whose ids have the given shape (B, T).

    Raises:
        ValueError: a mask has another shape.
    """
    batch, number = shape
    total = num_cached + number
    is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
    if is_2d and attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be {(batch, total)}: one entry for each token "
            f"of the cache ({num_cached}) and of the prompt ({number}). Pass the one that the processor returned with the "
            "prompt."
        )
    if query_mask is not None and (query_mask.dim() != 2 or len(query_mask) != batch or query_mask.shape[1] < number):
        raise ValueError(
            f"query_mask has shape {tuple(query_mask.shape)}, but must be ({batch}, {number}) as the prompt, or longer: then "
            "its last entries are those of the prompt."
        )


def seeds_of_sets(question: Question, items: list, pruning) -> dict:
    """For each item (by id) one seed for each of its sets; they depend on the sample's question alone."""
    seeds, counters = {}, defaultdict(itertools.count)
    for item in items:
        text = b"" if question.ids is None else question.ids[item.row].cpu().numpy().tobytes()
        start = zlib.crc32(text, pruning.seed)
        counter = counters[item.row]
        seeds[id(item)] = [[start + next(counter) for _ in range(number)] for number, _ in item.layout.sets(pruning)]
    return seeds
