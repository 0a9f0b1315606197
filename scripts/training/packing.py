"""Questions about scenes as token ids: many of them share one visual prefix, and each sees the prefix and itself only."""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from toy_world import Question
from training.tokenizing import EOS, PAD, first_turn, later_turn


@dataclass
class Pack:
    """Questions about B scenes, packed behind their visual prefixes. All tensors are (B, T).

    `segment` is 0 in the prefix, i + 1 in the i-th chat, -1 in padding. `position` is (3, B, T) in families with three numbers a
    token. `owner` is the number of the question whose answer a token belongs to (in `types`), -1 elsewhere. `places`, where the
    family has them, are frame, row and column of the V visual tokens, (V, 3).
    """

    ids: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    owner: torch.Tensor
    types: list[str]
    places: torch.Tensor | None = None

    def mask(self) -> torch.Tensor:
        """Which token sees which: bool (B, 1, T, T). A token sees the prefix and its own chat, up to itself."""
        query, key = self.segment[:, :, None], self.segment[:, None]
        return (((key == 0) | (key == query)).tril())[:, None]


class Packer:
    """Turns questions into token ids, exactly as the tokenizer would cut the whole chat."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.token_to_id(PAD)
        self.pieces: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.pieces:
            self.pieces[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.pieces[text]

    def __call__(self, prefix: list[int], asked: list[list[Question]], second_turns: np.ndarray | None = None) -> Pack:
        """`second_turns` (bool, one per question of all scenes) says which questions go on with the chat before them."""
        types, rows = [], []
        for questions in asked:
            ids, segment, position, owner = (
                list(prefix),
                [0] * len(prefix),
                list(range(len(prefix))),
                [-1] * len(prefix),
            )
            chat = 0
            for i, question in enumerate(questions):
                follows = i > 0 and second_turns is not None and second_turns[len(types)]
                start = position[-1] + 1 if follows else len(prefix)
                chat += not follows
                text = self.encode((later_turn if follows else first_turn)(question))
                answer = self.encode(f" {question.answer}{EOS}")
                ids += text + answer
                segment += [chat] * (len(text) + len(answer))
                position += range(start, start + len(text) + len(answer))
                owner += [-1] * len(text) + [len(types)] * len(answer)
                types.append(question.type)
            rows.append((ids, segment, position, owner))
        length = max(len(row[0]) for row in rows)
        columns = zip(*rows, strict=True)
        padded = (
            torch.tensor([values + [fill] * (length - len(values)) for values in column])
            for column, fill in zip(columns, (self.pad, -1, 0, -1), strict=True)
        )
        return Pack(*padded, types)


def answer_pack(model, pack: Pack, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Loss over the answers of a pack, which questions are answered right, bool (len(pack.types),), and the states (B, T, H) before
    and behind each layer.

    `visual` (B, V, H) are the projected visual tokens. Right means that every token of the answer and its end token is the
    most likely one, given the ones before it: what greedy generation produces.
    """
    config = model.config
    embeds = model.get_input_embeddings()(pack.ids)
    placeholder = (pack.ids == config.image_token_id) | (pack.ids == config.video_token_id)
    embeds = embeds.masked_scatter(placeholder[..., None], visual.to(embeds.dtype))
    outputs = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=pack.mask(),
        position_ids=pack.position,
        use_cache=False,
        output_hidden_states=True,
    )
    answer = pack.owner[:, 1:] >= 0
    logits = model.lm_head(outputs.last_hidden_state[:, :-1][answer])
    target = pack.ids[:, 1:][answer]
    wrong = torch.bincount(pack.owner[:, 1:][answer], (logits.argmax(-1) != target).float(), len(pack.types))
    return F.cross_entropy(logits, target), wrong == 0, outputs.hidden_states
