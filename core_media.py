"""The media of a call: how many tokens they make, where their placeholders are, and the stages from pixels to kept tokens."""

from typing import Optional

import torch

from .configuration_rediprune import PruningConfig
from .core_attention import check_attention
from .core_cache import cached_tokens
from .core_encoded import EncodedMedia, encoder_identity, freeze, signals_of
from .core_inner import check_inner
from .core_items import MediaItem, MediaSizes, check_pixels, place_items
from .core_layout import FrameSize, sizes_of_tiled
from .core_pruner import Pruner
from .core_question import Question
from .methods_registry import METHODS


class MediaStagesMixin:
    """
    For model classes, before the stock class. `encode_items`, `prune_items` and `project_items` are the three stages of media,
    which tools may time or replace one by one.

    Attributes:
        layout_class: the arithmetic that it shares with its processor, such as `LlavaLayouts`.
        encoder_class: from pixels to sets of tokens, such as `LlavaEncoder`.
    """

    layout_class = encoder_class = None

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

    def layouts_of(self, pixels: dict, sizes: MediaSizes, pruning, encoded=None) -> list:
        """The `Layout` of every image, then of every video, from their pixels and sizes, or those of [`EncodedMedia`]."""
        if encoded is not None:
            return encoded.layouts
        frame, layouts = self.frame_size, []
        if pixels["image"] is not None:
            of_images = [None] * len(pixels["image"]) if sizes.image_sizes is None else sizes.image_sizes.tolist()
            layouts += [self.layout_class.image(frame, size) for size in of_images]
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

    def pruning_of_call(self, keep_ratio, keep_tokens=None) -> PruningConfig:
        """The pruning block with the budget of a call. Raises ValueError where the model cannot do what it asks for."""
        pruning = self.config.pruning.with_budget(
            _one_value("keep_ratio", keep_ratio), _one_value("keep_tokens", keep_tokens)
        )
        if not pruning.drops_tokens:
            return pruning
        self.config.check_method(pruning)
        check_attention(self.config, pruning)
        if pruning.inner is not None:
            check_inner(self.config, pruning)
        return pruning

    def refuse_projected(self, mm_encoder_outputs, pruning) -> None:
        """Refuses what 5.x lets a call pass instead of pixels, where something is pruned."""
        if mm_encoder_outputs and pruning.drops_tokens:
            raise ValueError(
                "mm_encoder_outputs hold all tokens of their media, projected already, so that they cannot be pruned: pass pixels, "
                "or as encoded_media= what model.encode_media(...) returns, or keep_ratio=1."
            )

    def refuse_empty_placeholders(self, prompt, cache, query_mask, kwargs) -> None:
        """Refuses placeholders of a prompt without media. Those that the model itself has generated are tokens like others."""
        tokens = prompt["inputs_embeds"] if prompt["input_ids"] is None else prompt["input_ids"]
        from_generate = query_mask is not None  # which has compared placeholders and media already
        if tokens.shape[1] == 1 or from_generate or kwargs.get("mm_encoder_outputs") or cached_tokens(cache):
            return
        place_items([], self.placeholder_masks(**prompt), self.config.pruning)

    def check_media(self, pixels: dict, sizes: MediaSizes) -> None:
        check_pixels(pixels)
        for kind, values in pixels.items():
            if values is not None and kind not in self.layout_class.kinds:
                raise ValueError(f"{type(self).__name__} takes no {kind}s, but pixels of {len(values)} were passed.")
        images = pixels["image"]
        if images is None or self.frame_size.pinpoints is None:
            return
        if sizes.image_sizes is None:
            raise ValueError(
                f"pixel_values of {len(images)} images were passed without image_sizes, which say how their tiles lie; pass all "
                "that the processor returned."
            )
        if images.dim() == 5 and len(images) != len(sizes.image_sizes):
            raise ValueError(
                f"pixel_values hold {len(images)} images, but image_sizes {len(sizes.image_sizes)}; pass all that the processor returned."
            )

    @torch.compiler.disable  # it asks for values of tensors, and has nothing that a compiler could make faster
    def placed_items(self, pixels: dict, sizes: MediaSizes, pruning, masks: dict, encoded=None, **tower) -> list:
        """The checked `MediaItem`s of a prompt, from pixels or [`EncodedMedia`], with the rows that they are in."""
        if encoded is not None:
            self.check_encoded(encoded, pixels, sizes, pruning, **tower)
        self.check_media(pixels, sizes)
        return place_items(self.layouts_of(pixels, sizes, pruning, encoded), masks, pruning)

    def encoder_modules(self) -> list:
        """The modules whose weights decide what the encoder makes of media."""
        towers = [self.tower_of(kind)[0] for kind in self.layout_class.kinds]
        return list({id(tower): tower for tower in towers}.values())

    # -- encode once, ask many -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_media(
        self,
        pixel_values: Optional[torch.FloatTensor] = None,
        pixel_values_videos: Optional[torch.FloatTensor] = None,
        image_sizes: Optional[torch.LongTensor] = None,
        pixel_values_images: Optional[torch.FloatTensor] = None,
        batch_num_images: Optional[torch.LongTensor] = None,
        image_grid_thw: Optional[torch.LongTensor] = None,
        video_grid_thw: Optional[torch.LongTensor] = None,
        second_per_grid_ts: Optional[torch.Tensor] = None,
        methods: Optional[list] = None,
        device=None,
        keep_ratio: Optional[float] = None,
        keep_tokens: Optional[int] = None,
        vision_feature_layer=None,
        vision_feature_select_strategy: Optional[str] = None,
        **text_inputs,
    ) -> EncodedMedia:
        """
        Runs the vision encoder, for `generate(..., encoded_media=...)` with any number of questions, keep ratios and methods.

        Args:
            pixel_values, pixel_values_videos, pixel_values_images: as in `forward`, like the sizes or grids. All that the
                processor returned may be passed; the text among it is left alone.
            methods (`list[str]`, *optional*): which methods are going to be asked; the config's alone where not given. Some need
                more of the encoder than its features.
            device (*optional*): where the result is kept, such as `"cpu"`; where it was made if not given.
            keep_ratio, keep_tokens: the budget of the call, which methods that merge inside the encoder depend on.
            vision_feature_layer, vision_feature_select_strategy: instead of the config's.

        Returns:
            [`EncodedMedia`]: features before selection and projection, without gradients.

        Raises:
            ValueError: there are no pixels, or bad ones; a method is unknown, or merges inside the encoder and is not alone.
        """
        pruning = self.pruning_of_call(keep_ratio, keep_tokens)
        blocks = [pruning.with_changes(method=name) for name in (methods or [pruning.method])]
        merging = [block.method for block in blocks if METHODS[block.method].merges_in_encoder]
        if merging and {block.method for block in blocks} != {pruning.method}:
            raise ValueError(
                f"method={merging[0]!r} merges tokens inside the vision encoder, which no other method can use: set "
                f"config.pruning.method to it (now {pruning.method!r}), and leave methods out."
            )
        for block in blocks:
            self.config.check_method(block)
        pixels = {"image": pixel_values_images if pixel_values is None else pixel_values, "video": pixel_values_videos}
        if pixels["image"] is None and pixels["video"] is None:
            raise ValueError("encode_media was given no pixels; pass what the processor returned for images or videos.")
        image_sizes = sizes_of_tiled(image_sizes, batch_num_images)
        sizes = MediaSizes(image_sizes, image_grid_thw, video_grid_thw, second_per_grid_ts)
        self.check_media(pixels, sizes)
        items = [MediaItem(layout) for layout in self.layouts_of(pixels, sizes, pruning)]
        tower = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        signals = frozenset().union(*map(signals_of, blocks))
        self.encode_items(items, pixels, pruning, signals, **tower)
        return freeze(items, encoder_identity(self, pruning, signals, **tower), device)

    def check_encoded(self, encoded: EncodedMedia, pixels: dict, sizes: MediaSizes, pruning, **tower) -> None:
        """Raises ValueError where encoded media are not what this model would make of the media of a call now."""
        given = [f"pixels of {kind}s" for kind, values in pixels.items() if values is not None]
        given += [name for name, values in sizes._asdict().items() if values is not None]
        if given:
            raise ValueError(
                f"encoded_media and {' and '.join(given)} were passed, which may be of other media; pass encoded_media with what "
                "processor(text=..., encoded_media=...) returns."
            )
        if not isinstance(encoded, EncodedMedia):
            raise ValueError(
                f"encoded_media is a {type(encoded).__name__}; pass what model.encode_media(...) returned."
            )
        signals = signals_of(pruning) if pruning.prunes else frozenset()
        encoded.check(encoder_identity(self, pruning, signals, **tower), signals)

    def fill_items(self, items: list, pixels: dict, pruning, encoded, device, **tower) -> None:
        """Fills in the sets of every `MediaItem` from [`EncodedMedia`], or by `encode_items` where there are none."""
        if encoded is None:
            self.encode_items(items, pixels, pruning, **tower)
        else:
            encoded.fill(items, device)

    # -- the three stages --------------------------------------------------------------------------------------------------

    def encode_items(self, items: list, pixels: dict, pruning, signals=None, **tower) -> None:
        """Fills in the sets of every `MediaItem`, with the signals that `pruning` requires or those that are named; see
        `LlavaEncoder.encode`."""
        if signals is None:
            signals = signals_of(pruning) if pruning.prunes else frozenset()
        self.encoder_class(self, pruning, signals, **tower).encode(items, pixels)

    @torch.compiler.disable  # a compiler would write out every step of a loop over the kept tokens
    def prune_items(self, items: list, pruning, question: Question, return_signals: bool = False) -> None:
        """Fills in which tokens of every `MediaItem` stay, for a question; see `Pruner`."""
        place_tokens = lambda features: self.joint_space().place_tokens(features)  # noqa: E731
        pruner = Pruner(
            pruning, self.project, place_tokens, self.model.language_model, self.largest_of_heads, self.sum_of_heads
        )
        pruner(items, question, return_signals)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features (..., C) in the space of the language model's input embeddings: (..., H)."""
        return self.model.multi_modal_projector(features)

    def project_items(self, items: list, pruning) -> Optional[torch.Tensor]:
        """The kept tokens of items of one kind, projected, in the order of their placeholders: (tokens, H)."""
        if not items:
            return None
        parts = {id(item): item.tokens for item in items}
        unprojected = [] if pruning.after_projector else [item for item in items if not item.layout.projected]
        if unprojected:
            tokens = self.project(torch.cat([item.tokens for item in unprojected]))
            numbers = [len(item.tokens) for item in unprojected]
            parts |= {id(item): part for item, part in zip(unprojected, tokens.split(numbers))}
        tokens = [parts[id(item)] for item in items]
        if not pruning.prunes:
            tokens = [self._with_newlines(item.layout, part) for item, part in zip(items, tokens)]
        return torch.cat(tokens)

    def _with_newlines(self, layout, tokens: torch.Tensor) -> torch.Tensor:
        """All tokens of an item (n, H) with the newlines that it has when nothing is pruned."""
        if layout.row_newlines:
            grid = layout.grids[-1]
            before, rows = tokens.split([len(tokens) - grid.num_tokens, grid.num_tokens])
            rows = rows.unflatten(0, (grid.height, grid.width))
            newline = self.model.image_newline.to(rows).expand(len(rows), 1, -1)
            tokens = torch.cat([before, torch.cat([rows, newline], dim=1).flatten(0, 1)])
        if layout.closing_newline:
            tokens = torch.cat([tokens, self.model.image_newline[None].to(tokens)])
        return tokens

    def companions_by_place(self, items: list, masks: dict) -> dict:
        """What `run_language_model` is handed beside the embeddings, from the companions of the kept tokens; here nothing."""
        return {}

    def largest_of_heads(self, values: torch.Tensor) -> torch.Tensor:
        """Of values that are the largest of the heads of this process, the largest of all: tensor parallelism shares out the
        heads, and every process has to keep the same tokens."""
        return self._over_heads(values, "MAX")

    def sum_of_heads(self, values: torch.Tensor) -> torch.Tensor:
        """The same for values that are sums over heads."""
        return self._over_heads(values, "SUM")

    def _over_heads(self, values, operation: str):
        mesh = getattr(self, "_device_mesh", None)  # set by transformers; 4.57 does not name its one dimension
        names = None if mesh is None else mesh.mesh_dim_names or ("tp",)
        if names and "tp" in names:
            group = mesh.get_group(names.index("tp"))
            torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, operation), group=group)
        return values


def _one_value(name: str, value):
    """The budget of a call; pipelines with a batch size give a list, with that of each prompt."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"{name} is {value!r}, but must be the same for all prompts of a batch")
        value = value[0]
    return value
