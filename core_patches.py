"""Processors of models whose media are flat patches beside a grid (Qwen2.5-VL, Qwen3-VL)."""

import re

import numpy as np
from transformers.processing_utils import MultiModalData
from transformers.video_utils import VideoMetadata

from .core_layout import PatchSize
from .core_processor import PrunedProcessorMixin
from .hub_versions import stock_processor_kwargs
from .inputs_video import frame_indices
from .methods_registry import METHODS

SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")


class PatchProcessorMixin(PrunedProcessorMixin):
    """
    For processor classes, before the stock class: as in `PrunedProcessorMixin`, with media of any size.

    Frames of videos are sampled by the rule of the checkpoint's video processor, and videos of one call may differ in length.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        pruning=None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)
        self.set_pruning(pruning)

    @property
    def processing_kwargs(self):
        return stock_processor_kwargs(
            next(cls for cls in type(self).__mro__ if cls.__module__.startswith("transformers."))
        )

    def layout_of(self, kind: str, grid):
        """The layout of one image or video with a grid (frames, height, width) of patches."""
        frame = PatchSize(getattr(self, f"{kind}_processor").merge_size)
        return getattr(self.layout_class, kind)(frame, grid)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        layout = self.layout_of("image", image_inputs["image_grid_thw"][image_idx])
        return self.image_token * layout.num_placeholders(self.pruning)

    def replace_video_token(self, video_inputs, video_idx, **kwargs):
        layout = self.layout_of("video", video_inputs["video_grid_thw"][video_idx])
        number = layout.num_placeholders(self.pruning)
        if not layout.frames_apart:
            return self.video_token * number
        metadata, frames = video_inputs["video_metadata"][video_idx], layout.grids[0].frames
        step = self.video_processor.temporal_patch_size
        indices = [int(index) for index in metadata.frames_indices]
        times = self._calculate_timestamps(
            indices, metadata.fps or 24, step
        )  # 24 where nobody says, as in the stock class
        run = f"{self.vision_start_token}{self.video_token * (number // frames)}{self.vision_end_token}"
        return "".join(f"<{time:.1f} seconds>{run}" for time in times[:frames])

    def frame_indices(self, total, num_frames, fps, source_fps):
        # Refuses what is no number with a message of its own, where the stock rule fails inside.
        frame_indices(total, num_frames, fps, source_fps or 24)
        step = self.video_processor.temporal_patch_size
        if total < step:  # the towers see frames in pairs
            return np.resize(np.arange(total), step)
        num_frames = None if num_frames is None else max(step, min(num_frames, total))
        metadata = VideoMetadata(total_num_frames=total, fps=source_fps or 24)
        return np.asarray(self.video_processor.sample_frames(metadata=metadata, num_frames=num_frames, fps=fps))

    def _process_encoded(self, text, encoded_media, kwargs):
        if any(layout.frames_apart for layout in encoded_media.layouts if layout.kind == "video"):
            raise ValueError(
                "in these prompts timestamps stand between the frames of a video, which encoded_media do not hold: pass the videos, and "
                "to the model input_ids and attention_mask alone, with encoded_media."
            )
        return super()._process_encoded(text, encoded_media, kwargs)

    def check_lengths(self, videos) -> None:
        """Videos of any lengths go together."""

    def _questions(self, prompts):
        return [SPECIAL_TOKEN.sub(" ", question).strip() for question in super()._questions(prompts)]

    def _get_num_multimodal_tokens(
        self, image_sizes=None, video_sizes=None, keep_ratio=None, keep_tokens=None, **kwargs
    ):
        """
        As in `PrunedProcessorMixin`, for media of any sizes, with the arguments of the image and video processors.

        Raises:
            NotImplementedError: the number of patches, which is all that the stock processors tell of a size, does not decide
                how many tokens stay.
        """
        pruning, numbers = self.pruning.with_budget(keep_ratio, keep_tokens), {}
        if pruning.prunes and METHODS[pruning.method].counts_by_shape:
            raise NotImplementedError(
                f"method={pruning.method!r} keeps a number of tokens that depends on the height and width of their grid, but of "
                "media of any size only the number of patches is known before they are read; choose another method"
            )

        def count(kind, frames, patches):
            merge_size = getattr(self, f"{kind}_processor").merge_size
            return self.layout_of(kind, (frames, merge_size, patches // frames // merge_size)).num_placeholders(pruning)

        if image_sizes is not None:
            patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
            numbers["num_image_tokens"] = [count("image", 1, number) for number in patches]
            numbers["num_image_patches"] = patches
        if video_sizes is not None:
            step = self.video_processor.temporal_patch_size
            of_video = getattr(self.video_processor, "get_num_of_video_patches", None)
            if of_video is None:  # Qwen3-VL's of 4.57
                raise NotImplementedError(
                    "this version of transformers cannot count the patches of a video by its size alone"
                )
            numbers["num_video_tokens"] = [
                count("video", frames // step, of_video(frames, height, width, kwargs))
                for frames, height, width in ((-(-size[0] // step) * step, *size[1:]) for size in video_sizes)
            ]
        return MultiModalData(**numbers)
