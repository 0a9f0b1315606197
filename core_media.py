"""The media of a call: how many tokens they make, where their placeholders are, and the stages from pixels to kept tokens."""

from typing import Optional

import torch

from .configuration_rediprune import PruningConfig
from .core_attention import check_attention
from .core_cache import cached_tokens
from .core_items import check_pixels, place_items
from .core_layout import FrameSize
from .core_pruner import Pruner
from .core_question import Question


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

    def refuse_empty_placeholders(self, prompt, cache, query_mask, kwargs) -> None:
        """Refuses placeholders of a prompt without media. Those that the model itself has generated are tokens like others."""
        tokens = prompt["inputs_embeds"] if prompt["input_ids"] is None else prompt["input_ids"]
        from_generate = query_mask is not None  # which has compared placeholders and media already
        if tokens.shape[1] == 1 or from_generate or kwargs.get("mm_encoder_outputs") or cached_tokens(cache):
            return
        place_items([], self.placeholder_masks(**prompt), self.config.pruning)

    def check_media(self, pixels, image_sizes) -> None:
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

    # -- the three stages --------------------------------------------------------------------------------------------------

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


def _one_ratio(keep_ratio) -> Optional[float]:
    """The keep ratio of a call; pipelines with a batch size give a list, with that of each prompt."""
    if isinstance(keep_ratio, (list, tuple)):
        if len(set(keep_ratio)) != 1:
            raise ValueError(f"keep_ratio is {keep_ratio!r}, but must be the same for all prompts of a batch")
        keep_ratio = keep_ratio[0]
    return None if keep_ratio is None else float(keep_ratio)
