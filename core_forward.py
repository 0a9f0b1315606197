"""The pruned forward pass, for every backbone: media are encoded, pruned by the question, projected and put in their places."""

from dataclasses import dataclass
from typing import Optional

import torch
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .core_cache import TokenRecord, cached_tokens, one_cache
from .core_encoded import EncodedMedia
from .core_inner import InnerCall, inner_numbers
from .core_items import MediaSizes, tokens_by_place
from .core_language import LanguageForwardMixin
from .core_layout import sizes_of_tiled
from .core_media import MediaStagesMixin
from .core_positions import check_context
from .core_question import Question, check_masks, question_mask
from .hub_versions import CACHE_NAME


@dataclass
class KeptIndices:
    """
    For model outputs: what was kept.

    Attributes:
        image_kept_indices: for each image one LongTensor (k,).
        video_kept_indices: for each video one LongTensor (k,).
        inner_kept_indices: for each prompt one LongTensor (k,), the places in it of the visual tokens that the last layer of the
            language model was reached by; `None` where all tokens reach it.

    Indices count in raster order through all frames of a video, or through an image's views (`Layout`); those of a merged token
    are of the token whose place it takes. Of tokens merged inside the vision encoder they may repeat where pooling makes the
    grid coarser. `None` where the stock forward pass ran, which keeps all. `model.layouts_of(...)` and `Layout.split` tell
    frames apart.
    """

    image_kept_indices: Optional[tuple] = None
    video_kept_indices: Optional[tuple] = None
    inner_kept_indices: Optional[tuple] = None


class PrunedForwardMixin(MediaStagesMixin, LanguageForwardMixin):
    """
    For model classes, before the stock class: its forward pass with the tokens that `config.pruning` ([`PruningConfig`]) leaves.

    A keep ratio of 1 is the stock class, bit for bit. What a backbone says is in its attributes and in `tower_of`.

    Attributes:
        output_class: its stock output with `KeptIndices`.
    """

    output_class = None

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
        pixel_values_images: Optional[torch.FloatTensor] = None,
        keep_ratio: Optional[float] = None,
        keep_tokens: Optional[int] = None,
        query_mask: Optional[torch.Tensor] = None,
        clip_input_ids: Optional[torch.LongTensor] = None,
        clip_attention_mask: Optional[torch.LongTensor] = None,
        word_input_ids: Optional[torch.LongTensor] = None,
        batch_num_images: Optional[torch.LongTensor] = None,
        encoded_media: Optional[EncodedMedia] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
        video_grid_thw: Optional[torch.LongTensor] = None,
        second_per_grid_ts: Optional[torch.Tensor] = None,
        mm_token_type_ids: Optional[torch.LongTensor] = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """
        As in the stock class, and:

        Args:
            keep_ratio (`float`, *optional*) or keep_tokens (`int`, *optional*): budget of this call, as the processor returned
                it; the config's otherwise.
            query_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): true where a token may belong to the
                question; the default is wherever `labels` asks for nothing.
            clip_input_ids (`torch.LongTensor` of shape `(batch, segments, tokens)`, *optional*): the question as the text tower
                reads it, and `clip_attention_mask` with 0 for its padding, as the processor returned them.
            word_input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): the content words of the question, -1
                where a row has fewer, as the processor returned them.
            batch_num_images (`torch.LongTensor` of shape `(prompts,)`, *optional*): how many images each prompt that has some
                holds, for LLaVA-OneVision, as the processor returned them.
            encoded_media ([`EncodedMedia`], *optional*): what `encode_media` returned, instead of pixels.
            image_grid_thw, video_grid_thw (`torch.LongTensor` of shape `(items, 3)`, *optional*): the grids of patches of models
                whose media have their own sizes, and `second_per_grid_ts` how long each step of a video's grid lasts.
            mm_token_type_ids: not read; where media are is told by `input_ids`.
            past_key_values: the cache, as it is called before transformers 5.24; `cache` is the same argument by its new name.
                Both work with every version.
            pixel_values_images: `pixel_values`, as transformers 4.57 calls them in Video-LLaVA.
            position_ids: positions in the pruned prompt; other `positions` than `"compact"` add the gaps to them.

        Returns:
            `output_class`, with [`KeptIndices`], or a tuple for `return_dict=False`.

        Raises:
            OSError: the text tower cannot be reached.
            ValueError: the prompt has more or fewer placeholders than tokens that stay; pixels or features are not finite;
                the model takes no such media; `encoded_media` are not what the encoder would make now; `clip_input_ids` are
                missing where the question is compared in CLIP's joint space, or `word_input_ids` where its content words are
                looked up.
        """
        # The signature names `logits_to_keep`, so that `generate` asks for the last token's logits alone, and leaves out
        # `mm_encoder_outputs`: with it, `generate` of 5.x would project all tokens before they can be pruned here.
        pruning, cache = self.pruning_of_call(keep_ratio, keep_tokens), one_cache(past_key_values, cache)
        self.refuse_projected(kwargs.get("mm_encoder_outputs"), pruning)
        prompt = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        stock = {CACHE_NAME: cache, "labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens.shape[1] > 1:  # single steps of decoding may go on
            check_context(self.config.text_config, cached_tokens(cache) + tokens.shape[1])
        pixels = {"image": pixel_values_images if pixel_values is None else pixel_values, "video": pixel_values_videos}
        if pixels["image"] is None and pixels["video"] is None and encoded_media is None:
            self.refuse_empty_placeholders(prompt, cache, query_mask, kwargs)
            return self.output_class(**self.run_language_model(prompt, attention_mask, position_ids, stock))

        image_sizes = sizes_of_tiled(image_sizes, batch_num_images)
        sizes = MediaSizes(image_sizes, image_grid_thw, video_grid_thw, second_per_grid_ts)
        tower = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        masks = self.placeholder_masks(**prompt)
        check_masks(masks["image"].shape, cached_tokens(cache), attention_mask, query_mask)
        items = self.placed_items(pixels, sizes, pruning, masks, encoded_media, **tower)
        if not pruning.drops_tokens and pruning.video_pooling and encoded_media is None:
            prompt |= self.stock_pixels(pixels, sizes) | tower
            outputs = self.run_language_model(
                prompt,
                attention_mask,
                position_ids,
                stock,
                *self.place_in_unpruned(pruning, masks, items, attention_mask, cache),
            )
            return self.output_class(**outputs)

        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        is_question = question_mask(masks["image"] | masks["video"], attention_mask, labels, query_mask)
        question = self._question(
            pruning, embeds, is_question, input_ids, clip_input_ids, clip_attention_mask, word_input_ids
        )
        self.fill_items(items, pixels, pruning, encoded_media, embeds.device, **tower)
        self.prune_items(items, pruning, question)
        for kind, mask in masks.items():
            projected = self.project_items([item for item in items if item.kind == kind], pruning)
            if projected is not None:
                where = mask[..., None].expand_as(embeds).to(embeds.device)
                embeds = embeds.masked_scatter(where, projected.to(embeds))

        record, shift = self.place_in_unpruned(pruning, masks, items, attention_mask, cache)
        if pruning.drops_tokens and pruning.resolved("proportional_attention"):
            sizes = torch.ones(embeds.shape[:2], device=embeds.device)
            if pruning.prunes:
                sizes = tokens_by_place(items, masks, "token_sizes", 1.0)
            record = TokenRecord(sizes, torch.zeros_like(sizes) if record is None else record.skipped)
        prompt = {"inputs_embeds": embeds, **self.companions_by_place(items, masks)}
        inner = None
        if pruning.inner is not None:
            is_visual = (masks["image"] | masks["video"]).to(embeds.device)
            inner = InnerCall(
                pruning, is_visual, is_question.to(embeds.device), inner_numbers(items, is_visual, pruning)
            )
        by_distance = pruning.drops_tokens and pruning.distance_bias
        outputs = self.run_language_model(
            prompt, attention_mask, position_ids, stock, record, shift, inner, by_distance
        )
        kept = {kind: tuple(item.kept for item in items if item.kind == kind) or None for kind in masks}
        return self.output_class(**outputs, image_kept_indices=kept["image"], video_kept_indices=kept["video"])

    @torch.no_grad()
    def select_tokens(
        self,
        input_ids: torch.LongTensor,
        pixel_values: Optional[torch.FloatTensor] = None,
        pixel_values_videos: Optional[torch.FloatTensor] = None,
        image_sizes: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        pixel_values_images: Optional[torch.FloatTensor] = None,
        keep_ratio: Optional[float] = None,
        keep_tokens: Optional[int] = None,
        clip_input_ids: Optional[torch.LongTensor] = None,
        clip_attention_mask: Optional[torch.LongTensor] = None,
        word_input_ids: Optional[torch.LongTensor] = None,
        batch_num_images: Optional[torch.LongTensor] = None,
        encoded_media: Optional[EncodedMedia] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
        video_grid_thw: Optional[torch.LongTensor] = None,
        return_signals: bool = False,
        **kwargs,
    ) -> list:
        """
        Which tokens a forward pass would keep, without running the language model: for pictures and analysis.

        Args:
            return_signals (`bool`, defaults to `False`): keep in each item the signals that the method was shown.

        Returns:
            `list[MediaItem]`: images first, then videos, each with its `layout`, `row` and flat `kept` indices.
        """
        pruning = self.pruning_of_call(keep_ratio, keep_tokens)
        pixels = {"image": pixel_values_images if pixel_values is None else pixel_values, "video": pixel_values_videos}
        sizes = MediaSizes(sizes_of_tiled(image_sizes, batch_num_images), image_grid_thw, video_grid_thw)
        masks = self.placeholder_masks(input_ids)
        check_masks(masks["image"].shape, 0, attention_mask)
        items = self.placed_items(pixels, sizes, pruning, masks, encoded_media)
        embeds = self.get_input_embeddings()(input_ids)
        is_question = question_mask(masks["image"] | masks["video"], attention_mask)
        question = self._question(
            pruning, embeds, is_question, input_ids, clip_input_ids, clip_attention_mask, word_input_ids
        )
        self.fill_items(items, pixels, pruning, encoded_media, embeds.device)
        self.prune_items(items, pruning, question, return_signals)
        return items

    @torch.compiler.disable  # how long a question is depends on the prompt
    def _question(self, pruning, embeds, is_question, input_ids, clip_ids, clip_mask, word_ids) -> Question:
        rows = range(len(embeds))
        question = Question([embeds[row].detach()[is_question[row]] for row in rows])
        if input_ids is not None:
            question.ids = [input_ids[row][is_question[row]] for row in rows]
        if pruning.reads_clip:
            question.clip = self._clip_questions(pruning, len(embeds), clip_ids, clip_mask)
        if pruning.reads_words:
            question.words = self._content_words(pruning, embeds, word_ids)
        return question

    def _clip_questions(self, pruning, batch: int, ids, mask) -> torch.Tensor:
        """(B, D) fp32, the question of each row in CLIP's joint space."""
        if ids is None or mask is None or ids.shape != mask.shape or len(ids) != batch:
            shapes = [None if values is None else tuple(values.shape) for values in (ids, mask)]
            raise ValueError(
                f"relevance='clip' with text_tower={pruning.text_tower!r} needs clip_input_ids and clip_attention_mask for "
                f"each of the {batch} rows, (rows, segments, tokens), but their shapes are {shapes}. Prepare the inputs with "
                "the processor of this repository, loaded with the same pruning parameters, and pass all that it returns."
            )
        return self.joint_space().place_questions(ids, mask)

    def _content_words(self, pruning, embeds, ids) -> list:
        """For each row the input embeddings (T, H) of its question's content words."""
        if ids is None or len(ids) != len(embeds):
            raise ValueError(
                f"method={pruning.method!r} with words='content' needs word_input_ids for each of the {len(embeds)} rows, but "
                f"{'there are none' if ids is None else f'their shape is {tuple(ids.shape)}'}. Prepare the inputs with the "
                "processor of this repository, loaded with the same pruning parameters, and pass all that it returns, or set "
                "words to 'all'."
            )
        table = self.get_input_embeddings()
        return [table(row[row >= 0].to(embeds.device)).detach() for row in ids]
