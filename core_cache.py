"""What a cache has to remember of a pruned prompt: how many tokens each token stands for, and how many positions were skipped at it.

Both are kept token by token and row by row in one more layer of the cache itself, behind those of the language model. So whatever
is done to a cache (crop, select, repeat, reorder, reset, copy, offload) is done to them, too.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer, StaticLayer


class TokenRecord(NamedTuple):
    """
    Of each token of a prompt:

    Attributes:
        sizes: (B, T) fp32, how many tokens it stands for in attention, itself included; `None` = one for all of them. In a static
            cache 0 behind the last token.
        skipped: (B, T) fp32, how many positions of the unpruned prompt are left out at it: right before, and, at the last token
            of an image or video, right after it. Their sum is how far the next token is moved. Negative under M-RoPE, where
            the text behind a medium may have a smaller position than its place in the prompt.
    """

    sizes: Optional[torch.Tensor]
    skipped: torch.Tensor


def one_cache(past_key_values, cache):
    """The cache of a call, which may give it by either name. Raises ValueError where two different ones were given."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "two different caches were passed, one as past_key_values and one as cache; they are two names of one argument, so "
            "pass one."
        )
    return past_key_values if cache is None else cache


def cached_tokens(cache, cache_position=None) -> int:
    """
    Number of tokens in a cache, or in none.

    `cache_position` (T,), the places of the next tokens, goes first where it is given: a static cache of 4.57 does not count
    padding, and so knows its length in batches without padding alone.
    """
    if cache_position is not None:
        return int(cache_position[0])
    return 0 if cache is None else int(cache.get_seq_length())


def read_record(cache, num_layers: int) -> Optional[TokenRecord]:
    """
    The record of the tokens in a cache; `None` where it has none: then nothing was skipped, and each stands for itself.

    Args:
        cache: a `Cache`, or `None`.
        num_layers: of the language model.
    """
    layers = getattr(cache, "layers", ())
    if len(layers) <= num_layers or not layers[num_layers].is_initialized:
        return None
    layer = layers[num_layers]
    sizes, skipped = layer.keys[:, 0, :, 0], layer.values[:, 0, :, 0]
    # A static layer is longer than what it holds, and keeps what a crop has taken back until it is written over.
    is_held = torch.arange(sizes.shape[1], device=sizes.device) < layer.get_seq_length()
    return TokenRecord(sizes * is_held if layer.has_sizes else None, skipped * is_held)


def write_record(cache, num_layers: int, record: TokenRecord, num_cached: int) -> None:
    """
    Appends the record of new tokens to that of a cache, which gets one if it has none.

    Args:
        cache: the cache, a subclass of `Cache`.
        num_layers: of the language model.
        record: of the new tokens.
        num_cached: number of tokens that were in the cache before them.
    """
    sizes = torch.ones_like(record.skipped) if record.sizes is None else record.sizes
    skipped = record.skipped
    if read_record(cache, num_layers) is None:  # of the tokens that are there already
        sizes, skipped = F.pad(sizes, (num_cached, 0), value=1.0), F.pad(skipped, (num_cached, 0))
    while len(cache.layers) <= num_layers:
        cache.layers.append(_layer_like(cache.layers[0]))
    layer = cache.layers[num_layers]
    # Only tells whether the sizes are worth a look: they are right whatever happened to the cache since.
    layer.has_sizes = getattr(layer, "has_sizes", False) or record.sizes is not None
    # A static layer of 4.57 has to be told where to write; the others take no notice.
    places = torch.arange(sizes.shape[1], device=sizes.device) + layer.get_seq_length()
    cache.update(sizes[:, None, :, None], skipped[:, None, :, None], num_layers, {"cache_position": places})


def _layer_like(layer):
    """A layer that holds as many tokens as another one."""
    length = getattr(layer, "max_cache_len", None)
    return DynamicLayer() if length is None else StaticLayer(max_cache_len=length)


def all_sizes(cached, record, num_cached) -> Optional[torch.Tensor]:
    """
    Sizes (B, K) of the tokens in a cache and of new ones, whose records are given; `None` where each token stands for itself.

    Entries that a static cache has not filled yet are 0. New tokens without a record are left out: they stand for themselves.
    """
    old = None if cached is None else cached.sizes
    if record is None or record.sizes is None and old is None:
        return old
    new = torch.ones_like(record.skipped) if record.sizes is None else record.sizes
    old = new.new_ones(len(new), num_cached) if old is None else old[:, :num_cached].to(new.device)
    return torch.cat([old, new], dim=1)
