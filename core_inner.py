"""Pruning inside the language model: its layers run in two parts, and the later ones see fewer visual tokens.

Up to the layer all tokens of a prompt are there; then a method chooses, and the rows of those that stay go on, at the rotary
positions that they had. The cache holds fewer tokens in the later layers: which of them are padding, and their sizes, is kept in one
more of its layers, so that whatever is done to a cache is done to that, too.
"""

import copy
from typing import NamedTuple, Optional

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .core_attention import distance_bias, weighed
from .core_cache import cached_tokens
from .hub_versions import CACHE_NAME, CROPS_TO_LENGTH, causal_mask, layer_states
from .methods_base import InnerTokens
from .methods_registry import INNER_METHODS
from .ops_inner import attention_of_token, rotated
from .ops_tokens import nearest_kept


class InnerCall(NamedTuple):
    """
    What leaves a prompt inside the language model.

    Attributes:
        pruning: the `PruningConfig` of the call.
        is_visual: (B, T) bool, the visual tokens of the prompt.
        is_question: (B, T) bool, the text behind them that neither is padding nor an answer.
        numbers: for each row how many of its visual tokens go on.
    """

    pruning: object
    is_visual: torch.Tensor
    is_question: torch.Tensor
    numbers: list


class ShorterLayer(DynamicLayer):
    """
    The keys and values of a layer that fewer tokens reach than the first one.

    Attributes:
        num_missing: how many fewer; lengths that the cache is cropped to count these.
        least: so many of its tokens are of prompts up to their last visual token, and cannot be cropped.
        first: the number of the first such layer.
    """

    num_missing = least = first = 0

    def reset(self) -> None:
        super().reset()
        self.num_missing = self.least = 0

    def crop(self, max_length: int) -> None:
        if not self.is_initialized or max_length == 0 and not CROPS_TO_LENGTH:
            return
        too_many = -max_length if max_length < 0 else self.get_seq_length() + self.num_missing - max_length
        if too_many > max(0, self.get_seq_length() - self.least):
            raise ValueError(
                f"the cache cannot be cropped to {max_length} tokens: of the last {self.num_missing + self.least} tokens some are visual "
                f"ones that left the prompt before layer {self.first}; crop behind them, or start with a new cache."
            )
        if too_many > 0:
            super().crop(-too_many)


class InnerRecord(NamedTuple):
    """
    Of each token in the later layers of a cache, and in `first` the number of the first of them.

    Attributes:
        sizes: (B, m) fp32, how many tokens it stands for in attention; `None` = one for all of them.
        visible: (B, m) bool, false for padding.
    """

    first: int
    sizes: Optional[torch.Tensor]
    visible: torch.Tensor


def read_inner(cache, num_layers: int) -> Optional[InnerRecord]:
    """The record of a cache; `None` where as many tokens reach all of its layers."""
    layers = getattr(cache, "layers", ())
    layer = layers[num_layers + 1] if len(layers) > num_layers + 1 else None
    if layer is None or not layer.get_seq_length():
        return None
    sizes = layer.keys[:, 0, :, 0] if layer.has_sizes else None
    return InnerRecord(layer.first, sizes, layer.values[:, 0, :, 0].bool())


def run_layers(
    language_model,
    first: int,
    last: int,
    states,
    position_ids,
    cache,
    attention_mask,
    sizes,
    by_distance=False,
    collected=None,
):
    """
    The states (B, T, H) behind layers `first` to `last - 1` of a decoder, which append their keys and values to the cache.

    Args:
        states: (B, T, H) that enter layer `first`.
        position_ids: (B, T).
        cache: a `Cache` with all of its layers.
        attention_mask: (B, cached + T), 0 for padding, or `None`.
        sizes: (B, n) fp32, how many tokens each of the first n stands for, or `None`.
        by_distance: whether attention among these tokens gets `distance_bias`.
        collected: a list that the states before each layer are appended to.
    """
    config, whole = language_model.config, cache
    cache = copy.copy(whole)  # asked for its length, it tells that of these layers
    cache.layers = [whole.layers[first]] * first + whole.layers[first:]
    pairs = distance_bias(position_ids, language_model.rotary_emb.inv_freq) if by_distance else None
    attention_mask, extra = weighed(config._attn_implementation, attention_mask, sizes, states, cache, pairs=pairs)
    mask = causal_mask(config, states, attention_mask, cache, position_ids)
    places = language_model.rotary_emb(states, position_ids)
    for layer in language_model.layers[first:last]:
        if collected is not None:
            collected.append(states)
        # Without `position_ids`, since flash attention takes gaps in them for the borders of packed sequences.
        given = {CACHE_NAME: cache, "use_cache": True, "position_embeddings": places, **extra}
        states = layer_states(layer(states, attention_mask=mask, **given))
    return states


def two_part_forward(
    language_model, embeds, position_ids, cache, attention_mask, sizes, new_sizes, call, sum_of_heads, collected=None
) -> tuple:
    """
    The language model, whose later layers fewer tokens reach.

    Args:
        embeds: (B, T, H) the prompt, or what follows it.
        position_ids: (B, T).
        cache: a `DynamicCache`.
        attention_mask: (B, cached + T), 0 for padding, or `None`.
        sizes: (B, cached + T) fp32, how many tokens each one stands for, or `None`.
        new_sizes: (B, T) those of the new tokens, or `None`.
        call: the [`InnerCall`]; `None` where nothing leaves, but something has left the cache.
        sum_of_heads: adds up what the processes of tensor parallelism have of their heads.
        collected: a list that the states before each layer are appended to.

    Returns:
        states (B, T', H) behind the last norm, LongTensor (B, T'), the places in the prompt of the tokens that reached the last
        layer, and (B, T') bool, false for the padding that rows of fewer such tokens begin with.
    """
    num_layers, batch, number = len(language_model.layers), *embeds.shape[:2]
    record = read_inner(cache, num_layers)
    first = call.pruning.first_inner_layer(num_layers) if record is None else record.first
    if attention_mask is None:
        attention_mask = torch.ones(batch, cached_tokens(cache) + number, dtype=torch.long, device=embeds.device)
    if record is None:
        record = _record_of_whole_prompt(first, attention_mask, sizes, number)
    elif call is not None and call.pruning.first_inner_layer(num_layers) != first:
        raise ValueError(
            f"visual tokens left this cache before layer {first}, but would leave it before layer "
            f"{call.pruning.first_inner_layer(num_layers)} now; set inner_layer to {first}, or start with a new cache."
        )
    shorten_layers(cache, first, num_layers)
    by_distance = call is not None and call.pruning.distance_bias
    shared = (position_ids, cache, attention_mask, sizes, by_distance, collected)
    before = run_layers(language_model, 0, first - 1, embeds, *shared)
    states = run_layers(language_model, first - 1, first, before, *shared)
    places = torch.arange(number, device=states.device).expand(batch, -1)
    is_there = torch.ones_like(places, dtype=torch.bool)
    if call is not None:
        layer = _LayerBefore(language_model, first - 1, before, position_ids, cache, attention_mask, sum_of_heads)
        states, goes_on, new_sizes = leave_behind(call, layer, states, new_sizes)
        places, is_there = right_aligned(goes_on)
        _note_missing(cache, first, num_layers, number - places.shape[1], call.is_visual)
    states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
    visible = attention_mask[:, -number:].bool().gather(1, places) & is_there
    if record.sizes is not None or new_sizes is not None:
        old = torch.ones_like(record.visible, dtype=torch.float32) if record.sizes is None else record.sizes
        new = torch.ones_like(visible, dtype=torch.float32) if new_sizes is None else new_sizes.gather(1, places)
        sizes = torch.cat([old, new], dim=1)
    mask = torch.cat([record.visible, visible], dim=1)
    shared = (position_ids.gather(1, places), cache, mask.long(), sizes, by_distance, collected)
    states = run_layers(language_model, first, num_layers, states, *shared)
    _write_record(cache.layers[num_layers + 1], mask, sizes)
    states = language_model.norm(states)
    if collected is not None:
        collected.append(states)
    return states, places, is_there


def right_aligned(goes_on: torch.Tensor) -> tuple:
    """
    The true places of each row of (B, T) bool, ascending, at the end of rows of one length.

    Returns:
        LongTensor (B, k) and (B, k) bool, false before them.
    """
    order = goes_on.byte().argsort(dim=1, stable=True)[:, goes_on.shape[1] - int(goes_on.sum(1).max()) :]
    return order, goes_on.gather(1, order)


def inner_numbers(items: list, is_visual: torch.Tensor, pruning) -> list:
    """For each row of (B, T) bool how many of its visual tokens go on inside the language model."""
    unpruned = [sum(item.layout.num_unpruned for item in items if item.row == row) for row in range(len(is_visual))]
    return [min(pruning.inner_count(number), there) for number, there in zip(unpruned, is_visual.sum(1).tolist())]


# -- choosing ---------------------------------------------------------------------------------------------------------------


def leave_behind(call: InnerCall, layer: "_LayerBefore", states: torch.Tensor, sizes) -> tuple:
    """
    Chooses the visual tokens of each row that go on.

    Args:
        layer: the layer that the states (B, T, H) come from.
        sizes: (B, T) fp32, how many tokens each one stands for, or `None` = none stands for another.

    Returns:
        states (B, T, H), (B, T) bool, which tokens go on, and the sizes, those of tokens that leave added to the ones that they
        are most similar to.
    """
    method = INNER_METHODS[call.pruning.inner]
    signals = layer.signals(method.required_signals, states.detach(), call.is_question)
    goes_on, states, sizes = ~call.is_visual, states.clone(), None if sizes is None else sizes.clone()
    for row, num_kept in enumerate(call.numbers):
        visual, text = (mask[row].nonzero()[:, 0] for mask in (call.is_visual, call.is_question))
        if num_kept == len(visual):
            goes_on[row] = True
            continue
        of_row = {name: values[row] for name, values in signals.items()}
        shown = {name: of_row[name][visual] for name in ("attention", "norms", "final_states") if name in of_row}
        if "norms" in of_row:
            shown |= {"text_norms": of_row["norms"][text], "text_states": of_row["final_states"][text]}
        kept, carried = method.reduce(InnerTokens(states[row, visual], **shown), num_kept, call.pruning)
        if sizes is not None and len(kept):
            nearest = nearest_kept(states[None, row, visual], kept[None])[0]
            sizes[row, visual[kept]] = torch.zeros_like(sizes[row, visual[kept]]).index_add(
                0, nearest, sizes[row, visual]
            )
        goes_on[row, visual[kept]] = True
        states[row, visual[kept]] = carried
    return states, goes_on, sizes


class _LayerBefore(NamedTuple):
    """The layer before the one that visual tokens leave at: what it has read and computed."""

    language_model: torch.nn.Module
    index: int
    before: torch.Tensor
    position_ids: torch.Tensor
    cache: object
    attention_mask: torch.Tensor
    sum_of_heads: object

    @torch.no_grad()
    def signals(self, required: frozenset, states: torch.Tensor, is_question: torch.Tensor) -> dict:
        """The signals that are required, for all T tokens of each row: (B, T) or (B, T, H)."""
        found, keys, number = {}, self.cache.layers[self.index].keys, states.shape[1]
        if "attention" in required:
            attention = self.attention_of_question(keys, is_question)[:, -number:]
            found["attention"] = self.sum_of_heads(attention) / self.language_model.config.num_attention_heads
        if "norms" in required:
            found["norms"] = self.sum_of_heads(self.keys_from_zero(keys)[:, :, -number:].float().abs().sum((1, 3)))
            found["final_states"] = self.language_model.norm(states)
        return found

    def keys_from_zero(self, keys) -> torch.Tensor:
        """The keys (B, g, n, d) where each prompt begins at position 0: sums of absolute values are not the same at all positions."""
        if keys.shape[2] > self.before.shape[1]:
            return keys  # the prompt began in an earlier pass
        start = self.attention_mask.argmax(1, keepdim=True)  # padding takes positions where a caller gives none
        cos, sin = self.language_model.rotary_emb(self.before, self.position_ids.gather(1, start))
        return rotated(keys.flatten(1, 2), cos[:, 0], -sin[:, 0]).view(keys.shape)

    def attention_of_question(self, keys, is_question) -> torch.Tensor:
        """(B, cached + T) fp32: what the last token of each question attends to in this layer, summed over the heads that are here."""
        layer, number = self.language_model.layers[self.index], is_question.shape[1]
        rows, attention = torch.arange(len(keys), device=keys.device), layer.self_attn
        steps = torch.arange(1, number + 1, device=keys.device)
        is_text = is_question | (steps == number) & ~is_question.any(1, keepdim=True)  # a prompt may end with its media
        last = (is_text * steps).argmax(1)
        states = self.before.detach()[rows, last]
        query = attention.q_proj(layer.input_layernorm(states)).unflatten(-1, (-1, keys.shape[-1]))
        cos, sin = self.language_model.rotary_emb(
            states[:, None], self.position_ids[rows, last][:, None].expand(len(rows), 1)
        )
        seen = torch.arange(keys.shape[2], device=keys.device) <= (keys.shape[2] - number + last)[:, None]
        visible = seen & self.attention_mask.bool()
        return attention_of_token(rotated(query, cos[:, 0], sin[:, 0]), keys, attention.scaling, visible)


# -- the cache --------------------------------------------------------------------------------------------------------------


def dynamic_cache(cache, config):
    """The cache of a call, or one for it alone. Raises ValueError where it cannot hold fewer tokens in some layers."""
    cache = DynamicCache(config=config) if cache is None else cache
    others = {type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, ShorterLayer)}
    if others or not isinstance(cache, DynamicCache) or cache.offloading:
        raise ValueError(
            f"visual tokens that leave inside the language model need a DynamicCache on one device, but this call has a "
            f"{type(cache).__name__}{' of ' + ', '.join(sorted(others)) if others else ''}; leave cache_implementation out, or choose "
            "a method that prunes before the language model."
        )
    return cache


def check_two_part_call(language_model, attention_mask, stock: dict) -> None:
    """Raises ValueError where a call needs all tokens in all layers."""
    if isinstance(attention_mask, dict) or attention_mask is not None and attention_mask.dim() != 2:
        problem = "has an expanded attention_mask; pass the one of the processor, (batch, tokens)"
    elif stock.get("output_attentions"):
        problem = "asks for output_attentions; leave that out"
    elif isinstance(stock["logits_to_keep"], torch.Tensor):
        problem = "gives logits_to_keep as a tensor of places; pass how many of the last logits are wanted"
    elif language_model.training and getattr(language_model, "gradient_checkpointing", False):
        problem = "trains with gradient checkpointing, which keeps no keys to choose by; switch it off"
    else:
        return
    raise ValueError(f"visual tokens leave inside the language model, and this call {problem}.")


def check_inner(config, pruning) -> None:
    """Raises ValueError where the language model has no such layer, or layers that see a part of the prompt."""
    text_config = config.text_config
    first = pruning.first_inner_layer(text_config.num_hidden_layers)
    if first >= text_config.num_hidden_layers:
        raise ValueError(
            f"inner_layer is {first} for {pruning.inner!r}, but the language model has {text_config.num_hidden_layers} layers; set it "
            f"to one of 1 to {text_config.num_hidden_layers - 1}."
        )
    if getattr(text_config, "sliding_window", None):
        raise ValueError(
            f"{pruning.inner!r} works with full attention alone, but the language model has sliding_window="
            f"{text_config.sliding_window}; choose a method that prunes before the language model."
        )


def shorten_layers(cache, first: int, num_layers: int) -> None:
    """Makes [`ShorterLayer`]s of the layers from `first` on, and of the one with the record."""
    while len(cache.layers) < num_layers + 2:
        cache.layers.append(DynamicLayer())
    # The one between them is for `core_cache`, and of 4.57 a plain one cannot be cropped before it is filled.
    for index in range(first, num_layers + 2):
        if not isinstance(cache.layers[index], ShorterLayer):
            layer = ShorterLayer()
            vars(layer).update(vars(cache.layers[index]))
            layer.first = first
            cache.layers[index] = layer


def _record_of_whole_prompt(first: int, attention_mask, sizes, number: int) -> InnerRecord:
    """Of a cache that as many tokens have reached all layers of: the first tokens of a mask, but for the last `number`."""
    visible = attention_mask[:, : attention_mask.shape[1] - number].bool()
    return InnerRecord(first, None if sizes is None else sizes[:, : visible.shape[1]], visible)


def _note_missing(cache, first: int, num_layers: int, num_missing: int, is_visual: torch.Tensor) -> None:
    behind = int(is_visual.flip(1).byte().argmax(1).where(is_visual.any(1), is_visual.shape[1]).min())
    length = cache.layers[first].get_seq_length() + is_visual.shape[1] - num_missing
    for index in (*range(first, num_layers), num_layers + 1):
        layer = cache.layers[index]
        layer.num_missing, layer.least = layer.num_missing + num_missing, length - behind


def _write_record(layer: ShorterLayer, visible: torch.Tensor, sizes: Optional[torch.Tensor]) -> None:
    """Appends what (B, m) bool and fp32 have behind the tokens that the layer holds already."""
    layer.has_sizes = getattr(layer, "has_sizes", False) or sizes is not None
    values = visible.float()
    sizes, new = values if sizes is None else sizes, slice(layer.get_seq_length(), None)
    layer.update(sizes[:, None, new, None], values[:, None, new, None])
