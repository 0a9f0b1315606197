"""A training run: its state on disk, its log, its optimizer and its learning rate."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from training.muon import Muon
from writing import replacing


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Warm up, stay, and fall to 2 % over the last quarter; longer runs share their beginning with shorter ones."""
    fall = min(1.0, (steps - step) / (0.25 * steps))
    return peak * min(1.0, (step + 1) / warmup) * max(0.02, fall)


class Optimizers:
    """Muon for matrices, AdamW for all other parameters: two optimizers that are used as one.

    With AdamW alone a second seed was still at chance after 5800 steps of the language stage.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], peak: float, matrices: list[nn.Parameter]):
        chosen = set(map(id, matrices))
        rest = [parameter for parameter in parameters if id(parameter) not in chosen]
        self.parts = [
            torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.02),
            Muon(matrices, lr=peak, weight_decay=0.02),
        ]

    @property
    def groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def update(self, loss: torch.Tensor) -> None:
        for part in self.parts:
            part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.groups for p in group["params"]], 1.0)
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Run:
    """Where a training run keeps its state: checkpoints of each stage, the log, and the seed."""

    def __init__(self, work_dir: Path, seed: int):
        self.work_dir, self.seed = work_dir, seed
        work_dir.mkdir(parents=True, exist_ok=True)
        self.log_path = work_dir / "training_log.jsonl"

    def rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))

    def log(self, **entry) -> None:
        with self.log_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        tqdm.write(json.dumps(entry))

    def path(self, stage: str) -> Path:
        return self.work_dir / f"{stage}.pt"

    def steps(
        self, stage: str, steps: int, peak: float, parts: dict[str, nn.Module], optimizer: Optimizers
    ) -> Iterator:
        """Yields (step, seconds so far) until `steps`, resuming and saving the `parts` as it goes."""
        first, seconds = 0, 0.0
        if self.path(stage).exists():
            state = torch.load(self.path(stage))
            first, seconds = state["step"], state["seconds"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer"])
        started = time.monotonic() - seconds
        bar = tqdm(range(first, steps), stage, initial=first, total=steps, mininterval=5)
        for step in bar:
            for group in optimizer.groups:
                group["lr"] = learning_rate(step, steps, peak)
            yield step, time.monotonic() - started
            if (step + 1) % 250 == 0 or step + 1 == steps:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"optimizer": optimizer.state_dict(), "step": step + 1, "seconds": time.monotonic() - started}
                with replacing(self.path(stage)) as temporary:
                    torch.save(state, temporary)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
