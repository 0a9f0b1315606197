"""What `generate` needs to know of pruned prompts: media at the prefill alone, beams, chunks and static caches."""

import copy

import torch
import torch.nn.functional as F
from transformers import StaticCache

from .core_cache import cached_tokens, one_cache
from .core_items import MediaSizes, expanded_order, place_items, take_items
from .core_layout import images_of_prompts, sizes_of_tiled
from .hub_versions import CACHE_NAME

IMAGE_NAMES = ("pixel_values", "pixel_values_images")
PIXEL_NAMES = (*IMAGE_NAMES, "pixel_values_videos")
GRID_NAMES = {"image": "image_grid_thw", "video": "video_grid_thw"}
MEDIA_NAMES = (
    *PIXEL_NAMES,
    "image_sizes",
    "batch_num_images",
    *GRID_NAMES.values(),
    "second_per_grid_ts",
    "encoded_media",
)
OF_VIDEOS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
QUESTION_NAMES = ("query_mask", "clip_input_ids", "clip_attention_mask", "word_input_ids")


class PrunedGenerationMixin:
    """For model classes, before the stock class and after `PrunedForwardMixin`."""

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, cache=None, inputs_embeds=None, **kwargs):
        cache = one_cache(past_key_values, cache)
        media = {name: kwargs.pop(name, None) for name in MEDIA_NAMES}
        stock_media = {name: values for name, values in media.items() if values is not None}
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, **{CACHE_NAME: cache}, inputs_embeds=inputs_embeds, **stock_media, **kwargs
        )
        new_tokens = {key: model_inputs.get(key) for key in ("input_ids", "inputs_embeds")}
        query_mask = kwargs.get("query_mask")
        if query_mask is not None:
            # Without a cache, and where an assistant proposes an answer, there are tokens after the question.
            appended = max(0, input_ids.shape[1] - query_mask.shape[1])
            num_tokens = next(tokens.shape[1] for tokens in new_tokens.values() if tokens is not None)
            model_inputs["query_mask"] = F.pad(query_mask, (0, appended))[:, -num_tokens:]
        if cached_tokens(cache):
            # The first pass over a reused cache takes the media of the new tokens, a decoding step takes none.
            masks = self.placeholder_masks(**new_tokens).values()
            has_media = any(mask.shape[1] > 1 and mask.any() for mask in masks)
            model_inputs.update(media if has_media else dict.fromkeys((*MEDIA_NAMES, *QUESTION_NAMES)))
        else:
            model_inputs.update(media)
        return model_inputs

    def _get_cache(self, cache_implementation, batch_size, max_cache_len, model_kwargs):
        # 4.57 alone asks for a static cache here, and would keep it on the model, where another thread's call finds it.
        offloading = "offloaded" in cache_implementation
        return StaticCache(config=self.config.text_config, max_cache_len=max_cache_len, offloading=offloading)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # Of 5.x. Chunks of a prompt cannot hold pixels, so where they are asked for the media are encoded before.
        size = generation_config.prefill_chunk_size
        if size is not None and self._media_in_chunks(size, model_kwargs):
            model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        # Of 4.57, which can neither encode media before the prefill nor go on from a cache in chunks.
        size = generation_config.prefill_chunk_size
        if cached_tokens(model_kwargs.get(CACHE_NAME)):
            raise ValueError(
                f"prefill_chunk_size={size} cannot go on from a cache with this version of transformers; pass "
                "prefill_chunk_size=None, or install transformers 5."
            )
        if self._media_in_chunks(size, model_kwargs):
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = input_ids.shape[1]
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)

    def _media_in_chunks(self, size: int, model_kwargs: dict) -> bool:
        """Whether a prompt that is to be prefilled in chunks has media. Raises ValueError where they are pruned or encoded."""
        if model_kwargs.get("encoded_media") is not None:
            raise ValueError(
                f"prefill_chunk_size={size} was given with encoded_media, of which a chunk would not know its part; pass "
                "prefill_chunk_size=None."
            )
        if all(model_kwargs.get(name) is None for name in PIXEL_NAMES):
            return False
        pruning = self.pruning_of_call(model_kwargs.get("keep_ratio"), model_kwargs.get("keep_tokens"))
        if pruning.drops_tokens or not pruning.video_pooling:
            raise ValueError(
                f"prefill_chunk_size={size} was given, but the media of this prompt are pruned by the question, which a chunk "
                "does not hold; pass prefill_chunk_size=None, or keep_ratio=1 to the processor."
            )
        return True

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        media = {name: kwargs.pop(name, None) for name in MEDIA_NAMES}
        images_by_prompt = media.pop("batch_num_images")
        media["image_sizes"] = sizes_of_tiled(media["image_sizes"], images_by_prompt)
        embeds = kwargs.get("inputs_embeds")
        masks = self.placeholder_masks(input_ids if embeds is None else None, embeds)
        images = next((media[name] for name in IMAGE_NAMES if media[name] is not None), None)
        pixels = {"image": images, "video": media["pixel_values_videos"]}
        pruning = self.pruning_of_call(kwargs.get("keep_ratio"), kwargs.get("keep_tokens"))
        encoded = media.pop("encoded_media")
        sizes = MediaSizes(*(media[name] for name in ("image_sizes", *GRID_NAMES.values())))
        layouts = self.layouts_of(pixels, sizes, pruning, encoded)
        items = place_items(layouts, masks, pruning, cached_tokens(kwargs.get(CACHE_NAME)))
        order = expanded_order(items, len(masks["image"]), expand_size)
        if kwargs.get("query_mask") is None:
            # Covers the prompt alone: what will be generated after it is no part of the question.
            kwargs["query_mask"] = torch.ones_like(masks["image"])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        for name, values in media.items():
            kind = "video" if name in OF_VIDEOS else "image"
            if values is not None and order[kind]:
                kwargs[name] = take_items(values, order[kind], media[GRID_NAMES[kind]] if name in PIXEL_NAMES else None)
        if images_by_prompt is not None and "image_sizes" in kwargs:
            kwargs["batch_num_images"] = images_of_prompts(kwargs["image_sizes"])
        if encoded is not None and any(order.values()):
            kwargs["encoded_media"] = encoded.take(order["image"], order["video"])
        return input_ids, kwargs
