"""The questions of prompts in the forms that methods compare visual tokens with."""

import re

import torch

from .inputs_text_tower import question_segments
from .inputs_words import content_words


class QuestionInputsMixin:
    """For processors with `pruning`, `placeholders`, a tokenizer and a chat template."""

    def question_inputs(self, prompts: list) -> dict:
        """The questions of prompts in the forms that the pruning block asks for: `clip_inputs`, `word_inputs`, or nothing."""
        inputs = self.clip_inputs(prompts) if self.pruning.reads_clip else {}
        return {**inputs, **self.word_inputs(prompts)} if self.pruning.reads_words else inputs

    def clip_inputs(self, prompts: list) -> dict:
        """
        The questions of prompts for the text tower of the pruning block.

        Returns:
            `clip_input_ids` and `clip_attention_mask`, LongTensors (prompts, segments, tokens), see `question_segments`.
        """
        ids, mask = question_segments(self.pruning.text_tower, self._questions(prompts))
        return {"clip_input_ids": ids, "clip_attention_mask": mask}

    def word_inputs(self, prompts: list) -> dict:
        """
        The content words of the questions of prompts, tokenized by themselves.

        Returns:
            `word_input_ids`, LongTensor (prompts, tokens), with -1 after those of the shorter ones.
        """
        texts = [" ".join(content_words(question)) for question in self._questions(prompts)]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = torch.full((len(ids), max(map(len, ids))), -1)
        for row, tokens in zip(rows, ids):
            row[: len(tokens)] = torch.tensor(tokens)
        return {"word_input_ids": rows}

    def _questions(self, prompts: list) -> list:
        """Of each prompt what follows the last placeholder, without what the chat template adds to ask for an answer."""
        either_token = "|".join(map(re.escape, self.placeholders.values()))
        questions = [re.split(either_token, prompt)[-1].strip() for prompt in prompts]
        ending = self._generation_prompt()
        return [question.removesuffix(ending).strip() for question in questions]

    def _generation_prompt(self) -> str:
        """What the chat template puts after a question to ask for an answer, such as `"ASSISTANT:"`."""
        if not isinstance(self.chat_template, str):
            return ""
        chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        asked = self.apply_chat_template(chat, add_generation_prompt=True)
        return asked.removeprefix(self.apply_chat_template(chat, add_generation_prompt=False)).strip()
