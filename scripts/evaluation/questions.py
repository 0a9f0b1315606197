"""The held-out questions, and what the model answers to them."""

import argparse
import dataclasses
import threading

import numpy as np
import torch
from repository import at_least_one
from toy_world import FRAMES_PER_SECOND, HELD_OUT_END, HELD_OUT_START, TABLES_START, sample_image, sample_video

MAX_NEW_TOKENS = 6
CONSTANT_QUERY = "what do you see?"


def add_scene_arguments(parser: argparse.ArgumentParser, number: int, first: int = TABLES_START) -> None:
    """Adds `--scenes` and `--first-scene`; `check_scenes` checks them together."""
    parser.add_argument(
        "--scenes", type=at_least_one, default=number, help="held-out scenes of a kind (default: %(default)s)"
    )
    parser.add_argument(
        "--first-scene",
        type=int,
        default=first,
        metavar="SEED",
        help=f"seed of the first of them, at least {HELD_OUT_START} (default: %(default)s; toy_world.py says who uses which)",
    )


def check_scenes(parser: argparse.ArgumentParser, args) -> None:
    """Ends the program where a scene of `args` is one of training, or none at all."""
    last = args.first_scene + args.scenes - 1
    if not HELD_OUT_START <= args.first_scene <= last < HELD_OUT_END:
        parser.error(
            f"--first-scene {args.first_scene} --scenes {args.scenes}: held-out scenes have the numbers {HELD_OUT_START} to "
            f"{HELD_OUT_END - 1}; the tables begin at {TABLES_START}"
        )


class Questions:
    """
    The held-out questions of one kind, with the scenes that they are about.

    Args:
        kind: `"video"` or `"image"`.
        num_scenes: how many scenes, of consecutive seeds.
        first_scene: the seed of the first one.
    """

    def __init__(self, kind: str, num_scenes: int, first_scene: int = TABLES_START):
        self.kind = kind
        sample = sample_video if kind == "video" else sample_image
        self.scenes = [sample(seed) for seed in range(first_scene, first_scene + num_scenes)]
        asked = [(index, question) for index, scene in enumerate(self.scenes) for question in scene.questions]
        self.scene_of = np.array([index for index, _ in asked])
        self.texts = [question.question for _, question in asked]
        self.types = np.array([question.type for _, question in asked])
        self.answers = [question.answer for _, question in asked]

    def __len__(self) -> int:
        return len(self.texts)

    def batches(self, size: int) -> list:
        """(first question, number of questions) of every batch: the same however many processes share them."""
        return [(start, min(size, len(self) - start)) for start in range(0, len(self), size)]

    def media(self, index: int):
        frames = self.scenes[self.scene_of[index]].frames
        return frames if self.kind == "video" else frames[0]

    def prompt(self, processor, text: str) -> str:
        content = [{"type": self.kind}, {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def inputs(self, processor, start: int, number: int, keep_ratio: float):
        part = range(start, start + number)
        prompts = [self.prompt(processor, self.texts[index]) for index in part]
        return processor(text=prompts, **self.media_inputs(part), keep_ratio=keep_ratio, padding=True)

    def media_inputs(self, indices) -> dict:
        """What the processor is given beside the prompts of these questions."""
        media = [self.media(index) for index in indices]
        if self.kind == "image":
            return {"images": media}
        about = [{"total_num_frames": len(frames), "fps": FRAMES_PER_SECOND} for frames in media]
        return {"videos": media, "video_metadata": about}

    def mean_over_media(self, number_of) -> float:
        """The mean over the questions of `number_of(index)`, asked for the first question about media of each shape."""
        shapes = [self.media(index).shape for index in range(len(self))]
        numbers = {shape: number_of(shapes.index(shape)) for shape in set(shapes)}
        return float(np.mean([numbers[shape] for shape in shapes]))

    def visual_tokens(self, processor, keep_ratio: float, index: int) -> int:
        """How many visual tokens the prompt of a question has."""
        token = getattr(processor, f"{self.kind}_token_id")
        return int((self.inputs(processor, index, 1, keep_ratio)["input_ids"] == token).sum())

    def text_of_another(self, index: int, seed: int) -> str:
        """The question of another sample: one about a scene other than that of question `index`."""
        others = np.flatnonzero(self.scene_of != self.scene_of[index])
        return self.texts[np.random.default_rng((seed, index)).choice(others)]

    def query_prompt(self, processor, which: str, index: int, seed: int) -> str:
        """The prompt whose question the control `which` (`"other"` or `"constant"`) selects for."""
        return self.prompt(processor, self.text_of_another(index, seed) if which == "other" else CONSTANT_QUERY)

    def query(self, processor, which: str, index: int, seed: int) -> list:
        """The tokens of that question: all after the placeholder."""
        ids = processor.tokenizer(self.query_prompt(processor, which, index, seed))["input_ids"]
        return ids[ids.index(getattr(processor, f"{self.kind}_token_id")) + 1 :]


class OtherQuery:
    """
    Lets the model select tokens for another text than the question that it answers: a control.

    `tokens`: for each row of this thread's batch the tokens of that text; `None` = the question itself, as always.
    """

    def __init__(self, model):
        self.model, self.prune, self._thread = model, model.prune_items, threading.local()
        model.prune_items = self

    @property
    def tokens(self):
        return getattr(self._thread, "tokens", None)

    @tokens.setter
    def tokens(self, tokens):
        self._thread.tokens = tokens

    def __call__(self, items, pruning, question, *args, **kwargs):
        if self.tokens is not None:
            table = self.model.get_input_embeddings()
            ids = [torch.tensor(row, device=table.weight.device) for row in self.tokens]
            question = dataclasses.replace(question, ids=ids, embeds=[table(row) for row in ids])
        return self.prune(items, pruning, question, *args, **kwargs)


@torch.inference_mode()
def answer(model, processor, inputs) -> list:
    """The model's greedy answers to a batch that is on its device."""
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
