"""The config class of every family, whose pruning block is in `methods_block.py`."""

from typing import TYPE_CHECKING

from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    VideoLlavaConfig,
)

from .hub_files import code_in_place
from .hub_untrusted import names_folder, resolve_text_tower
from .hub_versions import register_for_serving, with_older_rope
from .methods_base import CLS_SIGNALS
from .methods_block import PruningConfig
from .methods_registry import METHODS
from .methods_settings import is_whole, shown

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of those that `auto_map` names lists all that it rests on.
    from .methods_attention import CONTEXTUAL_SHARE  # noqa: F401
    from .methods_baselines import Random  # noqa: F401
    from .methods_coverage import VISION_TEMPERATURE  # noqa: F401
    from .methods_distance import ReDiPrune  # noqa: F401
    from .methods_encoder import EvoPrune  # noqa: F401
    from .methods_inner import FastV  # noqa: F401
    from .methods_relevance import SPENT  # noqa: F401
    from .methods_still import STILL_WEIGHT  # noqa: F401
    from .methods_video import LEAST_SEGMENTS  # noqa: F401
    from .ops_inner import rotated  # noqa: F401
    from .ops_query import QUERY_WEIGHTINGS  # noqa: F401
    from .ops_relevance import RELEVANCES  # noqa: F401
    from .ops_selection import CANDIDATE_POOLS  # noqa: F401
    from .ops_tokens import MIN_NORM  # noqa: F401
    from .ops_video import share_out  # noqa: F401

LINK_KEYS = ("weights_from", "weights_revision")
MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq")


def _are_sizes(value) -> bool:
    """Whether a value is a list of at least one [height, width]."""
    is_list = lambda values: isinstance(values, (list, tuple)) and len(values) > 0  # noqa: E731
    return is_list(value) and all(is_list(size) and len(size) == 2 and all(map(_is_positive, size)) for size in value)


def _is_positive(value) -> bool:
    return is_whole(value) and value > 0


class PrunedConfigMixin:
    """
    For config classes, before the stock class: one more block, `pruning` ([`PruningConfig`]), and the link of a linked variant.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): the pruning block; the defaults when not given.
        weights_from (`str`, *optional*): where the weights are, if not in the repository itself: a Hub id, or a folder
            (absolute, or relative to the variant's and beginning with `.`).
        weights_revision (`str`, *optional*): the revision of that Hub id.

    `from_pretrained(repo, pruning={"keep_ratio": 0.25})` merges over the block of the repository's `config.json`, which
    itself is merged over the defaults.

    Attributes:
        base_model_type: of the checkpoints that it is made from.
        takes_videos: whether its prompts can hold videos beside images.
        video_processor: name of the stock class that prepares its videos.
        trained_frames, trained_fps: how many frames of a video, or of a second of it, it was trained with; `None` where its
            checkpoints name that themselves.
        fallback_template: whether Vicuna's chat template fits checkpoints that bring none.
        model_class, model_file, processor_class: names of the classes that load with it, and of the file of the model's.
        can_merge_in_encoder, cannot_merge_because: whether methods that merge in the vision encoder work, and why not.
        tower_type: the `model_type` of its vision tower; one that is no CLIP has neither CLS nor CLIP's joint space.
    """

    base_model_type = model_class = processor_class = ""
    model_file = "modeling_rediprune_llava"
    takes_videos, video_processor = False, ""
    trained_frames = trained_fps = None
    fallback_template = True
    can_merge_in_encoder, cannot_merge_because = True, ""
    tower_type = CLIPVisionConfig.model_type

    def __init__(self, *args, pruning=None, weights_from=None, weights_revision=None, **kwargs):
        kwargs.pop("model_type", None)  # the stock one, in the config.json of a stock checkpoint
        super().__init__(*args, **kwargs)
        self.pruning = pruning
        self.weights_from = weights_from
        self.weights_revision = weights_revision

    def __setattr__(self, key, value):
        if key in LINK_KEYS and value is not None and not (isinstance(value, str) and value.strip()):
            expected = "a Hub id or a folder" if key == "weights_from" else "a branch, tag or commit"
            raise ValueError(f"config key {key!r} is {value!r}, but must be {expected}, or None for weights of its own")
        if key == "spatial_pool_stride" and not _is_positive(value):
            raise ValueError(
                f"config key {key!r} is {shown(value)}, but must be a positive integer: how many tokens become one"
            )
        if key == "image_grid_pinpoints" and value is not None and not _are_sizes(value):
            raise ValueError(
                f"config key {key!r} is {shown(value)}, but must be a list of sizes [height, width] in pixels, multiples of the "
                "side of a tile, such as [[336, 672], [672, 336]]"
            )
        if key == "vision_config":
            self.check_tower(value)
        if key == "pruning":
            value = PruningConfig.from_value(value)
            self.check_method(value)
        super().__setattr__(key, value)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:  # for a folder without the file, the stock class takes the defaults silently
            raise OSError(
                f"no config.json in {str(pretrained_model_name_or_path)!r}, the home of the pruning parameters"
            )
        for values in (config_dict, kwargs):
            if "pruning" in values:
                values["pruning"] = resolve_text_tower(values["pruning"], pretrained_model_name_or_path)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        overrides = kwargs.pop("pruning", None)
        if isinstance(overrides, dict):
            block = PruningConfig.from_value(config_dict.get("pruning")).to_dict()
            overrides = PruningConfig.merged(block, overrides)
        if overrides is not None:
            config_dict = {**config_dict, "pruning": overrides}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        with code_in_place(self, save_directory):
            return super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id, *args, **kwargs):
        """
        As in the stock class.

        Raises:
            ValueError: `weights_from` or `text_tower` names a folder.
        """
        self.check_link_for_others()
        return super().push_to_hub(repo_id, *args, **kwargs)

    @classmethod
    def check_tower(cls, vision_config) -> None:
        """Raises ValueError for a vision tower, a config or its dictionary, of another type; without a type it is of this one."""
        of = vision_config.get if isinstance(vision_config, dict) else lambda key: getattr(vision_config, key, None)
        if of("model_type") not in (None, cls.tower_type):
            raise ValueError(
                f"config key 'vision_config' is of the type {shown(of('model_type'))}, but must be "
                f"{cls.tower_type!r}: pruning reads the layers and patches of such a vision tower. Take a "
                f"{cls.base_model_type!r} checkpoint with one; this one runs unpruned in transformers' own class."
            )

    @classmethod
    def check_method(cls, pruning) -> None:
        """Raises ValueError where the method requires what the vision encoder of this family cannot give."""
        method = METHODS[pruning.method]
        if method.merges_in_encoder and not cls.can_merge_in_encoder:
            raise ValueError(
                f"method={pruning.method!r} merges tokens inside the vision encoder, which does not work with "
                f"{cls.base_model_type!r}: {cls.cannot_merge_because}. Choose another method."
            )
        if cls.tower_type == CLIPVisionConfig.model_type:
            return
        if cls.tower_type != SiglipVisionConfig.model_type and "last_attention" in method.required_signals:
            raise ValueError(
                f"method={pruning.method!r} needs what patches receive of attention in the last layer of the vision tower, which that "
                f"of {cls.base_model_type!r}, a {cls.tower_type!r}, does not tell. Choose another method, such as 'rediprune'."
            )
        missing = sorted(method.required_signals & CLS_SIGNALS)
        if missing:
            raise ValueError(
                f"method={pruning.method!r} needs what a tower with CLS tells ({', '.join(missing)}), but the vision tower of "
                f"{cls.base_model_type!r}, a {cls.tower_type!r}, has no CLS. Choose another method, such as 'rediprune'."
            )
        if pruning.text_tower is not None:
            raise ValueError(
                f"pruning key 'text_tower' is {pruning.text_tower!r}, but the vision tower of {cls.base_model_type!r}, a "
                f"{cls.tower_type!r}, was not made from a CLIP, so that there is no joint space with its text. Set it to None."
            )

    def check_link_for_others(self) -> None:
        """Raises ValueError where the link, or the text tower, can be found on this computer alone."""
        tower = self.pruning.text_tower
        if tower is not None and names_folder(tower):
            raise ValueError(
                f"the CLIP text tower of this variant is the folder text_tower={tower!r}, where nobody who loads it from the "
                "Hub finds it: set config.pruning.text_tower to a Hub id."
            )
        if self.weights_from is not None and names_folder(self.weights_from):
            raise ValueError(
                f"the weights of this variant are in the folder weights_from={self.weights_from!r}, where nobody who loads "
                "it from the Hub finds them: push it with model.push_to_hub(..., materialise=True), or set weights_from in its "
                "config.json to the Hub id of the base and load it again."
            )

    @classmethod
    def auto_map_of_class(cls) -> dict:
        """The `auto_map` in every saved config.json: `register_for_auto_class` alone would keep one model entry, the last."""
        model = f"{cls.model_file}.{cls.model_class}"
        return {
            "AutoConfig": f"configuration_rediprune.{cls.__name__}",
            **dict.fromkeys(MODEL_AUTO_CLASSES, model),
            "AutoProcessor": f"processing_rediprune.{cls.processor_class}",
        }

    def to_dict(self):
        output = super().to_dict()
        output["pruning"] = self.pruning.to_dict()
        output["auto_map"] = self.auto_map_of_class()
        if isinstance(output.get("text_config"), dict):
            output["text_config"] = with_older_rope(output["text_config"])
        for key in LINK_KEYS:
            if output.get(key) is None:
                output.pop(key, None)
        return output


class ReDiPruneConfig(PrunedConfigMixin, LlavaNextVideoConfig):
    """LLaVA-NeXT-Video's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_llava_next_video"
    base_model_type = LlavaNextVideoConfig.model_type
    model_class = "ReDiPruneLlavaNextVideoForConditionalGeneration"
    processor_class = "ReDiPruneProcessor"
    takes_videos, video_processor = True, "LlavaNextVideoVideoProcessor"

    def __init__(self, *args, **kwargs):  # without one, 5.x would make one that passes the mixin's by
        super().__init__(*args, **kwargs)


class ReDiPruneLlavaConfig(PrunedConfigMixin, LlavaConfig):
    """LLaVA-1.5's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_llava"
    base_model_type = LlavaConfig.model_type
    model_class = "ReDiPruneLlavaForConditionalGeneration"
    processor_class = "ReDiPruneLlavaProcessor"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class ReDiPruneLlavaNextConfig(PrunedConfigMixin, LlavaNextConfig):
    """LLaVA-NeXT's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_llava_next"
    base_model_type = LlavaNextConfig.model_type
    model_class = "ReDiPruneLlavaNextForConditionalGeneration"
    processor_class = "ReDiPruneLlavaNextProcessor"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class ReDiPruneVideoLlavaConfig(PrunedConfigMixin, VideoLlavaConfig):
    """Video-LLaVA's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_video_llava"
    base_model_type = VideoLlavaConfig.model_type
    model_class = "ReDiPruneVideoLlavaForConditionalGeneration"
    processor_class = "ReDiPruneVideoLlavaProcessor"
    takes_videos, video_processor = True, "VideoLlavaVideoProcessor"
    trained_frames = 8
    can_merge_in_encoder = False
    cannot_merge_because = "CLS of each frame is a token of its video, and is never merged"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class ReDiPruneLlavaOnevisionConfig(PrunedConfigMixin, LlavaOnevisionConfig):
    """LLaVA-OneVision's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_llava_onevision"
    base_model_type = LlavaOnevisionConfig.model_type
    model_class = "ReDiPruneLlavaOnevisionForConditionalGeneration"
    processor_class = "ReDiPruneLlavaOnevisionProcessor"
    takes_videos, video_processor = True, "LlavaOnevisionVideoProcessor"
    trained_frames = 32
    fallback_template = False
    tower_type = SiglipVisionConfig.model_type
    can_merge_in_encoder = False
    cannot_merge_because = "its vision tower has no CLS, whose attention decides what is merged"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class QwenConfigMixin(PrunedConfigMixin):
    """Of the Qwen models, whose towers have no CLS, and whose positions have three numbers (M-RoPE)."""

    model_file = "modeling_rediprune_qwen"
    takes_videos, trained_fps = True, 2
    fallback_template = False
    can_merge_in_encoder = False
    cannot_merge_because = "its tower merges squares of patches and attends in windows, and has no CLS"

    @classmethod
    def check_tower(cls, vision_config):
        pass  # the stock config takes its own tower alone

    @classmethod
    def check_method(cls, pruning):
        super().check_method(pruning)
        if pruning.positions not in (None, "original"):
            raise ValueError(
                f"pruning key 'positions' is {pruning.positions!r}, but positions of {cls.base_model_type!r} are the coordinates of a token "
                "in its picture, which are never moved. Leave it at None, or set it to 'original'."
            )
        if pruning.distance_bias:
            raise ValueError(
                f"pruning key 'distance_bias' is true, but positions of {cls.base_model_type!r} have three numbers, between which no "
                "distance is defined here. Leave distance_bias at false."
            )
        if pruning.inner_name is not None:
            raise ValueError(
                f"{pruning.inner_name!r} leaves visual tokens behind inside the language model, which works with positions of one number "
                f"alone; those of {cls.base_model_type!r} have three. Choose a method that prunes before the language model."
            )


class ReDiPruneQwen2_5_VLConfig(QwenConfigMixin, Qwen2_5_VLConfig):
    """Qwen2.5-VL's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_qwen2_5_vl"
    base_model_type = Qwen2_5_VLConfig.model_type
    model_class = "ReDiPruneQwen2_5_VLForConditionalGeneration"
    processor_class = "ReDiPruneQwen2_5_VLProcessor"
    video_processor = "Qwen2VLVideoProcessor"
    tower_type = Qwen2_5_VLConfig.sub_configs["vision_config"].model_type

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class ReDiPruneQwen3VLConfig(QwenConfigMixin, Qwen3VLConfig):
    """Qwen3-VL's config with a pruning block ([`PrunedConfigMixin`])."""

    model_type = "rediprune_qwen3_vl"
    base_model_type = Qwen3VLConfig.model_type
    model_class = "ReDiPruneQwen3VLForConditionalGeneration"
    processor_class = "ReDiPruneQwen3VLProcessor"
    video_processor = "Qwen3VLVideoProcessor"
    tower_type = Qwen3VLConfig.sub_configs["vision_config"].model_type

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def check_method(cls, pruning):
        super().check_method(pruning)
        scope = pruning.resolved("scope")
        if pruning.prunes and scope != "frame":
            raise ValueError(
                f"scope={scope!r}, which is the method's own where the key is None, shares a budget between the frames of a video, "
                f"but in a prompt of {cls.base_model_type!r} a timestamp stands before the placeholders of each frame, so that "
                "their number cannot depend on what is seen. Set scope to 'frame'."
            )


# Every family, by the `model_type` of the checkpoints that its variants are made from.
CONFIGS = {
    cls.base_model_type: cls
    for cls in (
        ReDiPruneConfig,
        ReDiPruneLlavaConfig,
        ReDiPruneLlavaNextConfig,
        ReDiPruneLlavaOnevisionConfig,
        ReDiPruneVideoLlavaConfig,
        ReDiPruneQwen2_5_VLConfig,
        ReDiPruneQwen3VLConfig,
    )
}

for cls in CONFIGS.values():
    register_for_serving(cls.model_type, cls.model_class)
    cls.register_for_auto_class()  # so that saving copies this file and those that it imports
