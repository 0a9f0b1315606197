"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): a matrix moves in all its directions at one pace.

In float32. That of torch rounds to bfloat16, which CPUs without instructions for it multiply fifteen times as slowly.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the post: small singular values grow fastest
PACE = 0.2  # root mean square of a step at a learning rate of 1, as AdamW's (Liu et al., arXiv 2502.16982, section 2.2)


class Muon(torch.optim.Optimizer):
    """For matrices only, with decoupled weight decay and Nesterov's momentum."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                directions = orthogonal(torch.stack([self._momentum(matrix) for matrix in matrices]))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(direction, alpha=-group["lr"] * PACE * max(shape) ** 0.5)

    def _momentum(self, matrix: nn.Parameter) -> torch.Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(state["momentum"], MOMENTUM)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (N, R, C) with all singular values brought near 1, by Newton-Schulz steps; the zero matrix stays."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if wide.shape == matrices.shape else wide.mT
