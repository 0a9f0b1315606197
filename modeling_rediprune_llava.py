"""LLaVA-NeXT-Video whose visual tokens are pruned between the vision encoder and the projector."""

import itertools
import os
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Optional

import torch
from transformers import LlavaNextVideoForConditionalGeneration
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoCausalLMOutputWithPast
from transformers.utils import logging

from .configuration_rediprune import PruningConfig, ReDiPruneConfig
from .geometry_rediprune import crop_of_tiles, image_grids, num_placeholders, num_unpruned, video_grids
from .linking_rediprune import explained, follow_link, same_weights, sample_weights
from .methods_rediprune import METHODS, VisualTokens
from .positions_rediprune import image_offsets, position_gaps, video_offsets
from .selection_rediprune import align_query, build_query, gather_tokens

logger = logging.get_logger(__name__)

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

    Indices count in raster order within the grid of their set. `None` where the stock forward ran, which keeps all.
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
        features: for each grid (frames, L, C) features of the tapped vision layer.
        kept: for each grid (frames, k) indices of the tokens that stay, ascending.
    """

    kind: str
    grids: list
    row: Optional[int] = None
    features: Optional[list] = None
    kept: Optional[list] = None

    def offsets(self) -> torch.LongTensor:
        """Where the kept tokens stand in the unpruned medium, (number kept,)."""
        if self.kind == "video":
            return video_offsets(self.grids[0].tokens_per_set, self.kept[0])
        base, tiles = self.grids
        return image_offsets(base.tokens_per_set, tiles.width, self.kept[0][0], self.kept[1][0])


class ReDiPruneLlavaNextVideoForConditionalGeneration(LlavaNextVideoForConditionalGeneration):
    """
    [`LlavaNextVideoForConditionalGeneration`] that prunes visual tokens as `config.pruning` says ([`PruningConfig`]).

    A keep ratio of 1 is the stock class, bit for bit.
    """

    config_class = ReDiPruneConfig
    config: ReDiPruneConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, output_loading_info=False, **kwargs):
        """
        As in the stock class, but weights never get lost silently, and those of a linked variant come from where its
        config's `weights_from` says.

        Raises:
            OSError: the base of a linked variant cannot be loaded.
            ValueError: the checkpoint lacks a tensor of the model or holds one that the model does not have (the message
                names them), or the base of a linked variant is of another architecture.
        """
        variant = pretrained_model_name_or_path
        source, kwargs = follow_link(variant, kwargs)
        if source is variant:
            return cls._load(variant, *args, output_loading_info=output_loading_info, **kwargs)
        with explained(kwargs["config"], variant):
            model, info = cls._load(source, *args, output_loading_info=True, **kwargs)
        model.name_or_path = model.config.name_or_path = str(variant)
        model._linked = (model.config.weights_from, model.config.weights_revision, sample_weights(model))
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, *args, output_loading_info, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **{**LOADING_OPTIONS, **kwargs})
        problems = [
            f"{len(info[key])} {key.replace('_', ' ')} ({', '.join(sorted(info[key])[:5])}{', ...' if len(info[key]) > 5 else ''})"
            for key in ("missing_keys", "unexpected_keys")
            if info[key]
        ]
        if problems:
            raise ValueError(
                f"the checkpoint does not fit {cls.__name__}: {'; '.join(problems)}. Missing tensors would be random and "
                "unexpected ones lost, so nothing was loaded; check that the files belong to this config.json."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, materialise=False, push_to_hub=False, **kwargs):
        """
        As in the stock class, but a linked variant stays linked: its config names `weights_from`, and no weights are
        written.

        Args:
            materialise (`bool`, defaults to `False`): write the weights of a linked variant, and no link. Happens by itself,
                with a warning, when they are no longer those of the base, as after training.
        """
        config = self.config
        if config.weights_from is None or getattr(self, "_hf_peft_config_loaded", False):  # adapters alone are saved
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if not materialise and not self._weights_are_linked():
            materialise = True
            logger.warning(
                f"The weights are not those of weights_from={config.weights_from!r} any more, so they are saved in full and "
                "the link is left out."
            )
        if materialise:
            link = config.weights_from, config.weights_revision
            config.weights_from = config.weights_revision = None
            try:
                return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
            finally:
                config.weights_from, config.weights_revision = link
        if push_to_hub:
            hub_keys = ("commit_message", "private", "token", "create_pr", "revision")
            hub = {key: kwargs[key] for key in hub_keys if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory)), **hub)
        config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)
        custom_object_save(self, save_directory)

    def _weights_are_linked(self) -> bool:
        *link, samples = getattr(self, "_linked", (None, None, None))
        return link == [self.config.weights_from, self.config.weights_revision] and same_weights(self, samples)

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        pixel_values: Optional[torch.FloatTensor] = None,
        pixel_values_videos: Optional[torch.FloatTensor] = None,
        image_sizes: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values=None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        vision_feature_layer=None,
        vision_feature_select_strategy: Optional[str] = None,
        labels: Optional[torch.LongTensor] = None,
        logits_to_keep=0,
        keep_ratio: Optional[float] = None,
        query_mask: Optional[torch.Tensor] = None,
        **kwargs,
    ):
        """
        As in the stock class, and:

        Args:
            keep_ratio (`float`, *optional*): keep ratio of this call, as the processor returned it; the config's otherwise.
            query_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): true where a token may belong to the
                question; the default is wherever `labels` asks for nothing.
            position_ids: positions in the pruned prompt; `positions="original"` adds the gaps to them.

        Returns:
            [`ReDiPruneCausalLMOutputWithPast`], or a tuple for `return_dict=False`.

        Raises:
            ValueError: the prompt has more or fewer placeholders than tokens that stay; pixels or features are not finite.
        """
        # The signature names `logits_to_keep`, so that `generate` asks for the last token's logits alone, and leaves out
        # `mm_encoder_outputs`: with it, `generate` of 5.x would project all tokens before they can be pruned here.
        pruning = self._pruning_of_call(keep_ratio)
        prompt = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        stock = {"past_key_values": past_key_values, "labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        if pixel_values is None and pixel_values_videos is None:
            position_ids = self._continue_positions(position_ids, prompt, past_key_values)
            return super().forward(**prompt, attention_mask=attention_mask, position_ids=position_ids, **stock)

        pixels = {"image": pixel_values, "video": pixel_values_videos}
        _check_pixels(pixels)
        masks = self._placeholder_masks(**prompt)
        media = self._place_media(pixels, image_sizes, masks, pruning)
        tower = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        if not pruning.prunes and pruning.pooling == "before":
            position_ids = self._continue_positions(position_ids, prompt, past_key_values)
            return super().forward(
                **prompt,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                image_sizes=image_sizes,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **tower,
                **stock,
            )

        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        is_question = _question_mask(embeds, masks, attention_mask, labels, query_mask)
        self._encode(media, pixels, image_sizes, pruning, **tower)
        self._select(media, pruning, embeds, is_question, input_ids)
        for kind, mask in masks.items():
            tokens = self._project([medium for medium in media if medium.kind == kind], pruning)
            if tokens is not None:
                embeds = embeds.masked_scatter(mask[..., None].expand_as(embeds).to(embeds.device), tokens.to(embeds))

        shift = None
        if pruning.prunes and pruning.positions == "original":
            position_ids, shift = self._spread_positions(position_ids, media, masks, past_key_values)
            if attention_mask is None:
                # Without a mask and a cache, gaps between positions are read as the borders of packed sequences.
                attention_mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        outputs = super().forward(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **stock
        )
        if isinstance(outputs, tuple):
            return outputs
        if shift is not None and outputs.past_key_values is not None:
            # The cache is what goes from step to step and from turn to turn, so it carries how far its text was moved.
            outputs.past_key_values.position_shift = shift
        return ReDiPruneCausalLMOutputWithPast(
            **outputs,
            image_kept_indices=tuple(tuple(medium.kept) for medium in media if medium.kind == "image") or None,
            video_kept_indices=tuple(medium.kept[0] for medium in media if medium.kind == "video") or None,
        )

    @torch.no_grad()
    def select_tokens(
        self,
        input_ids: torch.LongTensor,
        pixel_values: Optional[torch.FloatTensor] = None,
        pixel_values_videos: Optional[torch.FloatTensor] = None,
        image_sizes: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        keep_ratio: Optional[float] = None,
        **kwargs,
    ) -> list:
        """
        Which tokens a forward pass would keep, without running the language model: for pictures and analysis.

        Returns:
            `list[Medium]`: images first, then videos, each with its `kind`, `row`, `grids` and `kept` indices.
        """
        pruning = self._pruning_of_call(keep_ratio)
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        _check_pixels(pixels)
        masks = self._placeholder_masks(input_ids)
        media = self._place_media(pixels, image_sizes, masks, pruning)
        embeds = self.get_input_embeddings()(input_ids)
        self._encode(media, pixels, image_sizes, pruning)
        self._select(media, pruning, embeds, _question_mask(embeds, masks, attention_mask), input_ids)
        return media

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, pixel_values=None, pixel_values_videos=None, image_sizes=None, **kwargs
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_sizes=image_sizes,
            **kwargs,
        )
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if cached:
            # A reused cache holds the media of earlier turns; only those of the new tokens are encoded.
            new_ids = model_inputs.get("input_ids")
            media_inputs = {"pixel_values": None, "pixel_values_videos": None, "image_sizes": None}
            if new_ids is not None and new_ids.shape[1] > 1:
                pixels = {"image": pixel_values, "video": pixel_values_videos}
                media_inputs = self._new_media(input_ids, new_ids, pixels, image_sizes, kwargs.get("keep_ratio"))
            model_inputs.update(media_inputs)
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # Without a cache every step sees the media again: what was generated must not become part of the question.
        if not model_kwargs.get("use_cache", True):
            mask = model_kwargs.get("query_mask")
            if mask is None:
                prompt = model_kwargs.get("attention_mask")
                prompt = model_kwargs["position_ids"] if prompt is None else prompt  # 5.x drops a mask of ones
                mask = outputs.logits.new_ones(len(outputs.logits), prompt.shape[-1], dtype=torch.bool)
            model_kwargs["query_mask"] = torch.cat([mask, mask.new_zeros(mask.shape[0], 1)], dim=1)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    # -- what the media of a prompt are -------------------------------------------------------------------------------

    def _pruning_of_call(self, keep_ratio) -> PruningConfig:
        pruning = self.config.pruning.with_keep_ratio(None if keep_ratio is None else float(keep_ratio))
        # Read where it is used: flash attention takes gaps between positions for the borders of packed sequences.
        attention = self.config.text_config._attn_implementation or ""
        if pruning.prunes and pruning.positions == "original" and "flash" in attention:
            raise ValueError(
                f"positions='original' does not work with attn_implementation={attention!r}, which reads gaps between "
                "positions as packed sequences; load the model with attn_implementation='sdpa'."
            )
        return pruning

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

    def _place_media(self, pixels, image_sizes, masks, pruning) -> list:
        """The media of the prompt, each with the row of the batch that its placeholders are in."""
        media = self._list_media(pixels, image_sizes, pruning)
        for kind, mask in masks.items():
            group = [medium for medium in media if medium.kind == kind]
            sizes = [num_placeholders(medium.grids, pruning, newlines=kind == "image") for medium in group]
            rows = _rows_of_media(mask.sum(1).tolist(), sizes)
            if rows is None:
                raise ValueError(
                    f"the prompt has {int(mask.sum())} {kind} placeholders (by row: {mask.sum(1).tolist()}), but its "
                    f"{len(group)} {kind}s give {sum(sizes)} tokens (each: {sizes}) with keep_ratio="
                    f"{pruning.keep_ratio}, method={pruning.method!r}, pooling={pruning.pooling!r}. Prepare the inputs "
                    "with the processor of this repository, loaded with the same pruning parameters, and pass all that "
                    "it returns; a ratio for one call goes to the processor as keep_ratio=."
                )
            for medium, row in zip(group, rows):
                medium.row = row
        return media

    def _new_media(self, input_ids, new_ids, pixels, image_sizes, keep_ratio) -> dict:
        """The pixels whose placeholders are among `new_ids`, the uncached end of `input_ids`."""
        pruning = self._pruning_of_call(keep_ratio)
        media = self._list_media(pixels, image_sizes, pruning)
        token_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        chosen = {}
        for kind, token_id in token_ids.items():
            sizes = [num_placeholders(m.grids, pruning, newlines=kind == "image") for m in media if m.kind == kind]
            new = (new_ids == token_id).sum(1).tolist()
            if sum(new) == sum(sizes):  # only new media were passed, or there are none
                chosen[kind] = list(range(len(sizes)))
                continue
            total = (input_ids == token_id).sum(1).tolist()
            rows = _rows_of_media(total, sizes)
            if rows is None:
                raise ValueError(
                    f"{sum(new)} of {sum(total)} {kind} placeholders are not in the cache yet, but the {len(sizes)} {kind}s "
                    f"that were passed give {sum(sizes)} tokens; pass the media of the new turn, or of all turns."
                )
            seen, chosen[kind] = defaultdict(int), []
            for index, (row, size) in enumerate(zip(rows, sizes)):
                if seen[row] >= total[row] - new[row]:
                    chosen[kind].append(index)
                seen[row] += size
        take = lambda tensor, kind: tensor[chosen[kind]] if tensor is not None and chosen[kind] else None  # noqa: E731
        return {
            "pixel_values": take(pixels["image"], "image"),
            "pixel_values_videos": take(pixels["video"], "video"),
            "image_sizes": take(image_sizes, "image"),
        }

    # -- from pixels to kept tokens ----------------------------------------------------------------------------------

    def _tap(self, pixels, vision_feature_layer=None, vision_feature_select_strategy=None) -> torch.Tensor:
        """Features (N, P, C) of the tapped vision layer of N images (N, 3, height, width), without CLS."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        states = self.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = states[layer] if isinstance(layer, int) else torch.cat([states[index] for index in layer], dim=-1)
        features = features[:, 1:] if strategy == "default" else features
        expected = self._patches_per_side() ** 2
        if features.shape[1] != expected:
            raise ValueError(
                f"the vision tower gives {features.shape[1]} tokens an image, but {expected} are patches; pruning needs "
                f"patches alone, and vision_feature_select_strategy={strategy!r} does not leave them."
            )
        return features

    def _encode(self, media, pixels, image_sizes, pruning, **tower) -> None:
        """Fills in the features of every medium."""
        images = [medium for medium in media if medium.kind == "image"]
        videos = [medium for medium in media if medium.kind == "video"]
        if images:
            self._encode_images(images, pixels["image"], image_sizes, **tower)
        if videos:
            features = self._tap(pixels["video"].flatten(0, 1), **tower)
            if pruning.pooling == "before":
                features = self.model.vision_resampler(features)
            for medium, frames in zip(videos, features.chunk(len(videos))):
                medium.features = [frames]

    def _encode_images(self, images, pixel_values, image_sizes, **tower) -> None:
        side, tile_size = self._patches_per_side(), self.config.vision_config.image_size
        crops = [
            crop_of_tiles(size, self.config.image_grid_pinpoints, tile_size, side) for size in image_sizes.tolist()
        ]
        views = [1 + crop.rows * crop.columns for crop in crops]
        if pixel_values.dim() == 5:  # (images, views, 3, height, width), padded to the largest number of views
            pixel_values = torch.cat([views_[:count] for views_, count in zip(pixel_values, views)])
        for medium, crop, features in zip(images, crops, self._tap(pixel_values, **tower).split(views)):
            tiles = features[1:].unflatten(0, (crop.rows, crop.columns)).unflatten(2, (side, side))
            tiles = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # rows and columns of the whole image
            tiles = tiles[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
            medium.features = [features[:1], tiles.flatten(0, 1)[None]]

    @torch.no_grad()
    def _select(self, media, pruning, embeds, is_question, input_ids) -> None:
        """Fills in which tokens of every medium stay. Sets of one size are selected together, in one call."""
        method = METHODS[pruning.method]
        by_size = defaultdict(list)
        for medium in media:
            medium.kept = [None] * len(medium.grids)
            for index, features in enumerate(medium.features):
                by_size[features.shape[1]].append((medium, index))
        queries = None
        if pruning.prunes and "query" in method.needs and pruning.query_weighting != "none":
            queries = self._queries(embeds, is_question, pruning, media[0].features[0])
        seeds = _seeds(input_ids, is_question, media, pruning) if "seeds" in method.needs else None
        for num_tokens, sets in by_size.items():
            features = torch.cat([medium.features[index].detach() for medium, index in sets])
            frames = [medium.grids[index].frames for medium, index in sets]
            num_kept = pruning.count(num_tokens)
            if num_kept == num_tokens:
                kept = torch.arange(num_tokens, device=features.device).expand(len(features), -1)
            else:
                rows = [medium.row for (medium, _), count in zip(sets, frames) for _ in range(count)]
                tokens = VisualTokens(
                    features=features,
                    query=None if queries is None else queries[rows],
                    seeds=None if seeds is None else [seed for medium, index in sets for seed in seeds[id(medium)][index]],
                )
                kept = method.select(tokens, num_kept, pruning)
            for (medium, index), indices in zip(sets, kept.split(frames)):
                medium.kept[index] = indices

    def _queries(self, embeds, is_question, pruning, features) -> torch.Tensor:
        """One query vector for each row of the batch, (B, C) fp32, in the space of the vision features."""
        rows = [row[mask][-pruning.query_max_tokens :] for row, mask in zip(embeds.detach(), is_question)]
        queries = torch.stack([build_query(row, pruning.query_weighting) for row in rows])
        return align_query(queries, features.shape[-1]).to(features.device)

    def _project(self, media, pruning) -> Optional[torch.Tensor]:
        """The kept tokens of media of one kind, projected, in the order of their placeholders: (tokens, H)."""
        if not media:
            return None
        sets = [
            gather_tokens(features, kept).flatten(0, 1)
            for medium in media
            for features, kept in zip(medium.features, medium.kept)
        ]
        tokens = self.model.multi_modal_projector(torch.cat(sets))
        if pruning.prunes or media[0].kind == "video":
            return tokens
        parts = []
        for medium, (base, tiles) in zip(media, _pairs(tokens.split([len(tokens_) for tokens_ in sets]))):
            rows = tiles.unflatten(0, (medium.grids[1].height, medium.grids[1].width))
            newline = self.model.image_newline.to(rows).expand(len(rows), 1, -1)
            parts += [base, torch.cat([rows, newline], dim=1).flatten(0, 1)]
        return torch.cat(parts)

    # -- positions ---------------------------------------------------------------------------------------------------

    def _continue_positions(self, position_ids, prompt, past_key_values):
        """Positions of tokens that no medium was pruned from, after a cache whose text may have been moved."""
        shift = getattr(past_key_values, "position_shift", None)
        if shift is None:
            return position_ids
        tokens = prompt["inputs_embeds"] if prompt["input_ids"] is None else prompt["input_ids"]
        return _default_positions(position_ids, tokens, past_key_values) + shift[:, None].to(tokens.device)

    def _spread_positions(self, position_ids, media, masks, past_key_values) -> tuple:
        """Positions (B, T) in the unpruned prompt, and how far (B,) the text after its end is moved."""
        gaps = 0
        for kind, mask in masks.items():
            group = [medium for medium in media if medium.kind == kind]
            lengths = [num_unpruned(medium.grids, newlines=kind == "image") for medium in group]
            gaps = gaps + position_gaps(mask, [medium.offsets() for medium in group], lengths)
        earlier = getattr(past_key_values, "position_shift", None)
        if earlier is not None:
            gaps[:, 0] += earlier.to(gaps.device)
        positions = _default_positions(position_ids, mask, past_key_values) + gaps.cumsum(1)[:, :-1]
        return positions, gaps.sum(1)


def _check_pixels(pixels: dict) -> None:
    for kind, values in pixels.items():
        if values is not None and not torch.isfinite(values).all():
            bad = [index for index, item in enumerate(values) if not torch.isfinite(item).all()]
            raise ValueError(f"the pixels of {kind} {bad} hold NaN or infinity; check the file and its preprocessing.")


def _rows_of_media(placeholders: list, sizes: list) -> Optional[list]:
    """The row that each medium is in, media filling the placeholders of each row in order; `None` if they do not fit."""
    rows, row, left = [], 0, placeholders[0]
    for size in sizes:
        while left == 0 and row + 1 < len(placeholders):
            row += 1
            left = placeholders[row]
        if size > left:
            return None
        rows.append(row)
        left -= size
    return None if left or any(placeholders[row + 1 :]) else rows


def _question_mask(embeds, masks, attention_mask=None, labels=None, query_mask=None) -> torch.Tensor:
    """(B, T) bool: the text after the last placeholder of each row that is neither padding nor an answer."""
    num_tokens = embeds.shape[1]
    is_medium = masks["image"] | masks["video"]
    is_question = is_medium.flip(1).cumsum(1).flip(1) == 0
    if attention_mask is not None:
        is_question &= _visible(attention_mask, num_tokens).to(is_question.device)
    if query_mask is not None:
        is_question &= query_mask[:, -num_tokens:].bool().to(is_question.device)
    elif labels is not None:
        is_question &= (labels == -100).to(is_question.device)
    return is_question


def _visible(attention_mask, num_tokens: int) -> torch.Tensor:
    """Which of the last `num_tokens` tokens are not padding, (B, num_tokens) bool, from a 2-D or an expanded 4-D mask."""
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask.dim() == 2:
        return attention_mask[:, -num_tokens:].bool()
    # The last token sees every token but padding. A static cache is longer than the prompt, which it starts with.
    last_row = attention_mask[:, 0, -1, :num_tokens]
    return last_row if last_row.dtype == torch.bool else last_row == 0


def _default_positions(position_ids, tokens, past_key_values) -> torch.LongTensor:
    """`position_ids`, or those that the stock model would use, (1 or B, T)."""
    if position_ids is not None:
        return position_ids
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]


def _seeds(input_ids, is_question, media, pruning) -> dict:
    """For each medium (by id) one seed for each set of each grid; they depend on the sample's question alone."""
    seeds, counters = {}, defaultdict(itertools.count)
    for medium in media:
        question = b"" if input_ids is None else input_ids[medium.row][is_question[medium.row]].cpu().numpy().tobytes()
        start = zlib.crc32(question, pruning.seed)
        counter = counters[medium.row]
        seeds[id(medium)] = [[start + next(counter) for _ in range(grid.frames)] for grid in medium.grids]
    return seeds


def _pairs(items):
    return zip(items[::2], items[1::2])


# So that saving copies this file and those that it imports, also where the class was not loaded through an Auto class.
ReDiPruneLlavaNextVideoForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
