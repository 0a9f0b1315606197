"""What differs between the families that can be trained: one class for each, of which this is the base."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from toy_world import Scene
from training.packing import Pack, Packer
from training.recipe import Recipe
from training.tokenizing import BOS, build_tokenizer

LARGER = 0.06  # standard deviation of weights at first: three times that of wide models


class Family(ABC):
    """
    Attributes:
        name: the stock `model_type`.
        model_class: the stock model.
        processor_class: name of the stock processor.
        special_tokens: beginning, end and padding first, then all others.
        placeholders: of an image and of a video; `written` has the marks around them, too.
        public_names: the beginnings of module names, and what they are in the weight files of public checkpoints.
        chat_template: of the exported folder; `None` where public checkpoints of the family may have none.
        recipe: how long and with what it is trained.
    """

    max_length = 2048
    chat_template = None
    recipe = Recipe()

    def __init__(self, recipe: Recipe | None = None):
        self.recipe = recipe or self.recipe

    def build_tokenizer(self) -> Tokenizer:
        return build_tokenizer(self.special_tokens)

    def build_model(self, tokenizer: Tokenizer, seed: int) -> nn.Module:
        """With embeddings as large as what the layers add to them, so that words are not drowned at first."""
        torch.manual_seed(seed)
        model = self.model_class(self.build_config(tokenizer))
        nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
        return model

    @abstractmethod
    def build_config(self, tokenizer: Tokenizer):
        """The stock configuration of the tiny checkpoint."""

    # -- what is trained

    @abstractmethod
    def in_tower(self, name: str) -> bool:
        """Whether a parameter of this name is trained in the vision stage, and frozen in the other."""

    def matrices(self, parameters: dict[str, nn.Parameter]) -> list[nn.Parameter]:
        """Those of them that Muon trains: the matrices of blocks and projector."""
        return [p for name, p in parameters.items() if p.dim() == 2 and "embed" not in name and "lm_head" not in name]

    # -- vision stage

    @abstractmethod
    def image_views(self, scene: Scene) -> tuple[torch.Tensor, list[np.ndarray]]:
        """What the tower sees of an image: float32 (N, 3, H, W), and the object map of each view, (H, W)."""

    @abstractmethod
    def vision_heads(self, config) -> nn.Module:
        """What the tower is asked in its own stage."""

    @abstractmethod
    def look(self, model, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What the heads are given: (N, 3, H, W) -> patches (N, L, C), and states of the class token, each (N, C)."""

    # -- language stage

    @abstractmethod
    def encode(self, model, kind: str, scenes: list[Scene]) -> list[torch.Tensor]:
        """What the projector reads of each scene: float16 (T, L, C)."""

    @abstractmethod
    def project(self, model, features: torch.Tensor, image_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Features (B, T, L, C) as the stock model puts them into the prompt: (B, V, H). `image_size` is (height, width)."""

    def written(self, kind: str) -> str:
        """A medium as it is written in the text that the processor is given."""
        return self.placeholders[kind]

    def prefix(self, packer: Packer, kind: str, num_tokens: int) -> list[int]:
        """The ids up to the last placeholder and its marks."""
        before, after = self.written(kind).split(self.placeholders[kind])
        return (
            packer.encode(f"{BOS}USER: {before}")
            + packer.encode(self.placeholders[kind]) * num_tokens
            + packer.encode(after)
        )

    def place(self, pack: Pack, features: torch.Tensor, image_size=None, rng=None) -> Pack:
        """Gives the tokens the positions of the family; those of a pack are their places in the prompt."""
        return pack

    @abstractmethod
    def position_head(self, model) -> nn.Module:
        """What asks visual tokens where they are."""

    @abstractmethod
    def position_loss(self, model, head: nn.Module, features: torch.Tensor, pack: Pack, states: tuple) -> torch.Tensor:
        """The loss of that head on a batch; `states` are those of `answer_pack`."""

    # -- export

    def published_config(self, values: dict) -> dict:
        """The config.json of the installed transformers in a form that 4.57 and 5.x read."""
        return values

    @abstractmethod
    def processor_files(self) -> dict[str, dict]:
        """The processor's JSON files by name."""

    def media(self, kind: str, scene: Scene, number: int) -> dict:
        """What the stock processor is given for `number` prompts about a scene."""
        return {f"{kind}s": [scene.frames if kind == "video" else scene.frames[0]] * number}
