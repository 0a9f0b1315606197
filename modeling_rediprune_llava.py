"""The LLaVA family, whose visual tokens are pruned between the vision encoder and the projector."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import LlavaNextCausalLMOutputWithPast
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoCausalLMOutputWithPast
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionCausalLMOutputWithPast
from transformers.models.video_llava.modeling_video_llava import VideoLlavaCausalLMOutputWithPast

from .configuration_rediprune import (
    ReDiPruneConfig,
    ReDiPruneLlavaConfig,
    ReDiPruneLlavaNextConfig,
    ReDiPruneLlavaOnevisionConfig,
    ReDiPruneVideoLlavaConfig,
)
from .core_forward import KeptIndices, PrunedForwardMixin
from .core_generation import PrunedGenerationMixin
from .core_layout import (
    FrameSize,
    LlavaLayouts,
    LlavaNextLayouts,
    LlavaNextVideoLayouts,
    LlavaOnevisionLayouts,
    VideoLlavaLayouts,
    max_tiles_of,
)
from .hub_versions import loading_options
from .hub_weights import LinkedWeightsMixin
from .vision_encoders import (
    LlavaEncoder,
    LlavaNextEncoder,
    LlavaNextVideoEncoder,
    LlavaOnevisionEncoder,
    VideoLlavaEncoder,
)
from .vision_tower import ClipTowerMixin

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of those that `auto_map` names lists all that it rests on.
    from .core_attention import MASKED_KERNELS  # noqa: F401
    from .core_cache import TokenRecord  # noqa: F401
    from .core_encoded import ENCODER_SIGNALS  # noqa: F401
    from .core_inner import InnerCall  # noqa: F401
    from .core_items import MediaSizes  # noqa: F401
    from .core_language import LanguageForwardMixin  # noqa: F401
    from .core_media import MediaStagesMixin  # noqa: F401
    from .core_positions import ANSWER_SHARE  # noqa: F401
    from .core_pruner import Pruner  # noqa: F401
    from .core_question import Question  # noqa: F401
    from .hub_files import PARTS  # noqa: F401
    from .hub_linking import HUB_KEYS  # noqa: F401
    from .hub_untrusted import CODE_KEYS  # noqa: F401
    from .inputs_text_tower import SEGMENT  # noqa: F401
    from .inputs_tokenizing import OneAtATime  # noqa: F401
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
    from .ops_merging import DIVERSITY_WEIGHT  # noqa: F401
    from .ops_query import QUERY_WEIGHTINGS  # noqa: F401
    from .ops_relevance import RELEVANCES  # noqa: F401
    from .ops_selection import CANDIDATE_POOLS  # noqa: F401
    from .ops_tokens import MIN_NORM  # noqa: F401
    from .ops_video import share_out  # noqa: F401
    from .vision_clip import run_tower  # noqa: F401
    from .vision_joint_space import JointSpace  # noqa: F401


class _Pruned(ClipTowerMixin, PrunedForwardMixin, PrunedGenerationMixin, LinkedWeightsMixin):
    """What all models of the family have before the stock class."""


@dataclass
class ReDiPruneLlavaOutput(KeptIndices, LlavaCausalLMOutputWithPast):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneLlavaForConditionalGeneration(_Pruned, LlavaForConditionalGeneration):
    """LLaVA-1.5 ([`LlavaForConditionalGeneration`]), pruned as `config.pruning` says ([`PrunedForwardMixin`])."""

    config_class = ReDiPruneLlavaConfig
    config: ReDiPruneLlavaConfig
    layout_class, encoder_class, output_class = LlavaLayouts, LlavaEncoder, ReDiPruneLlavaOutput
    loading_options = loading_options(
        ReDiPruneLlavaConfig.model_type, ReDiPruneLlavaConfig.base_model_type, LlavaForConditionalGeneration
    )


@dataclass
class ReDiPruneLlavaNextOutput(KeptIndices, LlavaNextCausalLMOutputWithPast):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneLlavaNextForConditionalGeneration(_Pruned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT ([`LlavaNextForConditionalGeneration`]), pruned as `config.pruning` says ([`PrunedForwardMixin`])."""

    config_class = ReDiPruneLlavaNextConfig
    config: ReDiPruneLlavaNextConfig
    layout_class, encoder_class, output_class = LlavaNextLayouts, LlavaNextEncoder, ReDiPruneLlavaNextOutput
    loading_options = loading_options(
        ReDiPruneLlavaNextConfig.model_type, ReDiPruneLlavaNextConfig.base_model_type, LlavaNextForConditionalGeneration
    )


@dataclass
class ReDiPruneCausalLMOutputWithPast(KeptIndices, LlavaNextVideoCausalLMOutputWithPast):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneLlavaNextVideoForConditionalGeneration(_Pruned, LlavaNextVideoForConditionalGeneration):
    """[`LlavaNextVideoForConditionalGeneration`], pruned as `config.pruning` says ([`PrunedForwardMixin`])."""

    config_class = ReDiPruneConfig
    config: ReDiPruneConfig
    layout_class, encoder_class = LlavaNextVideoLayouts, LlavaNextVideoEncoder
    output_class = ReDiPruneCausalLMOutputWithPast
    loading_options = loading_options(
        ReDiPruneConfig.model_type, ReDiPruneConfig.base_model_type, LlavaNextVideoForConditionalGeneration
    )


@dataclass
class ReDiPruneVideoLlavaOutput(KeptIndices, VideoLlavaCausalLMOutputWithPast):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneVideoLlavaForConditionalGeneration(_Pruned, VideoLlavaForConditionalGeneration):
    """Video-LLaVA ([`VideoLlavaForConditionalGeneration`]), pruned as `config.pruning` says ([`PrunedForwardMixin`])."""

    config_class = ReDiPruneVideoLlavaConfig
    config: ReDiPruneVideoLlavaConfig
    layout_class, encoder_class, output_class = VideoLlavaLayouts, VideoLlavaEncoder, ReDiPruneVideoLlavaOutput
    loading_options = loading_options(
        ReDiPruneVideoLlavaConfig.model_type,
        ReDiPruneVideoLlavaConfig.base_model_type,
        VideoLlavaForConditionalGeneration,
    )

    def tower_of(self, kind):
        """Images and videos have a tower each; CLS of a frame stays as a token of its video."""
        return (self.model.video_tower, True) if kind == "video" else (self.model.image_tower, False)


@dataclass
class ReDiPruneLlavaOnevisionOutput(KeptIndices, LlavaOnevisionCausalLMOutputWithPast):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneLlavaOnevisionForConditionalGeneration(_Pruned, LlavaOnevisionForConditionalGeneration):
    """
    LLaVA-OneVision ([`LlavaOnevisionForConditionalGeneration`]), pruned as `config.pruning` says ([`PrunedForwardMixin`]).

    Pruning acts between vision tower and projector, but on what this family pools behind its projector: pooled frames of
    videos, and images that are so large that the tokens of their tiles are shrunk. Newlines go when tokens go.
    """

    config_class = ReDiPruneLlavaOnevisionConfig
    config: ReDiPruneLlavaOnevisionConfig
    layout_class, encoder_class = LlavaOnevisionLayouts, LlavaOnevisionEncoder
    output_class = ReDiPruneLlavaOnevisionOutput
    loading_options = loading_options(
        ReDiPruneLlavaOnevisionConfig.model_type,
        ReDiPruneLlavaOnevisionConfig.base_model_type,
        LlavaOnevisionForConditionalGeneration,
    )

    @property
    def frame_size(self) -> FrameSize:
        return super().frame_size._replace(max_tiles=max_tiles_of(self.config.vision_aspect_ratio))

    def encoder_modules(self):
        return [*super().encoder_modules(), self.model.multi_modal_projector]


# So that saving copies this file and those that it imports, also where a class was not loaded through an Auto class.
for _cls in (
    ReDiPruneLlavaForConditionalGeneration,
    ReDiPruneLlavaNextForConditionalGeneration,
    ReDiPruneLlavaNextVideoForConditionalGeneration,
    ReDiPruneLlavaOnevisionForConditionalGeneration,
    ReDiPruneVideoLlavaForConditionalGeneration,
):
    _cls.register_for_auto_class("AutoModelForImageTextToText")
