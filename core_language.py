"""The stock forward pass after the media are in their places: at original positions, and weighed by token sizes."""

from inspect import signature

import torch

from .core_attention import biased_mask
from .core_cache import TokenRecord, all_sizes, cached_tokens, read_record, write_record
from .core_layout import images_of_prompts
from .core_positions import room_for_gaps, shrunk_columns, warn_beyond_context
from .hub_versions import CACHE_NAME


class LanguageForwardMixin:
    """For model classes, right before the stock class: its forward pass, with what the cache records of pruned tokens."""

    def run_language_model(self, prompt, attention_mask, position_ids, stock, record=None, columns=None):
        """
        The stock forward pass, at the positions and with the token sizes that are recorded in the cache and in `record`.

        Args:
            prompt: `input_ids` or `inputs_embeds`, and pixels where nothing is pruned.
            stock: the other arguments of the stock forward pass.
            record: the `TokenRecord` of the prompt; `None` = nothing was skipped in it, and each token stands for itself.
            columns: (B, T), those of `unpruned_columns`; `None` = 0..T-1.
        """
        cache, places = stock[CACHE_NAME], stock.get("cache_position")
        num_layers = self.config.text_config.num_hidden_layers
        tokens = prompt["inputs_embeds"] if prompt.get("input_ids") is None else prompt["input_ids"]
        cached = read_record(cache, num_layers)
        num_cached = 0 if record is None else cached_tokens(cache, places)
        if columns is not None and attention_mask is None:
            # Without a mask, gaps between positions are read as the borders of packed sequences.
            total = num_cached + tokens.shape[1]
            attention_mask = torch.ones(len(tokens), total, dtype=torch.long, device=tokens.device)
        if cached is not None or columns is not None:
            own = torch.arange(tokens.shape[1], device=tokens.device)
            shift = 0 if columns is None else columns.to(tokens.device) - own
            if cached is not None:
                shift = shift + cached.skipped.to(tokens.device).sum(1, keepdim=True).long()
            position_ids = own[None] + cached_tokens(cache) if position_ids is None else position_ids
            position_ids = position_ids + shift
            warn_beyond_context(self.config.text_config, position_ids)
        sizes = all_sizes(cached, record, num_cached)
        if sizes is not None:
            embeds = tokens if tokens.is_floating_point() else self.get_input_embeddings()(tokens)
            bias = sizes.to(embeds.device).clamp_min(1).log()
            attention_mask = biased_mask(attention_mask, bias, embeds, cache, places)
        outputs = super().forward(
            **prompt, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **stock
        )
        cache = outputs.get(CACHE_NAME) if cache is None else cache
        if cache is not None and (cached is not None or record is not None):
            if record is None:
                record = TokenRecord(None, torch.zeros(tokens.shape[:2], dtype=torch.float32, device=tokens.device))
            write_record(cache, num_layers, record, num_cached)
        return outputs

    def scaled_columns(self, columns, skipped, attention_mask, cache) -> tuple:
        """`unpruned_columns` (B, T) of a prompt, shrunk where they leave the context of the language model."""
        config = self.config.text_config
        cached, total = read_record(cache, config.num_hidden_layers), cached_tokens(cache) + columns.shape[1]
        lengths = columns.new_full((len(columns),), total)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:  # padding takes no position
            lengths = attention_mask.sum(1).to(columns)
        if cached is not None:
            lengths = lengths + cached.skipped.sum(1).to(columns)
        return shrunk_columns(columns, skipped, room_for_gaps(config, lengths, skipped.sum(1)))

    def stock_pixels(self, pixels: dict, image_sizes) -> dict:
        """Pixels by the names that the stock forward pass has for them in this version of transformers."""
        names = signature(super().forward).parameters
        image = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
        given = {image: pixels["image"], "pixel_values_videos": pixels["video"], "image_sizes": image_sizes}
        if "batch_num_images" in names and image_sizes is not None:
            given["batch_num_images"] = images_of_prompts(image_sizes)
        return {name: values for name, values in given.items() if values is not None}
