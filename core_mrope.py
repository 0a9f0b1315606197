"""Rotary positions of three numbers (time, height, width), as the Qwen models have them: M-RoPE.

A token of text has one number three times; a medium starts where the text before it ends, its tokens have the coordinates of
their places in its grid, and the text after it goes on behind the grid's larger side, so that a thousand tokens may take twenty
positions. Both is told here as in the models with one number: how far each token is moved from its place in the prompt, and, in
the record on the cache, how far each token moves all that follow. So nothing is kept on the model, where the stock classes keep
the difference of their last call.
"""

import torch
from transformers import GenerationMixin

from .core_cache import TokenRecord, cached_tokens
from .hub_versions import grid_positions


class MropeMixin:
    """For model classes, before `LanguageForwardMixin`: tokens at the three-number positions of the unpruned prompt."""

    def place_in_unpruned(self, pruning, masks, items, attention_mask=None, cache=None):
        """As in `LanguageForwardMixin`, whether anything is pruned or not: (3, B, T), and the record, which media always have."""
        mask = next(iter(masks.values()))
        offsets = torch.zeros(3, *mask.shape, dtype=torch.long, device=mask.device)
        skipped = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
        for kind, mask in masks.items():
            group = [self._places_of(item) for item in items if item.kind == kind]
            if group:
                offsets[:, mask], skipped[mask] = (torch.cat(parts, dim=-1).to(mask.device) for parts in zip(*group))
        before = skipped.cumsum(1) - skipped
        return TokenRecord(None, skipped.float()), offsets + before

    def _places_of(self, item) -> tuple:
        """
        Of the k kept tokens of an item.

        Returns:
            LongTensors: (3, k) its coordinates, from where its run of placeholders starts, and (k,) how far it moves what follows:
            back to the start of the run, and the last one behind the run.
        """
        (grid,) = item.layout.grids
        runs = [(1, grid.height, grid.width)] * grid.frames if item.layout.frames_apart else [grid[:3]]
        found, advance = grid_positions(self, item.kind, runs[0], item.layout.seconds)
        length = found.shape[1]
        kept = torch.arange(item.layout.num_tokens) if item.kept is None else item.kept.cpu()
        parts = []
        for run in range(len(runs)):
            places = kept[(kept >= run * length) & (kept < (run + 1) * length)] - run * length
            moves = torch.full((len(places),), -1)
            moves[-1] += advance
            parts.append((found[:, places], moves))
        return tuple(torch.cat(values, dim=-1) for values in zip(*parts))

    def positions_of(self, tokens, position_ids, moved, cache, attention_mask):
        """As in `LanguageForwardMixin`, but always given, (4, B, T): the place in the prompt, and the three numbers."""
        batch, number = tokens.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(number, device=tokens.device)[None] + cached_tokens(cache)
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -number:]
        if position_ids.dim() == 3:
            raise ValueError(
                f"position_ids have the shape {tuple(position_ids.shape)}, but must be (batch, tokens), the places in the pruned "
                "prompt; the three numbers of each token are found here. Leave position_ids out."
            )
        places = position_ids.to(tokens.device).expand(batch, -1)[None]
        return torch.cat([places, (places if moved is None else places + moved).expand(3, -1, -1)])


class MropeGenerationMixin:
    """For model classes, right before the stock class: what it would keep on the model while it generates."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args, **kwargs):  # of 5.x
        return GenerationMixin._prepare_position_ids_for_generation(self, *args, **kwargs)
