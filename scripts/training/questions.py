"""Draws the batches of the language stage: scenes, and what is asked about them."""

from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer
from toy_world import NUM_FRAMES, STILL_TYPES, Question, Scene, draw_questions
from training.features import Sample
from training.packing import Pack, Packer

# How often each question type is asked about one scene in a training step: the harder ones more often.
FRAME_PACK = {type_: 2 for type_ in STILL_TYPES}
IMAGE_PACK = {"colour": 1, "shape": 1, "place": 3, "count": 3, "presence": 2}
VIDEO_PACK = {"colour": 1, "shape": 1, "place": 3, "count": 3, "presence": 1, "motion": 3, "order": 2}
SECOND_TURN_SHARE = 0.15  # how many questions follow another one in the same chat


class Questioner:
    """Draws the batches of the language stage.

    Each method takes samples and their features (B, T, L, C), and returns the visual tokens (B, V, H) and the questions.
    """

    def __init__(self, family, model, tokenizer: Tokenizer):
        self.family, self.model = family, model
        self.packer = Packer(tokenizer)

    def __call__(self, kind, features, asked, rng=None, size=None) -> tuple[torch.Tensor, Pack]:
        """`size` is that of an image, (height, width). Without `rng` nothing is drawn: every question begins a chat."""
        visual = self.family.project(self.model, features, size)
        second = None if rng is None else rng.random(sum(map(len, asked))) < SECOND_TURN_SHARE
        prefix = self.family.prefix(self.packer, kind, visual.shape[1])
        pack = self.packer(prefix, asked, second)
        return visual, self.family.place(pack, features, size, rng)

    def videos(
        self, samples: list[Sample], features: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Pack]:
        """All frames, all question types."""
        asked = [ask(sample.scene, VIDEO_PACK, rng) for sample in samples]
        return self("video", features, asked, rng)

    def frames(
        self, samples: list[Sample], features: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Pack]:
        """One frame of each video and questions about what is visible in it: the first step of the curriculum."""
        times = rng.integers(NUM_FRAMES, size=len(samples))
        asked = []
        for sample, t in zip(samples, times, strict=True):
            things = tuple(thing for thing in sample.scene.things if thing.visible(t))
            asked.append(ask(replace(sample.scene, things=things), FRAME_PACK, rng))
        return self("video", features[torch.arange(len(samples)), torch.from_numpy(times)][:, None], asked, rng)

    def images(
        self, samples: list[Sample], features: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Pack]:
        """Images, all of one size."""
        asked = [ask(sample.scene, IMAGE_PACK, rng) for sample in samples]
        return self("image", features, asked, rng, samples[0].scene.frames.shape[1:3])


def ask(scene: Scene, pack: dict[str, int], rng: np.random.Generator) -> list[Question]:
    types = [type_ for type_, times in pack.items() for _ in range(times)]
    return draw_questions(scene.things, scene.counted, scene.frames.shape[1:3], types, rng)
