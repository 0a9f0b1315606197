"""What the frozen tower sees in the scenes, computed once and kept in files."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from toy_world import IMAGE_SIZES, Scene, sample_image, sample_video
from tqdm import tqdm
from training.recipe import FOLLOWED_SCENES, SHARD
from writing import write_whole


@dataclass
class Sample:
    """A scene as the language stage sees it: `features`, float16 (T, L, C), are what the family's projector reads."""

    features: torch.Tensor
    scene: Scene  # without its pixels


@torch.no_grad()
def encode_scenes(family, model, kind: str, seeds: range) -> list[Sample]:
    """Renders scenes and runs the vision tower over them."""
    samples = []
    for start in tqdm(range(seeds.start, seeds.stop, 16), f"features of {kind}s", mininterval=5):
        scenes = [
            (sample_video if kind == "video" else sample_image)(s) for s in range(start, min(start + 16, seeds.stop))
        ]
        samples += [
            Sample(part.clone(), replace(scene, frames=scene.frames[:, :, :, :0]))
            for part, scene in zip(family.encode(model, kind, scenes), scenes, strict=True)
        ]
    return samples


def held_out_scenes(family, model) -> dict[str, list[Sample]]:
    """The scenes of both kinds that training is followed on."""
    return {kind: encode_scenes(family, model, kind, FOLLOWED_SCENES) for kind in ("video", "image")}


def cached_scenes(family, model, kind: str, shard: int, work_dir: Path) -> list[Sample]:
    """Shard `shard` of the training scenes of a kind, from the cache where it is there."""
    path = work_dir / f"features-{kind}-{shard:03d}.pkl"
    if path.exists():
        with path.open("rb") as file:
            return pickle.load(file)
    samples = encode_scenes(family, model, kind, range(shard * SHARD, (shard + 1) * SHARD))
    write_whole(path, pickle.dumps(samples))
    return samples


def stack(samples: list[Sample]) -> torch.Tensor:
    """Features of samples of one shape: float32 (B, T, L, C)."""
    return torch.stack([sample.features.float() for sample in samples])


class ScenePool:
    """The training scenes in use, more and more of them, so that training starts before all features are computed."""

    def __init__(self, family, model, kind: str, shards: int, work_dir: Path):
        self.family, self.model, self.kind, self.shards, self.work_dir = family, model, kind, shards, work_dir
        self.samples: list[Sample] = []

    def grow(self, shards: int) -> None:
        while len(self.samples) < SHARD * min(shards, self.shards):
            shard = len(self.samples) // SHARD
            self.samples += cached_scenes(self.family, self.model, self.kind, shard, self.work_dir)

    def draw(self, rng: np.random.Generator, number: int) -> list[Sample]:
        if self.kind == "video":
            return [self.samples[i] for i in rng.choice(len(self.samples), number, replace=False)]
        size = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
        samples = []
        while len(samples) < number:
            sample = self.samples[rng.integers(len(self.samples))]
            samples += [sample] if sample.scene.frames.shape[1:3] == size else []
        return samples
