"""What the demo does with a video, without its pages: reads it within limits, encodes it once, answers, and draws what was kept."""

import copy
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import torch
from ask import generate, times
from drawing.page import page
from drawing.pictures import pictures_of, pixels_of
from drawing.trace import Panel, ratio_grid, trace
from media import chat_prompt
from repository import StageTimer

MAX_BYTES = 64 * 2**20  # of an upload
MAX_PIXELS = 3840 * 2160  # of a frame
MAX_SECONDS = 600
MAX_QUESTION = 400  # characters
MAX_NEW_TOKENS = 64
RATIO_STOPS = 36  # of the slider over the kept patches
VIDEO = {"videos": [None]}  # what a prompt is made for: one video, read before


class Refused(Exception):
    """What a visitor did that cannot be answered, in plain words."""


@dataclass(frozen=True)
class Video:
    """
    A video as the model sees it, encoded.

    Attributes:
        encoded: the model's `EncodedMedia`, on the CPU.
        panels: its frames, a `Panel` each.
        seconds: how long reading and encoding took.
    """

    encoded: object
    panels: list
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(layout.num_tokens for layout in self.encoded.layouts)


class Engine:
    """
    One model for all visitors. It holds nothing of theirs, and any number of threads can use it at the same time.

    Args:
        model, processor: as `repository.load` returns them.
    """

    def __init__(self, model, processor):
        if "video" not in processor.placeholders:
            raise ValueError(f"{type(model).__name__} takes no videos, which is what this demo asks about")
        settings = model.config.pruning.to_dict()
        self._methods = {
            name: self._with_method(model, processor, {**settings, "method": name}) for name in _methods_of(model)
        }
        self.default_method = settings["method"] if settings["method"] in self._methods else next(iter(self._methods))
        self.default_ratio = settings["keep_ratio"]
        self.warm_up()

    @staticmethod
    def _with_method(model, processor, settings: dict) -> tuple:
        """Model and processor with a method of their own and the same weights, so that no call changes settings of another."""
        pruning = type(model.config.pruning).from_value(settings)
        model, processor = copy.copy(model), copy.copy(processor)
        model.config = copy.deepcopy(model.config)
        model.config.pruning = processor.pruning = pruning
        return model, processor

    @property
    def methods(self) -> list:
        return list(self._methods)

    def warm_up(self) -> None:
        """Answers once about black frames: the first call of a process is slower than all others."""
        processor = self._methods[self.default_method][1]
        frames = [np.zeros((32, 32, 3), dtype=np.uint8)] * (processor.video_processor.num_frames or 8)
        video = self._encode(frames)
        for keep_ratio in (0.5, 1.0):
            self.answer(video, "?", self.default_method, keep_ratio)

    def open_video(self, content: bytes) -> Video:
        """
        Reads and encodes a video.

        Raises:
            Refused: it is too large, or no video.
        """
        if len(content) > MAX_BYTES:
            raise Refused(f"This file is too large: at most {MAX_BYTES // 2**20} MB are taken. Cut or compress it.")
        try:
            width, height, seconds = self._announced_size(content)
        except ValueError as error:
            raise Refused("This file cannot be read as a video. MP4, WebM and MOV files work.") from error
        if width * height > MAX_PIXELS:
            raise Refused(f"The frames of this video are {width} x {height}, but at most 3840 x 2160 are taken.")
        if seconds is None or seconds > MAX_SECONDS:
            length = "does not tell its length" if seconds is None else f"is {seconds / 60:.0f} minutes long"
            raise Refused(f"This video {length}, but at most {MAX_SECONDS // 60} minutes are taken.")
        try:
            return self._encode(content)
        except ValueError as error:
            raise Refused("This video is damaged: its frames cannot be decoded. Save it again and retry.") from error

    def _announced_size(self, content: bytes) -> tuple:
        code = type(self._methods[self.default_method][1]).__module__.rpartition(".")[0]
        return import_module(f"{code}.inputs_video").announced_size(content)

    @torch.inference_mode()
    def _encode(self, video) -> Video:
        model, processor = self._methods[self.default_method]
        start = time.perf_counter()
        prompt = chat_prompt(processor, VIDEO, "?")
        inputs = processor(text=prompt, videos=[video], return_tensors="pt").to(model.device, model.dtype)
        encoded = model.encode_media(**inputs, methods=self.methods, device="cpu")
        seconds = time.perf_counter() - start
        layouts = model.layouts_of(pixels_of(inputs), None, processor.pruning)
        (pictures,) = pictures_of(model, processor, inputs, layouts)
        return Video(encoded, [Panel(label, picture) for label, picture in pictures], seconds)

    @torch.inference_mode()
    def answer(self, video: Video, question: str, method: str, keep_ratio: float) -> dict:
        """
        The answer to a question with what it took: `answer`, `visual_tokens`, `prompt_tokens`, `new_tokens`, `seconds` by stage,
        `total_seconds`.

        Raises:
            Refused: the question cannot be asked.
        """
        model, processor = self._checked(question, method, keep_ratio)
        try:
            inputs = self._inputs(video, question, method, keep_ratio)
            with StageTimer(model) as timer:
                limits = SimpleNamespace(max_new_tokens=MAX_NEW_TOKENS)
                result = generate(limits, model, processor, inputs)
        except ValueError as error:
            raise Refused(f"The model refuses this question: {error}") from error
        return {**result, **times(timer.seconds)}

    @torch.inference_mode()
    def kept_page(self, video: Video, question: str, method: str, keep_ratio: float) -> str:
        """A page of HTML: the frames with their kept patches, at `keep_ratio` and others, and what they were compared by."""
        model, _ = self._checked(question, method, keep_ratio)
        asked = SimpleNamespace(inputs=lambda text, block: self._inputs(video, text, method, block.keep_ratio))
        pruning = model.config.pruning
        ratios = ratio_grid(model, asked, pruning, [keep_ratio], RATIO_STOPS)
        kept = trace(model, asked, question, method, pruning, ratios)
        return page(video.panels, [[kept]], f"{method}: {question}", [keep_ratio])

    def _checked(self, question, method, keep_ratio) -> tuple:
        if not question.strip():
            raise Refused("Type a question first.")
        if len(question) > MAX_QUESTION:
            raise Refused(f"The question has {len(question)} characters, but at most {MAX_QUESTION} are taken.")
        if method not in self._methods:
            raise Refused(f"There is no such method here. Choose one of {', '.join(self._methods)}.")
        if not 0 < keep_ratio <= 1:
            raise Refused("The share of tokens to keep must be above 0 and at most 1.")
        return self._methods[method]

    def _inputs(self, video: Video, question: str, method: str, keep_ratio: float) -> dict:
        model, processor = self._methods[method]
        prompt = chat_prompt(processor, VIDEO, question)
        inputs = processor(text=prompt, encoded_media=video.encoded, keep_ratio=keep_ratio, return_tensors="pt")
        return {**inputs.to(model.device), "encoded_media": video.encoded}


def _methods_of(model) -> list:
    """The methods that choose from what one pass of the encoder gave, before the language model, so that it can be drawn."""
    registry = sys.modules[type(model.config.pruning).__module__].METHODS
    others = [name for name, method in registry.items() if method.merges_in_encoder or method.inner is not None]
    return [name for name in registry if name not in {"none", *others}]
