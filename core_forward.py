"""The pruned forward pass, for every backbone: media are encoded, pruned by the question, projected and put in their places."""

from dataclasses import dataclass
from inspect import signature
from typing import Optional

import torch
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_rediprune import PruningConfig
from .core_attention import biased_mask, check_attention
from .core_cache import TokenRecord, all_sizes, cached_tokens, one_cache, read_record, write_record
from .core_items import check_pixels, place_items, tokens_by_place
from .core_layout import FrameSize
from .core_positions import check_context, unpruned_columns, warn_beyond_context
from .core_pruner import Pruner
from .core_question import Question, check_masks, question_mask
from .hub_versions import CACHE_NAME


@dataclass
class KeptIndices:
    """
    For model outputs: what was kept.

    Attributes:
        image_kept_indices: for each image one LongTensor (k,).
        video_kept_indices: for each video one LongTensor (k,).

    Indices count in raster order through all frames of a video, or through an image's views (`Layout`); those of a merged token
    are of the token whose place it takes. Of tokens merged inside the vision encoder they may repeat where pooling makes the
    grid coarser. `None` where the stock forward pass ran, which keeps all. `model.layouts_of(...)` and `Layout.split` tell
    frames apart.
    """

    image_kept_indices: Optional[tuple] = None
    video_kept_indices: Optional[tuple] = None


class PrunedForwardMixin:
    """
    For model classes, before the stock class: its forward pass with the tokens that `config.pruning` ([`PruningConfig`]) leaves.

    A keep ratio of 1 is the stock class, bit for bit. What a backbone says is in these attributes and in `tower_of`.

    Attributes:
        layout_class: the arithmetic that it shares with its processor, such as `LlavaLayouts`.
        encoder_class: from pixels to sets of tokens, such as `LlavaEncoder`.
        output_class: its stock output with `KeptIndices`.
    """

    layout_class = encoder_class = output_class = None

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
            pixel_values_images: `pixel_values`, as transformers 4.57 calls them in Video-LLaVA.
            position_ids: positions in the pruned prompt; `positions="original"` adds the gaps to them.

        Returns:
            `output_class`, with [`KeptIndices`], or a tuple for `return_dict=False`.

        Raises:
            OSError: the text tower cannot be reached.
            ValueError: the prompt has more or fewer placeholders than tokens that stay; pixels or features are not finite;
                the model takes no such media; `clip_input_ids` are missing where the question is compared in CLIP's joint
                space, or `word_input_ids` where its content words are looked up.
        """
        # The signature names `logits_to_keep`, so that `generate` asks for the last token's logits alone, and leaves out
        # `mm_encoder_outputs`: with it, `generate` of 5.x would project all tokens before they can be pruned here.
        pruning, cache = self.pruning_of_call(keep_ratio), one_cache(past_key_values, cache)
        prompt = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        stock = {CACHE_NAME: cache, "labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens.shape[1] > 1:  # single steps of decoding may go on
            check_context(self.config.text_config, cached_tokens(cache) + tokens.shape[1])
        pixels = {"image": pixel_values_images if pixel_values is None else pixel_values, "video": pixel_values_videos}
        if pixels["image"] is None and pixels["video"] is None:
            self._refuse_empty_placeholders(prompt, cache, query_mask, kwargs)
            return self.output_class(**self._stock_forward(prompt, attention_mask, position_ids, stock))

        self._check_media(pixels, image_sizes)
        masks = self.placeholder_masks(**prompt)
        check_masks(masks["image"].shape, cached_tokens(cache), attention_mask, query_mask)
        items = place_items(self.layouts_of(pixels, image_sizes, pruning), masks, pruning)
        tower = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        if not pruning.prunes and pruning.video_pooling:
            prompt |= self._stock_pixels(pixels, image_sizes) | tower
            return self.output_class(**self._stock_forward(prompt, attention_mask, position_ids, stock))

        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        is_question = question_mask(masks["image"] | masks["video"], attention_mask, labels, query_mask)
        question = self._question(
            pruning, embeds, is_question, input_ids, clip_input_ids, clip_attention_mask, word_input_ids
        )
        self.encode_items(items, pixels, image_sizes, pruning, **tower)
        self.prune_items(items, pruning, question)
        for kind, mask in masks.items():
            projected = self.project_items([item for item in items if item.kind == kind], pruning)
            if projected is not None:
                where = mask[..., None].expand_as(embeds).to(embeds.device)
                embeds = embeds.masked_scatter(where, projected.to(embeds))

        columns = record = None
        if pruning.prunes and pruning.resolved("positions") == "original":
            columns, skipped = unpruned_columns(masks, items)
            record = TokenRecord(None, skipped.float())
        if pruning.prunes and pruning.resolved("proportional_attention"):
            sizes = tokens_by_place(items, masks, "token_sizes", 1.0)
            record = TokenRecord(sizes, torch.zeros_like(sizes) if record is None else record.skipped)
        outputs = self._stock_forward({"inputs_embeds": embeds}, attention_mask, position_ids, stock, record, columns)
        kept = {kind: tuple(item.kept for item in items if item.kind == kind) or None for kind in masks}
        return self.output_class(**outputs, image_kept_indices=kept["image"], video_kept_indices=kept["video"])

    def _stock_forward(self, prompt, attention_mask, position_ids, stock, record=None, columns=None):
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
        clip_input_ids: Optional[torch.LongTensor] = None,
        clip_attention_mask: Optional[torch.LongTensor] = None,
        word_input_ids: Optional[torch.LongTensor] = None,
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
        pruning = self.pruning_of_call(keep_ratio)
        pixels = {"image": pixel_values_images if pixel_values is None else pixel_values, "video": pixel_values_videos}
        self._check_media(pixels, image_sizes)
        masks = self.placeholder_masks(input_ids)
        check_masks(masks["image"].shape, 0, attention_mask)
        items = place_items(self.layouts_of(pixels, image_sizes, pruning), masks, pruning)
        embeds = self.get_input_embeddings()(input_ids)
        is_question = question_mask(masks["image"] | masks["video"], attention_mask)
        question = self._question(
            pruning, embeds, is_question, input_ids, clip_input_ids, clip_attention_mask, word_input_ids
        )
        self.encode_items(items, pixels, image_sizes, pruning)
        self.prune_items(items, pruning, question, return_signals)
        return items

    # -- the three stages of media, for tools that time or replace one ----------------------------------------------------

    def encode_items(self, items: list, pixels: dict, image_sizes, pruning, **tower) -> None:
        """Fills in the sets of every `MediaItem`; see `LlavaEncoder.encode`."""
        self.encoder_class(self, pruning, **tower).encode(items, pixels, image_sizes)

    def prune_items(self, items: list, pruning, question: Question, return_signals: bool = False) -> None:
        """Fills in which tokens of every `MediaItem` stay, for a question; see `Pruner`."""
        model = self.model
        place_tokens = lambda features: self.joint_space().place_tokens(features)  # noqa: E731
        pruner = Pruner(pruning, model.multi_modal_projector, place_tokens, model.language_model, self.largest_of_heads)
        pruner(items, question, return_signals)

    def project_items(self, items: list, pruning) -> Optional[torch.Tensor]:
        """The kept tokens of items of one kind, projected, in the order of their placeholders: (tokens, H)."""
        if not items:
            return None
        tokens = self.model.multi_modal_projector(torch.cat([item.tokens for item in items]))
        if pruning.prunes or not items[0].layout.row_newlines:
            return tokens
        parts = []
        for item, part in zip(items, tokens.split([len(item.tokens) for item in items])):
            grid = item.layout.grids[-1]
            before, rows = part[: len(part) - grid.num_tokens], part[len(part) - grid.num_tokens :]
            rows = rows.unflatten(0, (grid.height, grid.width))
            newline = self.model.image_newline.to(rows).expand(len(rows), 1, -1)
            parts += [before, torch.cat([rows, newline], dim=1).flatten(0, 1)]
        return torch.cat(parts)

    def largest_of_heads(self, values: torch.Tensor) -> torch.Tensor:
        """Of values that are the largest of the heads of this process, the largest of all: tensor parallelism shares out the
        heads, and every process has to keep the same tokens."""
        mesh = getattr(self, "_device_mesh", None)  # set by transformers; 4.57 does not name its one dimension
        names = None if mesh is None else mesh.mesh_dim_names or ("tp",)
        if names and "tp" in names:
            group = mesh.get_group(names.index("tp"))
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=group)
        return values

    # -- what a call and its media are ---------------------------------------------------------------------------------

    @property
    def frame_size(self) -> FrameSize:
        """What this checkpoint makes of a picture."""
        config, vision = self.config, self.config.vision_config
        return FrameSize(
            vision.image_size,
            vision.image_size // vision.patch_size,
            getattr(config, "image_grid_pinpoints", None),
            getattr(config, "spatial_pool_stride", None),
        )

    def layouts_of(self, pixels: dict, image_sizes, pruning) -> list:
        """The `Layout` of every image, then of every video, from their pixels and sizes."""
        frame, layouts = self.frame_size, []
        if pixels["image"] is not None:
            sizes = [None] * len(pixels["image"]) if image_sizes is None else image_sizes.tolist()
            layouts += [self.layout_class.image(frame, size) for size in sizes]
        if pixels["video"] is not None:
            num_videos, num_frames = pixels["video"].shape[:2]
            layouts += [self.layout_class.video(frame, num_frames, pruning)] * num_videos
        return layouts

    def placeholder_masks(self, input_ids=None, inputs_embeds=None) -> dict:
        """For each kind of medium, (B, T) bool: where its placeholders are."""
        token_ids = {"image": self.config.image_token_id, "video": getattr(self.config, "video_token_id", None)}
        tokens = inputs_embeds if input_ids is None else input_ids
        nowhere = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        table = self.get_input_embeddings()

        def mask(token_id):
            if token_id is None:
                return nowhere
            if input_ids is not None:
                return input_ids == token_id
            embedding = table(torch.tensor(token_id, device=inputs_embeds.device))
            return (inputs_embeds == embedding.to(inputs_embeds)).all(-1)

        return {kind: mask(token_id) for kind, token_id in token_ids.items()}

    def pruning_of_call(self, keep_ratio) -> PruningConfig:
        """The pruning block with the keep ratio of a call. Raises ValueError where the model cannot do what it asks for."""
        pruning = self.config.pruning.with_keep_ratio(_one_ratio(keep_ratio))
        if not pruning.prunes:
            return pruning
        self.config.check_method(pruning)
        check_attention(self.config.text_config, pruning)
        return pruning

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

    def _stock_pixels(self, pixels: dict, image_sizes) -> dict:
        """Pixels by the names that the stock forward pass has for them in this version of transformers."""
        names = signature(super().forward).parameters
        image = "pixel_values_images" if "pixel_values_images" in names else "pixel_values"
        given = {image: pixels["image"], "pixel_values_videos": pixels["video"], "image_sizes": image_sizes}
        return {name: values for name, values in given.items() if values is not None}

    def _refuse_empty_placeholders(self, prompt, cache, query_mask, kwargs) -> None:
        """Refuses placeholders of a prompt without media. Those that the model itself has generated are tokens like others."""
        tokens = prompt["inputs_embeds"] if prompt["input_ids"] is None else prompt["input_ids"]
        from_generate = query_mask is not None  # which has compared placeholders and media already
        if tokens.shape[1] == 1 or from_generate or kwargs.get("mm_encoder_outputs") or cached_tokens(cache):
            return
        place_items([], self.placeholder_masks(**prompt), self.config.pruning)

    def _check_media(self, pixels, image_sizes) -> None:
        check_pixels(pixels)
        for kind, values in pixels.items():
            if values is not None and kind not in self.layout_class.kinds:
                raise ValueError(f"{type(self).__name__} takes no {kind}s, but pixels of {len(values)} were passed.")
        images = pixels["image"]
        if images is None or self.frame_size.pinpoints is None:
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


def _one_ratio(keep_ratio) -> Optional[float]:
    """The keep ratio of a call; pipelines with a batch size give a list, with that of each prompt."""
    if isinstance(keep_ratio, (list, tuple)):
        if len(set(keep_ratio)) != 1:
            raise ValueError(f"keep_ratio is {keep_ratio!r}, but must be the same for all prompts of a batch")
        keep_ratio = keep_ratio[0]
    return None if keep_ratio is None else float(keep_ratio)
