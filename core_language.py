"""The stock forward pass after the media are in their places: at original positions, and weighed by token sizes."""

import math
from inspect import signature

import torch

from .core_attention import distance_bias, let_kernel_take_bias, takes_masks, weighed
from .core_cache import TokenRecord, all_sizes, cached_tokens, read_record, write_record
from .core_inner import check_two_part_call, dynamic_cache, read_inner, two_part_forward
from .core_layout import images_of_prompts
from .core_positions import context_length, room_for_gaps, shrunk_columns, unpruned_columns, warn_beyond_context
from .hub_versions import CACHE_NAME


class LanguageForwardMixin:
    """For model classes, right before the stock class: its forward pass, with what the cache records of pruned tokens."""

    layers_in_two_parts = staticmethod(two_part_forward)  # by a name of the model, where tools can time it

    def place_in_unpruned(self, pruning, masks: dict, items: list, attention_mask=None, cache=None) -> tuple:
        """
        Where the tokens of a prompt stand in the unpruned one.

        Args:
            masks: for each kind of media (B, T) bool, its placeholders.
            items: `MediaItem`s, which all of their tokens stay of where they have no kept indices yet.
            attention_mask, cache: of the call.

        Returns:
            the `TokenRecord` of the prompt, and how far each token is moved from its place in the prompt, a LongTensor
            (B, T); two times `None` where none is moved.
        """
        positions = pruning.resolved("positions")
        if not pruning.prunes or positions == "compact":
            return None, None
        columns, skipped = unpruned_columns(masks, items)
        if positions == "scaled":
            columns, skipped = self.scaled_columns(columns, skipped, attention_mask, cache, pruning.max_positions)
        return TokenRecord(None, skipped.float()), columns - torch.arange(columns.shape[1], device=columns.device)

    def positions_of(self, tokens, position_ids, moved, cache, attention_mask):
        """
        The `position_ids` of the stock forward pass.

        Args:
            tokens: (B, T) or (B, T, H).
            position_ids: those of the call, or `None`.
            moved: (B, T) or (B, 1), how far tokens are moved; `None` where none is.
            cache: the cache, if there is one.
            attention_mask: of the call.
        """
        if moved is None:
            return position_ids
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + cached_tokens(cache)
        position_ids = position_ids + moved
        warn_beyond_context(self.config.text_config, position_ids)
        return position_ids

    def stock_forward(self, **inputs):
        """The forward pass of the stock class."""
        return super().forward(**inputs, return_dict=True)

    def run_language_model(
        self, prompt, attention_mask, position_ids, stock, record=None, shift=None, inner=None, by_distance=False
    ):
        """
        The stock forward pass, at the positions and with the token sizes that are recorded in the cache and in `record`.

        Args:
            prompt: `input_ids` or `inputs_embeds`, and what `stock_forward` takes beside them: pixels where nothing is pruned.
            stock: the other arguments of the stock forward pass.
            record: the `TokenRecord` of the prompt; `None` = nothing was skipped in it, and each token stands for itself.
            shift: that of `place_in_unpruned`; `None` = no token is moved.
            inner: the [`InnerCall`] of a prompt that visual tokens leave inside the language model.
            by_distance: whether attention among the tokens of this pass gets `distance_bias`.
        """
        cache, places = stock[CACHE_NAME], stock.get("cache_position")
        num_layers = self.config.text_config.num_hidden_layers
        tokens = prompt["inputs_embeds"] if prompt.get("input_ids") is None else prompt["input_ids"]
        cached = read_record(cache, num_layers)
        num_cached = 0 if record is None else cached_tokens(cache, places)
        if shift is not None and attention_mask is None:
            # Without a mask, gaps between positions are read as the borders of packed sequences.
            total = num_cached + tokens.shape[1]
            attention_mask = torch.ones(len(tokens), total, dtype=torch.long, device=tokens.device)
        moved = None if shift is None else shift.to(tokens.device)
        if cached is not None:
            before = cached.skipped.to(tokens.device).sum(1, keepdim=True).long()
            moved = before if moved is None else moved + before
        position_ids = self.positions_of(tokens, position_ids, moved, cache, attention_mask)
        sizes = all_sizes(cached, record, num_cached)
        if inner is not None or read_inner(cache, num_layers) is not None:
            outputs = self.two_part_forward(prompt, attention_mask, position_ids, stock, sizes, record, inner)
        else:
            attention = self.config.text_config._attn_implementation
            embeds = tokens
            if sizes is not None and not tokens.is_floating_point():
                embeds = self.get_input_embeddings()(tokens)
            pairs = None
            if by_distance:
                columns = torch.arange(tokens.shape[1])[None] if position_ids is None else position_ids
                columns = columns.to(tokens.device).expand(len(tokens), -1)
                pairs = distance_bias(columns, self.model.language_model.rotary_emb.inv_freq)
            attention_mask, extra = weighed(attention, attention_mask, sizes, embeds, cache, places, pairs)
            if not takes_masks(attention) and sizes is None and (cached is not None or record is not None):
                let_kernel_take_bias(attention)  # which hides the gaps between positions from it
                extra = {"key_bias": tokens.new_empty(0)}
            stock = {**stock, **extra}
            outputs = self.stock_forward(**prompt, attention_mask=attention_mask, position_ids=position_ids, **stock)
        cache = outputs.get(CACHE_NAME) if cache is None else cache
        if cache is not None and (cached is not None or record is not None):
            if record is None:
                record = TokenRecord(None, torch.zeros(tokens.shape[:2], dtype=torch.float32, device=tokens.device))
            write_record(cache, num_layers, record, num_cached)
        return outputs

    def two_part_forward(self, prompt, attention_mask, position_ids, stock, sizes, record, inner) -> dict:
        """
        As `stock_forward`, where fewer tokens reach the later layers: their logits and losses are of those alone.

        Args:
            sizes: (B, n) fp32, how many tokens each of the cache and of the prompt stands for, or `None`.
            record, inner: as in `run_language_model`.

        Raises:
            ValueError: the call asks for what needs all tokens in all layers, or for another cache than a `DynamicCache`.
        """
        config, language_model = self.config.text_config, self.model.language_model
        labels, logits_to_keep, cache = stock["labels"], stock["logits_to_keep"], stock[CACHE_NAME]
        check_two_part_call(language_model, attention_mask, stock)
        embeds = prompt.get("inputs_embeds")
        embeds = self.get_input_embeddings()(prompt["input_ids"]) if embeds is None else embeds
        cache = dynamic_cache(cache, config)
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1], device=embeds.device)[None] + cached_tokens(cache)
        position_ids = position_ids.to(embeds.device).expand(len(embeds), -1)
        collected = [] if stock.get("output_hidden_states") else None
        new_sizes = None if record is None else record.sizes
        states, places, is_there = self.layers_in_two_parts(
            language_model,
            embeds,
            position_ids,
            cache,
            attention_mask,
            sizes,
            new_sizes,
            inner,
            self.sum_of_heads,
            collected,
        )
        logits, loss = self.lm_head(states[:, -logits_to_keep:]), None
        if labels is not None:
            labels = labels.to(places.device).gather(1, places)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size)
        outputs = {"loss": loss, "logits": logits, "hidden_states": None if collected is None else tuple(collected)}
        if inner is not None:
            is_kept = is_there & inner.is_visual.gather(1, places)
            outputs["inner_kept_indices"] = tuple(row[kept] for row, kept in zip(places, is_kept))
        use_cache = config.use_cache if stock.get("use_cache") is None else stock["use_cache"]
        return {**outputs, CACHE_NAME: cache} if use_cache else outputs

    def scaled_columns(self, columns, skipped, attention_mask, cache, max_positions) -> tuple:
        """`unpruned_columns` (B, T) of a prompt, shrunk where they leave `max_positions` or the context of the language model."""
        config = self.config.text_config
        limit = min(context_length(config), max_positions or math.inf)
        cached, total = read_record(cache, config.num_hidden_layers), cached_tokens(cache) + columns.shape[1]
        lengths = columns.new_full((len(columns),), total)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:  # padding takes no position
            lengths = attention_mask.sum(1).to(columns)
        if cached is not None:
            lengths = lengths + cached.skipped.sum(1).to(columns)
        return shrunk_columns(columns, skipped, room_for_gaps(limit, lengths, skipped.sum(1)))

    def stock_pixels(self, pixels: dict, sizes) -> dict:
        """Pixels and sizes by the names that the stock forward pass has for them in this version of transformers."""
        names = signature(super().forward).parameters
        image = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
        given = {image: pixels["image"], "pixel_values_videos": pixels["video"], "image_sizes": sizes.image_sizes}
        if "batch_num_images" in names and sizes.image_sizes is not None:
            given["batch_num_images"] = images_of_prompts(sizes.image_sizes)
        return {name: values for name, values in given.items() if values is not None}
