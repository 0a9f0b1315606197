"""A plain second way from a prompt and what was kept of its media to logits: one row, no batch, no padding, no cache.

Counts, places and the mask are worked out here from the definitions; of the model only the modules are used (vision
features and the tokens made of them come from `select_tokens`, which the caller checks).
"""

import numpy as np
import torch
from repository import code_module
from transformers.models.llava_next_video.modeling_llava_next_video import (
    get_anyres_image_grid_shape,
    unpad_image,
)

MOST_FRAMES = 4  # that the processor of the small models samples


class Layout:
    """
    The visual tokens of one medium before pruning.

    Attributes:
        sizes: (height, width) of each frame, or of the base view and the tiles of an image.
        sets: how many tokens each of them has.
        places: (n,) for each token, through all sets, its place in the unpruned medium.
        length: places of the unpruned medium; the rows of an image's tiles end with one that is no token.
    """

    def __init__(self, kind: str, size: tuple, frames: int, config, pooling: bool):
        side = config.vision_config.image_size // config.vision_config.patch_size
        if kind == "video":
            side = side // config.spatial_pool_stride if pooling else side
            self.sizes = [(side, side)] * min(frames, MOST_FRAMES)
            self.sets = [side**2] * len(self.sizes)
            self.length = sum(self.sets)
            self.places = np.arange(self.length)
            return
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        _, height, width = unpad_image(torch.zeros(1, rows * side, columns * side), size).shape
        base = side**2
        self.sizes = [(side, side), (height, width)]
        self.sets, self.length = [base, height * width], base + height * (width + 1)
        tiles = np.arange(height * width)
        self.places = np.concatenate([np.arange(base), base + tiles + tiles // width])

    @property
    def num_tokens(self) -> int:
        return sum(self.sets)

    def counts(self, pruning, kind: str) -> list:
        """How many tokens of each set stay, or of all together."""
        if pruning.resolved("scope") == "item" or pruning.resolved("scope") == "video" and kind == "video":
            return [count(self.num_tokens, pruning)]
        if pruning.method == "downsample":
            grid = code_module("core_layout").TokenGrid
            return [pruning.count_in_grid(grid(1, *size)) for size in self.sizes]
        return [count(size, pruning) for size in self.sets]


def count(num_tokens: int, pruning) -> int:
    """Tokens that stay of `num_tokens`: max(1, round(ratio n)), halves to even; `prumerge_plus` has a count of its own."""
    if num_tokens == 0:
        return 0
    if pruning.method == "prumerge_plus":
        return pruning.count(num_tokens)
    return max(1, round(pruning.keep_ratio * num_tokens))


class Row:
    """A row as the language model is to see it: embeddings (T, H), positions (T,), and how many tokens each stands for (T,)."""

    def __init__(self, model):
        self.model, self.next_position = model, 0
        width, device = model.config.text_config.hidden_size, model.device
        self.embeds = torch.zeros(0, width, device=device)
        self.positions, self.sizes = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, device=device)

    def __len__(self) -> int:
        return len(self.positions)

    def _append(self, embeds, positions, sizes) -> None:
        self.embeds = torch.cat([self.embeds, embeds])
        self.positions = torch.cat([self.positions, positions])
        self.sizes = torch.cat([self.sizes, sizes])

    def add_text(self, ids) -> "Row":
        positions = self.next_position + torch.arange(len(ids), device=ids.device)
        self._append(self.model.get_input_embeddings()(ids), positions, torch.ones(len(ids), device=ids.device))
        self.next_position += len(ids)
        return self

    def add_medium(self, medium, layout: Layout, pruning) -> "Row":
        """Adds what is kept of a medium (a `MediaItem` of the model)."""
        features = medium.tokens
        embeds = features if pruning.after_projector else self.model.model.multi_modal_projector(features)
        if medium.kind == "image" and not pruning.prunes:
            embeds = self._with_newlines(embeds, medium)
        number = len(embeds)
        sizes = torch.ones(number, device=embeds.device)
        if pruning.prunes and pruning.resolved("proportional_attention"):
            sizes = medium.token_sizes
        places, end = torch.arange(number), number
        if pruning.prunes and pruning.resolved("positions") == "original":
            places, end = torch.tensor(layout.places[medium.kept.cpu().numpy()]), layout.length
        self._append(embeds, self.next_position + places.to(embeds.device), sizes)
        self.next_position += end
        return self

    def _with_newlines(self, embeds, medium):
        base, tiles = medium.layout.grids
        rows = embeds[base.tokens_per_set :].unflatten(0, (tiles.height, tiles.width))
        newline = self.model.model.image_newline.expand(tiles.height, 1, -1)
        return torch.cat([embeds[: base.tokens_per_set], torch.cat([rows, newline], dim=1).flatten(0, 1)])

    def cut(self, length: int, next_position: int) -> "Row":
        """The first `length` tokens, after which text goes on at `next_position`."""
        short = Row(self.model)
        short._append(self.embeds[:length], self.positions[:length], self.sizes[:length])
        short.next_position = next_position
        return short

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """(T, V)."""
        number, device = len(self), self.embeds.device
        lowest = torch.finfo(torch.float32).min
        mask = torch.full((number, number), lowest, device=device).triu(1) + self.sizes.log()
        states = self.model.model.language_model(
            inputs_embeds=self.embeds[None],
            attention_mask=mask.clamp_min(lowest)[None, None],
            position_ids=self.positions[None],
            use_cache=False,
        )
        return self.model.lm_head(states.last_hidden_state)[0]
