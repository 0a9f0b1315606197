"""Questions about where visual tokens are, whose losses are added in the language stage; not part of the checkpoint."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class PositionHead(nn.Module):
    """Asks each projected visual token for its sixth of the height and of the width; not part of the checkpoint.

    Without it the projector learns from the first answers (colours, shapes) to drop position, and questions about place and
    motion wait long until it has come back.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rows_and_columns = nn.Linear(width, 12)

    def forward(self, projected: torch.Tensor) -> torch.Tensor:
        """The loss over projected tokens (..., L, H), L a square number."""
        side = math.isqrt(projected.shape[-2])
        logits = self.rows_and_columns(self.norm(projected)).unflatten(-1, (2, 6)).flatten(0, -4)
        sixth = torch.arange(side) * 6 // side
        target = torch.stack([sixth[:, None].expand(side, side), sixth[None].expand(side, side)], -1).flatten(0, 1)
        return F.cross_entropy(logits.flatten(0, -2), target.expand(len(logits), -1, -1).flatten())


class PlaceHead(nn.Module):
    """Asks each visual token, behind an early language layer, for its frame, row and column; not part of the checkpoint.

    Rotary positions say only how far two tokens are apart. Where a token is has to be written down from that, and this is learnt
    late if nothing but answers asks for it.

    Args:
        width: of the states of that layer.
    """

    SIZES = (8, 12, 12)  # frames of a video, rows and columns of the largest image

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.places = nn.Linear(width, sum(self.SIZES))

    def forward(self, pack, states: torch.Tensor) -> torch.Tensor:
        """The loss over the visual tokens of a pack; `states` (B, T, H) are those behind the layer."""
        mark = int((pack.segment[0] == 0).sum()) - 1  # that behind the visual tokens
        states = states[:, mark - len(pack.places) : mark]
        logits = self.places(self.norm(states)).split(self.SIZES, -1)
        targets = pack.places.expand(len(states), -1, -1).unbind(-1)
        losses = [F.cross_entropy(part.flatten(0, 1), of.flatten()) for part, of in zip(logits, targets, strict=True)]
        return torch.stack(losses).mean()
