"""One processor class for each family: [`PrunedProcessorMixin`] before the stock class."""

import math
import re
from typing import TYPE_CHECKING

from transformers import (
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    VideoLlavaProcessor,
)

from .configuration_rediprune import (
    ReDiPruneConfig,
    ReDiPruneLlavaConfig,
    ReDiPruneLlavaNextConfig,
    ReDiPruneLlavaOnevisionConfig,
    ReDiPruneQwen2_5_VLConfig,
    ReDiPruneQwen3VLConfig,
    ReDiPruneVideoLlavaConfig,
)
from .core_layout import (
    FrameSize,
    LlavaLayouts,
    LlavaNextLayouts,
    LlavaNextVideoLayouts,
    LlavaOnevisionLayouts,
    Qwen3Layouts,
    QwenLayouts,
    VideoLlavaLayouts,
    check_pool_stride,
    max_tiles_of,
)
from .core_patches import PatchProcessorMixin
from .core_processor import PrunedProcessorMixin

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of those that `auto_map` names lists all that it rests on.
    from .hub_files import PARTS  # noqa: F401
    from .hub_untrusted import CODE_KEYS  # noqa: F401
    from .hub_versions import TESTED  # noqa: F401
    from .inputs_chat import BREAK  # noqa: F401
    from .inputs_download import TIMEOUT  # noqa: F401
    from .inputs_media import is_empty  # noqa: F401
    from .inputs_questions import QuestionInputsMixin  # noqa: F401
    from .inputs_reading import check_prompts  # noqa: F401
    from .inputs_text_tower import SEGMENT  # noqa: F401
    from .inputs_tokenizing import OneAtATime  # noqa: F401
    from .inputs_video import REFERRING_FORMATS  # noqa: F401
    from .inputs_words import STOP_WORDS  # noqa: F401
    from .methods_attention import CONTEXTUAL_SHARE  # noqa: F401
    from .methods_base import CLS_SIGNALS  # noqa: F401
    from .methods_baselines import Random  # noqa: F401
    from .methods_block import PruningConfig  # noqa: F401
    from .methods_coverage import VISION_TEMPERATURE  # noqa: F401
    from .methods_distance import ReDiPrune  # noqa: F401
    from .methods_encoder import EvoPrune  # noqa: F401
    from .methods_inner import FastV  # noqa: F401
    from .methods_registry import METHODS  # noqa: F401
    from .methods_relevance import SPENT  # noqa: F401
    from .methods_settings import DEFAULT_METHOD  # noqa: F401
    from .methods_still import STILL_WEIGHT  # noqa: F401
    from .methods_video import LEAST_SEGMENTS  # noqa: F401
    from .ops_inner import rotated  # noqa: F401
    from .ops_query import QUERY_WEIGHTINGS  # noqa: F401
    from .ops_relevance import RELEVANCES  # noqa: F401
    from .ops_selection import CANDIDATE_POOLS  # noqa: F401
    from .ops_tokens import MIN_NORM  # noqa: F401
    from .ops_video import share_out  # noqa: F401


class _ImagesAlone(PrunedProcessorMixin):
    """What processors without videos have before the stock class."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        pruning=None,
        **kwargs,
    ):
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=chat_template,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.set_pruning(pruning)


class ReDiPruneLlavaProcessor(_ImagesAlone, LlavaProcessor):
    """[`LlavaProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`])."""

    config_class, layout_class = ReDiPruneLlavaConfig, LlavaLayouts


class ReDiPruneLlavaNextProcessor(_ImagesAlone, LlavaNextProcessor):
    """[`LlavaNextProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`])."""

    config_class, layout_class = ReDiPruneLlavaNextConfig, LlavaNextLayouts


class ReDiPruneProcessor(PrunedProcessorMixin, LlavaNextVideoProcessor):
    """
    [`LlavaNextVideoProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`]).

    Args:
        spatial_pool_stride (`int`, defaults to 2): stride of the video pooling, as in the model's config.
    """

    config_class, layout_class = ReDiPruneConfig, LlavaNextVideoLayouts

    def __init__(
        self,
        video_processor=None,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        video_token="<video>",
        image_token="<image>",
        num_additional_image_tokens=0,
        pruning=None,
        spatial_pool_stride=2,
        **kwargs,
    ):
        super().__init__(
            video_processor=video_processor,
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=chat_template,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            video_token=video_token,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.set_pruning(pruning)
        check_pool_stride(spatial_pool_stride)
        self.spatial_pool_stride = spatial_pool_stride


class ReDiPruneVideoLlavaProcessor(PrunedProcessorMixin, VideoLlavaProcessor):
    """[`VideoLlavaProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`])."""

    config_class, layout_class = ReDiPruneVideoLlavaConfig, VideoLlavaLayouts

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        chat_template=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        video_token="<video>",
        image_token="<image>",
        num_additional_image_tokens=0,
        pruning=None,
        **kwargs,
    ):
        super().__init__(
            image_processor=image_processor,
            video_processor=video_processor,
            tokenizer=tokenizer,
            chat_template=chat_template,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            video_token=video_token,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.set_pruning(pruning)


class ReDiPruneLlavaOnevisionProcessor(PrunedProcessorMixin, LlavaOnevisionProcessor):
    """[`LlavaOnevisionProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`])."""

    config_class, layout_class = ReDiPruneLlavaOnevisionConfig, LlavaOnevisionLayouts

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_image_tokens=729,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        pruning=None,
        **kwargs,
    ):
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            video_processor=video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )
        self.set_pruning(pruning)

    def take_sizes(self, config):
        vision = config.vision_config
        self.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.vision_aspect_ratio = config.vision_aspect_ratio

    def _frame_size(self, pixels):
        pinpoints, max_tiles = self.image_processor.image_grid_pinpoints, max_tiles_of(self.vision_aspect_ratio)
        return FrameSize(pixels, math.isqrt(self.num_image_tokens), pinpoints, max_tiles=max_tiles)


class ReDiPruneQwen2_5_VLProcessor(PatchProcessorMixin, Qwen2_5_VLProcessor):
    """[`Qwen2_5_VLProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`])."""

    config_class, layout_class = ReDiPruneQwen2_5_VLConfig, QwenLayouts

    def about_videos(self, metadata):
        """Seconds of a step of each video's grid; where the frame rate is not known, of two frames a second as in the stock class."""
        rates = [
            video.fps and len(video.frames_indices) / video.total_num_frames * video.fps or 2 for video in metadata
        ]
        return {"second_per_grid_ts": [self.video_processor.temporal_patch_size / rate for rate in rates]}


class ReDiPruneQwen3VLProcessor(PatchProcessorMixin, Qwen3VLProcessor):
    """[`Qwen3VLProcessor`] that writes one placeholder for each visual token that stays ([`PrunedProcessorMixin`])."""

    config_class, layout_class = ReDiPruneQwen3VLConfig, Qwen3Layouts

    def written(self, kind):
        """Timestamps stand before the marks around each frame, so that those around the video go."""
        token = super().written(kind)
        start, end = map(re.escape, (self.vision_start_token, self.vision_end_token))
        return f"{start}{token}{end}|{token}" if kind == "video" else token


# So that saving copies this file and those that it imports.
for _cls in (
    ReDiPruneLlavaProcessor,
    ReDiPruneLlavaNextProcessor,
    ReDiPruneLlavaOnevisionProcessor,
    ReDiPruneProcessor,
    ReDiPruneVideoLlavaProcessor,
    ReDiPruneQwen2_5_VLProcessor,
    ReDiPruneQwen3VLProcessor,
):
    _cls.register_for_auto_class()
