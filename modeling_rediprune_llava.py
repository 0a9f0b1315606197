"""LLaVA-NeXT-Video whose visual tokens are pruned between the vision encoder and the projector."""

import contextlib
import copy
import itertools
import os
import threading
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import torch
import torch.nn.functional as F
from transformers import LlavaNextVideoForConditionalGeneration, StaticCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.llava_next_video.modeling_llava_next_video import (
    LlavaNextVideoCausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_rediprune import PruningConfig, ReDiPruneConfig
from .core_attention import biased_mask
from .core_cache import CACHE_NAME, TokenRecord, cached_tokens, one_cache, read_record, write_record
from .core_layout import (
    crop_of_tiles,
    image_grids,
    num_placeholders,
    num_unpruned,
    split_budget,
    taken_jointly,
    token_sets,
    video_grids,
)
from .core_positions import image_offsets, pooled_places, position_gaps, video_offsets
from .hub_files import code_in_place
from .hub_linking import (
    checksum_weights,
    damage_explained,
    explained,
    follow_link,
    same_weights,
    unlinked,
)
from .methods_base import VisualTokens
from .methods_registry import METHODS
from .ops_query import align_query, build_query
from .ops_relevance import (
    attention_relevance,
    attention_rows,
    clip_relevance,
    cosine_relevance,
    read_question,
    stack_rows,
    word_rows,
)
from .ops_tokens import group_means, group_sizes, in_raster_order, nearest_kept
from .vision_clip import encode_and_merge, read_attention, run_tower
from .vision_joint_space import JointSpace

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of the three that `auto_map` names lists all that it rests on.
    from .hub_untrusted import CODE_KEYS  # noqa: F401
    from .inputs_tokenizing import OneAtATime  # noqa: F401
    from .methods_attention import CONTEXTUAL_SHARE  # noqa: F401
    from .methods_baselines import Random  # noqa: F401
    from .methods_coverage import VISION_TEMPERATURE  # noqa: F401
    from .methods_distance import ReDiPrune  # noqa: F401
    from .methods_encoder import EvoPrune  # noqa: F401
    from .methods_relevance import SPENT  # noqa: F401
    from .ops_merging import DIVERSITY_WEIGHT  # noqa: F401
    from .ops_selection import CANDIDATE_POOLS  # noqa: F401

logger = logging.get_logger(__name__)
_WARNED_CONTEXTS = set()  # lengths that were warned about
_LOADING = threading.Lock()  # of what is loaded when it is first needed

try:  # transformers 5.x converts checkpoint keys by model type, but not those of custom code that has not registered.
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    # 4.57 inherits the conversion with the class, but does not know the shorter names under which 5.x saves the vision
    # tower of a model that it did not load from a checkpoint.
    LOADING_OPTIONS = {
        "key_mapping": {
            r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
            **LlavaNextVideoForConditionalGeneration._checkpoint_conversion_mapping,
        }
    }
else:
    LOADING_OPTIONS = {}
    register_checkpoint_conversion_mapping(
        ReDiPruneConfig.model_type, get_checkpoint_conversion_mapping("llava_next_video"), overwrite=True
    )


@dataclass
class ReDiPruneCausalLMOutputWithPast(LlavaNextVideoCausalLMOutputWithPast):
    """
    The stock output, and what was kept.

    Attributes:
        image_kept_indices: for each image two LongTensors, (1, k) of the base view and (1, k') of the unpadded tiles.
        video_kept_indices: for each video one LongTensor (frames, k).

    Indices count in raster order within the grid of their set; of a merged token, it is the index of the token whose place
    it takes. Those of tokens merged inside the vision tower may repeat where pooling makes the grid coarser. A method that
    takes all tokens of a medium jointly has a single LongTensor (1, k) for each image and video, whose indices count through
    all frames, or through base view and tiles. `None` where the stock forward ran, which keeps all.
    """

    image_kept_indices: Optional[tuple] = None
    video_kept_indices: Optional[tuple] = None


@dataclass
class Medium:
    """
    One image or video on its way into the prompt.

    Attributes:
        kind: `"image"` or `"video"`.
        grids: its sets of tokens, a list of `TokenGrid`.
        row: the sample that it belongs to.
        sets: what the vision tower gives, by name: for each grid `"features"` (frames, L, C) and what else the method needs,
            and where tokens were merged in the tower `"anchors"` (frames, L), their indices in the grid; or, for a method
            that takes all tokens jointly, a single set of one (1, L, C).
        kept: for each of them (frames, k) indices of the tokens that stay, ascending.
        tokens: for each of them (frames, k, C) features of the tokens that stay.
        sizes: for each of them (frames, k) fp32, how many tokens each of those stands for; `None` without proportional
            attention.
    """

    kind: str
    grids: list
    row: Optional[int] = None
    sets: Optional[list] = None
    kept: Optional[list] = None
    tokens: Optional[list] = None
    sizes: Optional[list] = None

    def offsets(self) -> torch.LongTensor:
        """Where the kept tokens stand in the unpruned medium, (number kept,)."""
        if self.kind == "video":
            return video_offsets(self.grids[0].tokens_per_set, self.kept[0])
        base, tiles = self.grids
        if len(self.kept) == 2:
            kept_base, kept_tiles = self.kept[0][0], self.kept[1][0]
        else:
            (kept,) = self.kept[0]
            in_tiles = kept >= base.tokens_per_set
            kept_base, kept_tiles = kept[~in_tiles], kept[in_tiles] - base.tokens_per_set
        return image_offsets(base.tokens_per_set, tiles.width, kept_base, kept_tiles)


class ReDiPruneLlavaNextVideoForConditionalGeneration(LlavaNextVideoForConditionalGeneration):
    """
    [`LlavaNextVideoForConditionalGeneration`] that prunes visual tokens as `config.pruning` says ([`PruningConfig`]).

    A keep ratio of 1 is the stock class, bit for bit.
    """

    config_class = ReDiPruneConfig
    config: ReDiPruneConfig
    _joint = None  # a `JointSpace`, once one is needed

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, output_loading_info=False, **kwargs):
        """
        As in the stock class, but weights never get lost silently, and those of a linked variant come from where its
        config's `weights_from` says, without anything else that is there.

        Raises:
            OSError: the base of a linked variant cannot be loaded, or a weights file is damaged.
            ValueError: the checkpoint lacks a tensor of the model, or holds one that the model does not have or has in
                another shape (the message names them), or the base of a linked variant is of another architecture.
        """
        variant = pretrained_model_name_or_path
        source, options = follow_link(variant, kwargs)
        if source is variant:
            with damage_explained(variant):
                return cls._load(variant, *args, output_loading_info=output_loading_info, **options)
        config = options["config"]
        with explained(config, variant), damage_explained(config.weights_from):
            model, info = cls._load(source, *args, output_loading_info=True, **options)
        model.generation_config = options["generation_config"]  # of which 4.57 makes a copy that `generate` fails on
        model.name_or_path = model.config.name_or_path = str(variant)
        model._linked = (config.weights_from, config.weights_revision, checksum_weights(model))
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, *args, output_loading_info, ignore_mismatched_sizes=False, **kwargs):
        # With mismatches ignored they are all reported, by name, in both lines.
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **{**LOADING_OPTIONS, **kwargs}
        )
        bad = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys")}
        if not ignore_mismatched_sizes:
            # 5.x adds the two shapes to each name.
            bad["mismatched_keys"] = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        problems = [
            f"{len(names)} {key.replace('_', ' ')} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for key, names in bad.items()
            if names
        ]
        if problems:
            raise ValueError(
                f"the checkpoint does not fit {cls.__name__}: {'; '.join(problems)}. Missing and mismatched tensors would be "
                "random and unexpected ones lost, so nothing was loaded; check that the files belong to this config.json."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        *args,
        materialise=False,
        push_to_hub=False,
        **kwargs,
    ):
        """
        As in the stock class, but a linked variant stays linked: its config names `weights_from`, and no weights are
        written.

        Args:
            materialise (`bool`, defaults to `False`): write the weights of a linked variant, and no link. Happens by
                itself with a `state_dict` of the caller, and, with a warning, when the weights are no longer those of the
                base, as after training.
        """
        adapters_alone = getattr(self, "_hf_peft_config_loaded", False)
        if adapters_alone or state_dict is not None or not self._stays_linked(materialise):
            link = contextlib.nullcontext() if adapters_alone else unlinked(self.config)
            with link, code_in_place(self, save_directory):
                if push_to_hub and not adapters_alone:
                    self.config.check_link_for_others()
                return super().save_pretrained(
                    save_directory, is_main_process, state_dict, *args, push_to_hub=push_to_hub, **kwargs
                )
        if not is_main_process:
            return
        if push_to_hub:
            hub_keys = ("commit_message", "private", "token", "create_pr", "revision")
            hub = {key: kwargs[key] for key in hub_keys if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory)), **hub)
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)
        with code_in_place(self, save_directory):
            if self._auto_class is not None:
                custom_object_save(self, save_directory)

    def push_to_hub(self, repo_id, *args, materialise=False, **kwargs):
        """
        As in the stock class, but a linked variant stays linked, as in `save_pretrained`.

        Raises:
            ValueError: the link names a folder, where nobody else finds the weights, or `text_tower` does.
        """
        with contextlib.nullcontext() if self._stays_linked(materialise) else unlinked(self.config):
            self.config.check_link_for_others()
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _stays_linked(self, materialise: bool) -> bool:
        if self.config.weights_from is None or materialise:
            return False
        if not self._weights_are_linked():
            logger.warning(
                f"The weights are not those of weights_from={self.config.weights_from!r} any more, so they are saved in "
                "full and the link is left out."
            )
            return False
        return True

    def _weights_are_linked(self) -> bool:
        *link, checksums = getattr(self, "_linked", (None, None, None))
        return link == [self.config.weights_from, self.config.weights_revision] and same_weights(self, checksums)

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        pixel_values: Optional[torch.FloatTensor] = None,
        pixel_values_videos: Optional[torch.FloatTensor] = None,
        image_sizes: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        vision_feature_layer=None,
        vision_feature_select_strategy: Optional[str] = None,
        labels: Optional[torch.LongTensor] = None,
        logits_to_keep=0,
        keep_ratio: Optional[float] = None,
        query_mask: Optional[torch.Tensor] = None,
        clip_input_ids: Optional[torch.LongTensor] = None,
        clip_attention_mask: Optional[torch.LongTensor] = None,
        word_input_ids: Optional[torch.LongTensor] = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """
        As in the stock class, and:

        Args:
            keep_ratio (`float`, *optional*): keep ratio of this call, as the processor returned it; the config's otherwise.
            query_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): true where a token may belong to the
                question; the default is wherever `labels` asks for nothing.
            clip_input_ids (`torch.LongTensor` of shape `(batch, segments, tokens)`, *optional*): the question as the text tower
                reads it, and `clip_attention_mask` with 0 for its padding, as the processor returned them.
            word_input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): the content words of the question, -1
                where a row has fewer, as the processor returned them.
            past_key_values: the cache, as it is called before transformers 5.24; `cache` is the same argument by its new name.
                Both work with every version.
            position_ids: positions in the pruned prompt; `positions="original"` adds the gaps to them.

        Returns:
            [`ReDiPruneCausalLMOutputWithPast`], or a tuple for `return_dict=False`.

        Raises:
            OSError: the text tower cannot be reached.
            ValueError: the prompt has more or fewer placeholders than tokens that stay; pixels or features are not finite;
                `clip_input_ids` are missing where the question is compared in CLIP's joint space, or `word_input_ids` where
                its content words are looked up.
        """
        # The signature names `logits_to_keep`, so that `generate` asks for the last token's logits alone, and leaves out
        # `mm_encoder_outputs`: with it, `generate` of 5.x would project all tokens before they can be pruned here.
        pruning = self._pruning_of_call(keep_ratio)
        cache = one_cache(past_key_values, cache)
        prompt = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        stock = {CACHE_NAME: cache, "labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        self._check_context(inputs_embeds if input_ids is None else input_ids, cache)
        if pixel_values is None and pixel_values_videos is None:
            self._refuse_empty_placeholders(prompt, cache, query_mask, kwargs)
            return ReDiPruneCausalLMOutputWithPast(**self._stock_forward(prompt, attention_mask, position_ids, stock))

        pixels = {"image": pixel_values, "video": pixel_values_videos}
        self._check_media(pixels, image_sizes)
        masks = self._placeholder_masks(**prompt)
        _check_masks(masks["image"].shape, cache, attention_mask, query_mask)
        media = self._place_media(pixels, image_sizes, masks, pruning)
        tower = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        if not pruning.prunes and pruning.pooling == "before":
            prompt |= {
                "pixel_values": pixel_values,
                "pixel_values_videos": pixel_values_videos,
                "image_sizes": image_sizes,
            }
            outputs = self._stock_forward({**prompt, **tower}, attention_mask, position_ids, stock)
            return ReDiPruneCausalLMOutputWithPast(**outputs)

        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        is_question = _question_mask(embeds, masks, attention_mask, labels, query_mask)
        questions = self._clip_questions(pruning, len(embeds), clip_input_ids, clip_attention_mask)
        words = self._content_words(pruning, embeds, word_input_ids)
        self._encode(media, pixels, image_sizes, pruning, **tower)
        self._select(media, pruning, embeds, is_question, input_ids, questions, words)
        for kind, mask in masks.items():
            tokens = self._project([medium for medium in media if medium.kind == kind], pruning)
            if tokens is not None:
                embeds = embeds.masked_scatter(mask[..., None].expand_as(embeds).to(embeds.device), tokens.to(embeds))

        moved = record = None
        if pruning.prunes and pruning.resolved("positions") == "original":
            before, after = self._position_gaps(media, masks)
            moved, record = (before + after).cumsum(1) - after, TokenRecord(None, (before + after).float())
        if pruning.prunes and pruning.resolved("proportional_attention"):
            sizes = self._token_sizes(media, masks)
            record = TokenRecord(sizes, torch.zeros_like(sizes) if record is None else record.skipped)
        outputs = self._stock_forward({"inputs_embeds": embeds}, attention_mask, position_ids, stock, record, moved)
        return ReDiPruneCausalLMOutputWithPast(
            **outputs,
            image_kept_indices=tuple(tuple(medium.kept) for medium in media if medium.kind == "image") or None,
            video_kept_indices=tuple(medium.kept[0] for medium in media if medium.kind == "video") or None,
        )

    def _stock_forward(self, prompt, attention_mask, position_ids, stock, record=None, moved=None):
        """
        The stock forward pass, at the positions and with the token sizes that are recorded in the cache and in `record`.

        Args:
            prompt: `input_ids` or `inputs_embeds`, and pixels where nothing is pruned.
            stock: the other arguments of the stock forward pass.
            record: the `TokenRecord` of the prompt; `None` = nothing was skipped in it, and each token stands for itself.
            moved: (B, T), how far gaps in the prompt itself move each of its tokens.
        """
        cache, num_layers, places = (
            stock[CACHE_NAME],
            self.config.text_config.num_hidden_layers,
            stock.get("cache_position"),
        )
        tokens = prompt["inputs_embeds"] if prompt.get("input_ids") is None else prompt["input_ids"]
        cached = read_record(cache, num_layers)
        num_cached = 0 if record is None else cached_tokens(cache, places)
        if moved is not None and attention_mask is None:
            # Without a mask, gaps between positions are read as the borders of packed sequences.
            attention_mask = torch.ones(
                len(tokens), num_cached + tokens.shape[1], dtype=torch.long, device=tokens.device
            )
        if cached is not None:
            past = cached.skipped.to(tokens.device).sum(1, keepdim=True).long()
            moved = past if moved is None else moved.to(tokens.device) + past
        if moved is not None:
            position_ids = _default_positions(position_ids, tokens, cache) + moved.to(tokens.device)
            self._warn_beyond_context(position_ids)
        sizes = _all_sizes(cached, record, num_cached)
        if sizes is not None:
            embeds = tokens if tokens.is_floating_point() else self.get_input_embeddings()(tokens)
            attention_mask = biased_mask(
                attention_mask, sizes.to(embeds.device).clamp_min(1).log(), embeds, cache, places
            )
        outputs = super().forward(
            **prompt, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **stock
        )
        cache = outputs.get(CACHE_NAME) if cache is None else cache
        if cache is not None and (cached is not None or record is not None):
            if record is None:
                record = TokenRecord(None, torch.zeros(tokens.shape[:2], device=tokens.device))
            write_record(cache, num_layers, record, num_cached)
        return outputs

    @torch.no_grad()
    def select_tokens(
        self,
        input_ids: torch.LongTensor,
        pixel_values: Optional[torch.FloatTensor] = None,
        pixel_values_videos: Optional[torch.FloatTensor] = None,
        image_sizes: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        keep_ratio: Optional[float] = None,
        clip_input_ids: Optional[torch.LongTensor] = None,
        clip_attention_mask: Optional[torch.LongTensor] = None,
        word_input_ids: Optional[torch.LongTensor] = None,
        **kwargs,
    ) -> list:
        """
        Which tokens a forward pass would keep, without running the language model: for pictures and analysis.

        Returns:
            `list[Medium]`: images first, then videos, each with its `kind`, `row`, `grids` and `kept` indices.
        """
        pruning = self._pruning_of_call(keep_ratio)
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        self._check_media(pixels, image_sizes)
        masks = self._placeholder_masks(input_ids)
        _check_masks(masks["image"].shape, None, attention_mask)
        media = self._place_media(pixels, image_sizes, masks, pruning)
        embeds = self.get_input_embeddings()(input_ids)
        questions = self._clip_questions(pruning, len(embeds), clip_input_ids, clip_attention_mask)
        words = self._content_words(pruning, embeds, word_input_ids)
        self._encode(media, pixels, image_sizes, pruning)
        self._select(media, pruning, embeds, _question_mask(embeds, masks, attention_mask), input_ids, questions, words)
        return media

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_values_videos=None,
        image_sizes=None,
        **kwargs,
    ):
        cache = one_cache(past_key_values, cache)
        media_inputs = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_sizes": image_sizes,
        }
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, **{CACHE_NAME: cache}, inputs_embeds=inputs_embeds, **media_inputs, **kwargs
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
            masks = self._placeholder_masks(**new_tokens).values()
            has_media = any(mask.shape[1] > 1 and mask.any() for mask in masks)
            of_media = [*media_inputs, "query_mask", "clip_input_ids", "clip_attention_mask", "word_input_ids"]
            model_inputs.update(media_inputs if has_media else dict.fromkeys(of_media))
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
        """Whether a prompt that is to be prefilled in chunks has media. Raises ValueError where they are pruned."""
        if all(model_kwargs.get(pixels) is None for pixels in ("pixel_values", "pixel_values_videos")):
            return False
        pruning = self._pruning_of_call(model_kwargs.get("keep_ratio"))
        if pruning.prunes or pruning.pooling != "before":
            raise ValueError(
                f"prefill_chunk_size={size} was given, but the media of this prompt are pruned by the question, which a chunk "
                "does not hold; pass prefill_chunk_size=None, or keep_ratio=1 to the processor."
            )
        return True

    def _expand_inputs_for_generation(
        self,
        expand_size=1,
        is_encoder_decoder=False,
        input_ids=None,
        pixel_values=None,
        pixel_values_videos=None,
        image_sizes=None,
        **kwargs,
    ):
        # Media that a reused cache holds are left out. The others are repeated row by row: repeated one by one, as in the
        # stock class of 4.57, the media of a row that has several would change places.
        embeds = kwargs.get("inputs_embeds")
        masks = self._placeholder_masks(input_ids if embeds is None else None, embeds)
        cached = cached_tokens(kwargs.get(CACHE_NAME))
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        pruning = self._pruning_of_call(kwargs.get("keep_ratio"))
        media = self._place_media(pixels, image_sizes, masks, pruning, cached)
        order = {"image": [], "video": []}
        for row in range(len(masks["image"])):
            for kind, indices in order.items():
                group = [medium for medium in media if medium.kind == kind]
                indices += [index for index, medium in enumerate(group) if medium.row == row] * expand_size
        take = lambda tensor, kind: tensor[order[kind]] if tensor is not None and order[kind] else None  # noqa: E731
        if kwargs.get("query_mask") is None:
            # Covers the prompt alone: what will be generated after it is no part of the question.
            kwargs["query_mask"] = torch.ones_like(masks["image"])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        expanded = {
            "pixel_values": take(pixel_values, "image"),
            "pixel_values_videos": take(pixel_values_videos, "video"),
            "image_sizes": take(image_sizes, "image"),
        }
        return input_ids, kwargs | {key: values for key, values in expanded.items() if values is not None}

    # -- what the media of a prompt are -------------------------------------------------------------------------------

    def _pruning_of_call(self, keep_ratio) -> PruningConfig:
        pruning = self.config.pruning.with_keep_ratio(_one_ratio(keep_ratio))
        # Read where it is used: flash attention takes gaps between positions for the borders of packed sequences.
        attention = self.config.text_config._attn_implementation or ""
        if pruning.prunes and pruning.resolved("positions") == "original" and "flash" in attention:
            raise ValueError(
                f"positions='original' does not work with attn_implementation={attention!r}, which reads gaps between "
                "positions as packed sequences; load the model with attn_implementation='sdpa'."
            )
        if pruning.prunes and pruning.resolved("proportional_attention"):
            if attention not in ("sdpa", "eager"):
                raise ValueError(
                    f"proportional_attention adds to the logits of attention, which attn_implementation={attention!r} does "
                    "not allow; load the model with attn_implementation='sdpa'."
                )
            if getattr(self.config.text_config, "sliding_window", None):
                raise ValueError(
                    "proportional_attention works with full attention alone, but the language model has sliding_window="
                    f"{self.config.text_config.sliding_window}; set proportional_attention to false."
                )
        return pruning

    def _context(self) -> int:
        """How many positions the language model was made for."""
        text = self.config.text_config
        rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        return int(text.max_position_embeddings * (rope.get("factor") or 1))

    def _check_context(self, tokens, cache) -> None:
        """Refuses a prompt that is longer than what the language model was made for; single steps of decoding may go on."""
        if tokens.shape[1] == 1:
            return
        length = cached_tokens(cache) + tokens.shape[1]
        if length > self._context():
            raise ValueError(
                f"the prompt has {length} tokens, but the language model takes at most {self._context()}; shorten the question, "
                "sample fewer frames, or lower keep_ratio."
            )

    def _warn_beyond_context(self, position_ids) -> None:
        """Warns, once for each model size, where a prompt reaches positions that the language model was not made for."""
        limit = self._context()
        if position_ids.shape[1] == 1 or limit in _WARNED_CONTEXTS:
            return
        length = int(position_ids.max()) + 1
        if length > limit:
            _WARNED_CONTEXTS.add(limit)
            logger.warning(
                f"With positions='original' the tokens of this prompt keep the positions of the unpruned one, which has {length} "
                f"tokens, but the language model was made for {limit}. Beyond them answers get worse, without an error. Sample "
                "fewer frames (num_frames=), or set positions='compact'. This is said once."
            )

    def _patches_per_side(self) -> int:
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def _placeholder_masks(self, input_ids=None, inputs_embeds=None) -> dict:
        """For each kind of medium, (B, T) bool: where its placeholders are."""
        token_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        if input_ids is not None:
            return {kind: input_ids == token_id for kind, token_id in token_ids.items()}
        table = self.get_input_embeddings()
        as_tensor = lambda token_id: torch.tensor(token_id, device=inputs_embeds.device)  # noqa: E731
        return {
            kind: (inputs_embeds == table(as_tensor(token_id)).to(inputs_embeds)).all(-1)
            for kind, token_id in token_ids.items()
        }

    def _refuse_empty_placeholders(self, prompt, cache, query_mask, kwargs) -> None:
        """Refuses placeholders of a prompt without media. Those that the model itself has generated are tokens like others."""
        tokens = prompt["inputs_embeds"] if prompt["input_ids"] is None else prompt["input_ids"]
        from_generate = query_mask is not None  # which has compared placeholders and media already
        if tokens.shape[1] == 1 or from_generate or kwargs.get("mm_encoder_outputs") or cached_tokens(cache):
            return
        nothing = {"image": None, "video": None}
        self._place_media(nothing, None, self._placeholder_masks(**prompt), self.config.pruning)

    def _check_media(self, pixels, image_sizes) -> None:
        _check_pixels(pixels)
        images = pixels["image"]
        if images is None:
            return
        if image_sizes is None:
            raise ValueError(
                f"pixel_values of {len(images)} images were passed without image_sizes, which say how their tiles lie; pass all "
                "that the processor returned."
            )
        if images.dim() == 5 and len(images) != len(image_sizes):
            raise ValueError(
                f"pixel_values hold {len(images)} images, but image_sizes {len(image_sizes)}; pass all that the processor returned."
            )

    def _list_media(self, pixels, image_sizes, pruning) -> list:
        """Every image, then every video, with its grids."""
        side, media = self._patches_per_side(), []
        if pixels["image"] is not None:
            for size in image_sizes.tolist():
                grids = image_grids(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size, side)
                media.append(Medium("image", grids))
        if pixels["video"] is not None:
            num_videos, num_frames = pixels["video"].shape[:2]
            grids = video_grids(num_frames, side, pruning.pooling, self.config.spatial_pool_stride)
            media += [Medium("video", grids) for _ in range(num_videos)]
        return media

    def _place_media(self, pixels, image_sizes, masks, pruning, cached: int = 0) -> list:
        """
        The media of the prompt, each with the row of the batch that its placeholders are in.

        The first `cached` tokens of a row are in a reused cache: there either the media of all tokens were passed, and the
        row of those in the cache is `None`, or those of the new tokens alone.
        """
        media = self._list_media(pixels, image_sizes, pruning)
        for kind, mask in masks.items():
            group = [medium for medium in media if medium.kind == kind]
            sizes = [num_placeholders(medium.grids, pruning, newlines=kind == "image") for medium in group]
            in_cache, new = mask[:, :cached].sum(1).tolist(), mask[:, cached:].sum(1).tolist()
            rows = _rows_of_media(new, sizes)
            if rows is None and cached:
                rows = _rows_of_media([old + fresh for old, fresh in zip(in_cache, new)], sizes, in_cache)
            if rows is None:
                raise ValueError(
                    f"the prompt has {sum(new)} {kind} placeholders (by row: {new}), but its {len(group)} {kind}s give "
                    f"{sum(sizes)} tokens (each: {sizes}) with keep_ratio={pruning.keep_ratio}, method={pruning.method!r}, "
                    f"pooling={pruning.pooling!r}, scope={pruning.resolved('scope')!r}. Prepare the inputs with the processor of "
                    "this repository, loaded with the same pruning parameters, and pass all that it returns; a ratio for one call "
                    "goes to the processor as keep_ratio=. To continue a cache, pass the media of the new turn or of all turns."
                )
            for medium, row in zip(group, rows):
                medium.row = row
        return media

    # -- from pixels to kept tokens ----------------------------------------------------------------------------------

    def _tap(self, pixels, needs=frozenset(), vision_feature_layer=None, vision_feature_select_strategy=None) -> dict:
        """
        What the vision tower says of the patches of N images (N, 3, height, width), without CLS.

        Returns:
            `"features"` (N, P, C) of the tapped layer, and those of `"cls_attention"`, `"keys"`, `"last_cls_attention"` and
            `"last_keys"` that are among `needs` (`read_attention`).
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        layers = [layer] if isinstance(layer, int) else layer
        states = run_tower(self.model.vision_tower, pixels, layers, needs)
        # States are counted from the start, embeddings first.
        number = self.config.vision_config.num_hidden_layers + 1
        features = torch.cat([states[index % number] for index in layers], dim=-1)
        features = features[:, 1:] if strategy == "default" else features
        expected = self._patches_per_side() ** 2
        if features.shape[1] != expected:
            raise ValueError(
                f"the vision tower gives {features.shape[1]} tokens an image, but {expected} are patches; pruning needs "
                f"patches alone, and vision_feature_select_strategy={strategy!r} does not leave them."
            )
        return {"features": features, **read_attention(self.model.vision_tower, states, layers[-1], needs)}

    def _look(self, pixels, **tower) -> dict:
        """`_tap`, and where it is needed `"joint"` (N, P, D), the patches in CLIP's joint space."""
        patches = self._tap(pixels, **tower)
        if "joint" in tower["needs"]:
            width = self.config.vision_config.hidden_size  # of several tapped layers the last
            patches["joint"] = self._joint_space().place_tokens(patches["features"][..., -width:])
        return patches

    def _joint_space(self) -> JointSpace:
        """That of the configured text tower, loaded when it is first asked for. None of this model's weights."""
        text_tower = self.config.pruning.text_tower
        with _LOADING:
            joint = self._joint
            if joint is None or joint.text_tower != text_tower:
                joint = self._joint = JointSpace(text_tower, self.config.vision_config.hidden_size)
        return joint

    def _clip_questions(self, pruning, batch: int, ids, mask) -> Optional[torch.Tensor]:
        """(B, D) fp32, the question of each row in CLIP's joint space; `None` where it is not compared there."""
        if not pruning.reads_clip:
            return None
        if ids is None or mask is None or ids.shape != mask.shape or len(ids) != batch:
            shapes = [None if values is None else tuple(values.shape) for values in (ids, mask)]
            raise ValueError(
                f"relevance='clip' with text_tower={pruning.text_tower!r} needs clip_input_ids and clip_attention_mask for "
                f"each of the {batch} rows, (rows, segments, tokens), but their shapes are {shapes}. Prepare the inputs with the "
                "processor of this repository, loaded with the same pruning parameters, and pass all that it returns."
            )
        return self._joint_space().place_questions(ids, mask)

    def _content_words(self, pruning, embeds, ids) -> Optional[list]:
        """For each row the input embeddings (T, H) of its question's content words; `None` where they are not looked up."""
        if not pruning.reads_words:
            return None
        if ids is None or len(ids) != len(embeds):
            raise ValueError(
                f"method={pruning.method!r} with words='content' needs word_input_ids for each of the {len(embeds)} rows, but "
                f"{'there are none' if ids is None else f'their shape is {tuple(ids.shape)}'}. Prepare the inputs with the "
                "processor of this repository, loaded with the same pruning parameters, and pass all that it returns, or set "
                "words to 'all'."
            )
        table = self.get_input_embeddings()
        return [table(row[row >= 0][-pruning.query_max_tokens :].to(embeds.device)).detach() for row in ids]

    def _encode(self, media, pixels, image_sizes, pruning, **tower) -> None:
        """Fills in the sets of every medium."""
        images = [medium for medium in media if medium.kind == "image"]
        videos = [medium for medium in media if medium.kind == "video"]
        if pruning.prunes and METHODS[pruning.method].merges_in_encoder:
            num_layers = self._layers_to_tap(tower.get("vision_feature_layer"))
            if images:
                self._merge_images(images, pixels["image"], image_sizes, pruning, num_layers)
            if videos:
                self._merge_videos(videos, pixels["video"], pruning, num_layers)
            return
        tower["needs"] = METHODS[pruning.method].needs if pruning.prunes else frozenset()
        if pruning.reads_clip:
            tower["needs"] |= {"joint"}
        if images:
            self._encode_images(images, pixels["image"], image_sizes, **tower)
        if videos:
            self._encode_videos(videos, pixels["video"], pruning, **tower)
        if "times" in tower["needs"]:
            for medium in media:
                for grid, patches in zip(medium.grids, medium.sets):
                    starts = torch.arange(grid.frames, device=patches["features"].device) / grid.frames
                    patches["times"] = starts[:, None, None].expand(-1, grid.tokens_per_set, 1)
        for medium in media:
            if taken_jointly(medium.grids, pruning):
                medium.sets = [_concatenate([_map(patches, _as_one_set) for patches in medium.sets], dim=1)]

    def _encode_videos(self, videos, pixels, pruning, **tower) -> None:
        patches = self._look(pixels.flatten(0, 1), **tower)
        if pruning.pooling == "before":
            features = self.model.vision_resampler(patches.pop("features"))
            patches = {"features": features, **_map(patches, self._pool)}
        for index, medium in enumerate(videos):
            medium.sets = [_map(patches, lambda values: values.chunk(len(videos))[index])]

    def _pool(self, values: torch.Tensor) -> torch.Tensor:
        """What goes with features (N, P, D), averaged over the patches that the features are pooled from."""
        side = self._patches_per_side()
        grid = values.mT.unflatten(2, (side, side))
        return F.avg_pool2d(grid, self.config.spatial_pool_stride).flatten(2).mT

    def _encode_images(self, images, pixel_values, image_sizes, **tower) -> None:
        crops, views = self._views_of_images(pixel_values, image_sizes)
        patches = self._look(torch.cat(views), **tower)
        ends = itertools.accumulate(len(views_) for views_ in views)
        for medium, crop, views_, end in zip(images, crops, views, ends):
            start = end - len(views_)
            base = _map(patches, lambda values: values[start : start + 1])
            tiles = _map(
                patches, lambda values: _cropped_tiles(values[start + 1 : end], crop, self._patches_per_side())
            )
            medium.sets = [base, tiles]

    def _views_of_images(self, pixel_values, image_sizes) -> tuple:
        """For each image its `TileCrop` and its views (1 + tiles, 3, height, width), the base view first."""
        side, tile_size = self._patches_per_side(), self.config.vision_config.image_size
        crops = [
            crop_of_tiles(size, self.config.image_grid_pinpoints, tile_size, side) for size in image_sizes.tolist()
        ]
        numbers = [1 + crop.rows * crop.columns for crop in crops]
        if pixel_values.dim() == 5:  # (images, views, 3, height, width), padded to the largest number of views
            return crops, [views[:number] for views, number in zip(pixel_values, numbers)]
        return crops, list(pixel_values.split(numbers))

    # -- merging inside the vision tower -----------------------------------------------------------------------------

    def _layers_to_tap(self, vision_feature_layer=None) -> int:
        """How many layers of the vision tower run before the tapped features."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        total = self.config.vision_config.num_hidden_layers
        number = layer % (total + 1) if isinstance(layer, int) else 0
        if number == 0:
            raise ValueError(
                f"method={self.config.pruning.method!r} merges tokens inside the vision tower and needs the output of one of "
                f"its layers, but vision_feature_layer is {layer!r}; choose another method, or a layer such as -2."
            )
        return number

    def _merge_videos(self, videos, pixels, pruning, num_layers) -> None:
        side, stride, grid = self._patches_per_side(), self.config.spatial_pool_stride, videos[0].grids[0]
        num_kept = self._count_in_encoder(side**2, grid.tokens_per_set, pruning)
        features, anchors = encode_and_merge(self.model.vision_tower, pixels.flatten(0, 1), num_layers, num_kept)
        if pruning.pooling == "before":
            features, anchors = in_raster_order(features, pooled_places(anchors, side, stride))
        for medium, features, anchors in zip(videos, features.chunk(len(videos)), anchors.chunk(len(videos))):
            medium.sets = [{"features": features, "anchors": anchors}]

    def _merge_images(self, images, pixel_values, image_sizes, pruning, num_layers) -> None:
        """Each tile merges down to its part of the budget, and leaves out the patches of its padding."""
        num_patches, device = self._patches_per_side() ** 2, pixel_values.device
        everything = torch.arange(num_patches, device=device)
        by_size, found = defaultdict(list), {}
        crops, views = self._views_of_images(pixel_values, image_sizes)
        places = [_places_of_patches(crop, self._patches_per_side()).to(device) for crop in crops]
        for image, (medium, views_) in enumerate(zip(images, views)):
            inside = [everything] + [(tile >= 0).nonzero()[:, 0] for tile in places[image]]
            counts = [
                self._count_in_encoder(grid.tokens_per_set, grid.tokens_per_set, pruning) for grid in medium.grids
            ]
            budgets = [counts[0], *split_budget(counts[1], [len(patches) for patches in inside[1:]])]
            for view, (pixels, patches, budget) in enumerate(zip(views_, inside, budgets)):
                if budget:
                    by_size[len(patches), budget].append((image, view, pixels, patches))
        for (_, budget), group in by_size.items():
            pixels, inside = (torch.stack([job[field] for job in group]) for field in (2, 3))
            merged = encode_and_merge(self.model.vision_tower, pixels, num_layers, budget, inside)
            for (image, view, *_), features, anchors in zip(group, *merged):
                found[image, view] = features, anchors if view == 0 else places[image][view - 1, anchors]
        for image, medium in enumerate(images):
            base = found[image, 0]
            tiles = [found[image, view] for view in range(1, len(views[image])) if (image, view) in found]
            features = torch.cat([base[0][:0], *(part for part, _ in tiles)])[None]
            anchors = torch.cat([base[1][:0], *(part for _, part in tiles)])[None]
            features, anchors = in_raster_order(features, anchors)
            medium.sets = [
                {"features": base[0][None], "anchors": base[1][None]},
                {"features": features, "anchors": anchors},
            ]

    def _count_in_encoder(self, num_patches: int, num_tokens: int, pruning) -> int:
        """How many of a set's patches leave the tower, where `num_tokens` would be there if nothing were pruned."""
        if num_tokens == 0:
            return 0
        return METHODS[pruning.method].count_in_encoder(num_patches, pruning.count(num_tokens), pruning)

    # -- from what the tower gives to kept tokens --------------------------------------------------------------------

    def _select(self, media, pruning, embeds, is_question, input_ids, questions=None, words=None) -> None:
        """
        Fills in which tokens of every medium stay. Sets of one size are pruned together, in one call.

        `questions` are those of `_clip_questions`, `words` those of `_content_words`.
        """
        method = METHODS[pruning.method]
        weigh, merging = (pruning.prunes and pruning.resolved(key) for key in ("proportional_attention", "merging"))
        by_size = defaultdict(list)
        for medium in media:
            medium.kept, medium.tokens = [None] * len(medium.sets), [None] * len(medium.sets)
            medium.sizes = [None] * len(medium.sets) if weigh else None
            for index, (_, size) in enumerate(token_sets(medium.grids, pruning)):
                num_tokens = medium.sets[index]["features"].shape[1]
                by_size[num_tokens, pruning.count(size)].append((medium, index))
        reads = pruning.prunes and method.needs & {"relevance", "text_rows"} and pruning.query_weighting != "none"
        if reads and words is None:
            words = [row[mask][-pruning.query_max_tokens :] for row, mask in zip(embeds.detach(), is_question)]
            if pruning.resolved("relevance") == "attention":
                words = [read_question(self.model.language_model, text, pruning.relevance_layer) for text in words]
        seeds = _seeds(input_ids, is_question, media, pruning) if "seeds" in method.needs else None
        for (num_tokens, num_kept), sets in by_size.items():
            patches = _concatenate([medium.sets[index] for medium, index in sets])
            anchors = patches.pop("anchors", None)
            numbers = [len(medium.sets[index]["features"]) for medium, index in sets]
            features = patches["features"]
            kept = torch.arange(num_tokens, device=features.device).expand(len(features), -1)
            sizes = torch.ones(kept.shape, device=features.device)
            if num_kept < num_tokens:
                rows = [medium.row for (medium, _), number in zip(sets, numbers) for _ in range(number)]
                tokens = self._visual_tokens(method, patches, words, rows, pruning, questions)
                if seeds is not None:
                    tokens.seeds = [seed for medium, index in sets for seed in seeds[id(medium)][index]]
                features, kept = method.reduce(tokens, num_kept, pruning)
                if weigh or merging:
                    nearest = nearest_kept(tokens.compared, kept, tokens.times, pruning.resolved("time_weight"))
                    sizes = group_sizes(nearest, num_kept)
                if merging:
                    means = group_means(patches["features"], nearest, num_kept)
                    features = features.float().lerp(means, merging).to(features.dtype)
            if weigh:
                for (medium, index), sizes in zip(sets, sizes.split(numbers)):
                    medium.sizes[index] = sizes
            if anchors is not None:
                kept = anchors.gather(1, kept)
            for (medium, index), features, kept in zip(sets, features.split(numbers), kept.split(numbers)):
                medium.tokens[index], medium.kept[index] = features, kept

    @torch.no_grad()
    def _visual_tokens(self, method, patches, words, rows, pruning, questions=None) -> VisualTokens:
        """
        What the method may look at.

        Args:
            patches: by name, what the vision tower gives of the sets.
            words: for each row of the batch its question (T, H), as input embeddings, or for the relevance `"attention"` as
                the layer before gives it; `None` where it is not used.
            rows: for each set the row of the batch that it belongs to.
            questions: for each row its question in CLIP's joint space (B, D), for the relevance `"clip"`.
        """
        relevance, distance = pruning.resolved("relevance"), pruning.resolved("distance")
        tokens = VisualTokens(**patches)
        for name in patches.keys() & {"cls_attention", "last_cls_attention", "times"}:
            setattr(tokens, name, patches[name].squeeze(-1))
        reads = method.needs & {"relevance", "text_rows"} if words is not None else frozenset()
        groups = pruning.resolved("proportional_attention") or pruning.resolved("merging")
        compares = "compared" in method.needs or groups
        compares_projected = compares and distance == "projected"
        reads_projected = reads and (relevance in ("projected", "attention") or "text_rows" in reads)
        if "projected" in method.needs or compares_projected or reads_projected:
            tokens.projected = self.model.multi_modal_projector(tokens.features)
        tokens.compared = tokens.projected if distance == "projected" else tokens.features
        if questions is not None and tokens.joint is None:  # merged inside the vision tower
            tokens.joint = self._joint_space().place_tokens(tokens.features)
        if "relevance" in reads:
            tokens.relevance = self._relevance(relevance, tokens, words, rows, pruning, questions)
        if "text_rows" in reads:
            compare = self._attention_rows(pruning) if relevance == "attention" else word_rows
            share = lambda text, projected: compare(text, projected) / len(text)  # noqa: E731
            tokens.text_rows = _rows_by_question(share, words, tokens.projected, rows)
        return tokens

    def _relevance(self, relevance, tokens, words, rows, pruning, questions) -> torch.Tensor:
        """(N, L) fp32: how much the tokens of each set have to do with the question of its sample."""
        if relevance == "clip":
            return clip_relevance(tokens.joint, questions.to(tokens.joint.device)[rows])
        if relevance == "attention":
            return attention_relevance(_rows_by_question(self._attention_rows(pruning), words, tokens.projected, rows))
        queries = torch.stack([build_query(text, pruning.query_weighting) for text in words])
        if relevance == "pooled":
            queries = align_query(queries, tokens.features.shape[-1])
        features = tokens.features if relevance == "pooled" else tokens.projected
        return cosine_relevance(features, queries.to(features.device)[rows])

    def _attention_rows(self, pruning):
        layer = self.model.language_model.layers[pruning.relevance_layer]
        return lambda words, tokens: self._largest_of_all_heads(attention_rows(layer, words, tokens))

    def _largest_of_all_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows that are the largest of the heads of this process, the largest of all: tensor parallelism shares out the heads,
        and every process has to keep the same tokens."""
        mesh = getattr(self, "_device_mesh", None)  # set by transformers; 4.57 does not name its one dimension
        names = None if mesh is None else mesh.mesh_dim_names or ("tp",)
        if names and "tp" in names:
            group = mesh.get_group(names.index("tp"))
            torch.distributed.all_reduce(rows, torch.distributed.ReduceOp.MAX, group=group)
        return rows

    def _project(self, media, pruning) -> Optional[torch.Tensor]:
        """The kept tokens of media of one kind, projected, in the order of their placeholders: (tokens, H)."""
        if not media:
            return None
        sets = [tokens.flatten(0, 1) for medium in media for tokens in medium.tokens]
        tokens = self.model.multi_modal_projector(torch.cat(sets))
        if pruning.prunes or media[0].kind == "video":
            return tokens
        parts = []
        for medium, (base, tiles) in zip(media, _pairs(tokens.split([len(tokens_) for tokens_ in sets]))):
            rows = tiles.unflatten(0, (medium.grids[1].height, medium.grids[1].width))
            newline = self.model.image_newline.to(rows).expand(len(rows), 1, -1)
            parts += [base, torch.cat([rows, newline], dim=1).flatten(0, 1)]
        return torch.cat(parts)

    # -- what the language model has to know of what was dropped -------------------------------------------------------

    def _token_sizes(self, media, masks) -> torch.Tensor:
        """(B, T) fp32: the number of tokens that each visual token stands for, 1 for text."""
        result = torch.ones(masks["image"].shape, device=masks["image"].device)
        for kind, mask in masks.items():
            sizes = [sizes.flatten() for medium in media if medium.kind == kind for sizes in medium.sizes]
            if sizes:
                result[mask] = torch.cat(sizes).to(result)
        return result

    def _position_gaps(self, media, masks) -> tuple:
        """Positions of the unpruned prompt that are left out right before and right after each token: two LongTensors (B, T)."""
        gaps = []
        for kind, mask in masks.items():
            group = [medium for medium in media if medium.kind == kind]
            lengths = [num_unpruned(medium.grids, newlines=kind == "image") for medium in group]
            gaps.append(position_gaps(mask, [medium.offsets() for medium in group], lengths))
        (images_before, images_after), (videos_before, videos_after) = gaps
        return images_before + videos_before, images_after + videos_after


def _one_ratio(keep_ratio) -> Optional[float]:
    """The keep ratio of a call; pipelines with a batch size give a list, with that of each prompt."""
    if isinstance(keep_ratio, (list, tuple)):
        if len(set(keep_ratio)) != 1:
            raise ValueError(f"keep_ratio is {keep_ratio!r}, but must be the same for all prompts of a batch")
        keep_ratio = keep_ratio[0]
    return None if keep_ratio is None else float(keep_ratio)


def _check_masks(shape, cache, attention_mask, query_mask=None) -> None:
    """Refuses masks that do not cover the tokens of the prompt, whose ids have the given shape (B, T), and of the cache."""
    batch, number = shape
    total = cached_tokens(cache) + number
    if (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dim() == 2
        and attention_mask.shape != (batch, total)
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but must be {(batch, total)}: one entry for each token of "
            f"the cache ({total - number}) and of the prompt ({number}). Pass the one that the processor returned with the prompt."
        )
    if query_mask is not None and (query_mask.dim() != 2 or len(query_mask) != batch or query_mask.shape[1] < number):
        raise ValueError(
            f"query_mask has shape {tuple(query_mask.shape)}, but must be ({batch}, {number}) as the prompt, or longer: then "
            "its last entries are those of the prompt."
        )


def _check_pixels(pixels: dict) -> None:
    for kind, values in pixels.items():
        if values is not None and not torch.isfinite(values).all():
            bad = [index for index, item in enumerate(values) if not torch.isfinite(item).all()]
            raise ValueError(f"the pixels of {kind} {bad} hold NaN or infinity; check the file and its preprocessing.")


def _rows_of_media(placeholders: list, sizes: list, in_cache: Optional[list] = None) -> Optional[list]:
    """
    The row that each medium is in, media filling the placeholders of each row in order; `None` if they do not fit.

    The row of a medium that lies within the first `in_cache` placeholders of its row is `None`.
    """
    rows, row, filled = [], 0, 0
    for size in sizes:
        while filled == placeholders[row] and row + 1 < len(placeholders):
            row, filled = row + 1, 0
        rows.append(None if in_cache and filled < in_cache[row] else row)
        filled += size
        if filled > placeholders[row]:
            return None
    return None if filled < placeholders[row] or any(placeholders[row + 1 :]) else rows


def _question_mask(embeds, masks, attention_mask=None, labels=None, query_mask=None) -> torch.Tensor:
    """(B, T) bool: the text after the last placeholder of each row that is neither padding nor an answer."""
    num_tokens = embeds.shape[1]
    is_medium = masks["image"] | masks["video"]
    is_question = is_medium.flip(1).cumsum(1).flip(1) == 0
    if isinstance(attention_mask, dict):  # one for each kind of attention layer
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is not None:
        is_question &= _visible(attention_mask, num_tokens).to(is_question.device)
    if query_mask is not None:
        is_question &= query_mask[:, -num_tokens:].bool().to(is_question.device)
    elif labels is not None:
        is_question &= (labels == -100).to(is_question.device)
    return is_question


def _visible(attention_mask, num_tokens: int) -> torch.Tensor:
    """Which of the last `num_tokens` tokens are not padding, (B, num_tokens) bool, from a 2-D or an expanded 4-D mask."""
    if attention_mask.dim() == 2:
        return attention_mask[:, -num_tokens:].bool()
    # The last token sees every token but padding. A static cache is longer than the prompt, which it starts with.
    last_row = attention_mask[:, 0, -1, :num_tokens]
    return last_row if last_row.dtype == torch.bool else last_row == 0


def _all_sizes(cached, record, num_cached) -> Optional[torch.Tensor]:
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


def _default_positions(position_ids, tokens, cache) -> torch.LongTensor:
    """`position_ids`, or those that the stock model would use for `tokens` (B, T, ...), (1 or B, T)."""
    if position_ids is not None:
        return position_ids
    past = cached_tokens(cache)
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]


def _seeds(input_ids, is_question, media, pruning) -> dict:
    """For each medium (by id) one seed for each of its sets; they depend on the sample's question alone."""
    seeds, counters = {}, defaultdict(itertools.count)
    for medium in media:
        question = b"" if input_ids is None else input_ids[medium.row][is_question[medium.row]].cpu().numpy().tobytes()
        start = zlib.crc32(question, pruning.seed)
        counter = counters[medium.row]
        sets = token_sets(medium.grids, pruning)
        seeds[id(medium)] = [[start + next(counter) for _ in range(number)] for number, _ in sets]
    return seeds


def _rows_by_question(compare, words: list, projected: torch.Tensor, rows: list) -> torch.Tensor:
    """`compare(words (T, H), tokens (n, L, H)) -> (n, T, L)` for the sets of each sample, as one (N, T', L)."""
    parts, start = [], 0
    for row, group in itertools.groupby(rows):
        end = start + len(list(group))
        tokens, start = projected[start:end], end
        text = words[row].to(tokens.device)
        parts.append(compare(text, tokens) if len(text) else tokens.new_zeros(len(tokens), 0, tokens.shape[1]).float())
    return stack_rows(parts)


def _cropped_tiles(values: torch.Tensor, crop, side: int) -> torch.Tensor:
    """What the tower says of the patches of an image's tiles (tiles, P, D), in the raster order of the image: (1, L, D)."""
    tiles = values.unflatten(0, (crop.rows, crop.columns)).unflatten(2, (side, side))
    tiles = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # rows and columns of the whole image
    tiles = tiles[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return tiles.flatten(0, 1)[None]


def _places_of_patches(crop, side: int) -> torch.LongTensor:
    """For each patch of an image's tiles (tiles, P) its index among the unpadded ones in raster order, -1 for padding."""
    shape = (crop.rows * crop.columns, side**2)
    numbers = torch.arange(shape[0] * shape[1]).view(*shape, 1)
    unpadded = _cropped_tiles(numbers, crop, side).flatten()
    places = torch.full((numbers.numel(),), -1).scatter_(0, unpadded, torch.arange(len(unpadded)))
    return places.view(shape)


def _map(patches: dict, function) -> dict:
    return {name: function(values) for name, values in patches.items()}


def _concatenate(sets: list, dim: int = 0) -> dict:
    return {name: torch.cat([patches[name] for patches in sets], dim=dim) for name in sets[0]}


def _as_one_set(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(0, 1)[None]


def _pairs(items):
    return zip(items[::2], items[1::2])


# So that saving copies this file and those that it imports, also where the class was not loaded through an Auto class.
ReDiPruneLlavaNextVideoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
