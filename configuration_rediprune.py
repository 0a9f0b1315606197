"""Configuration: the pruning block, checked when it is set, and the config class of every family."""

import difflib
from typing import TYPE_CHECKING, Optional

from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig, LlavaNextVideoConfig, VideoLlavaConfig

from .hub_files import code_in_place
from .hub_untrusted import names_folder, resolve_text_tower
from .hub_versions import register_for_serving
from .methods_registry import METHODS
from .methods_settings import collect_settings, is_whole, shown

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of the three that `auto_map` names lists all that it rests on.
    from .methods_attention import CONTEXTUAL_SHARE  # noqa: F401
    from .methods_base import VisualTokens  # noqa: F401
    from .methods_baselines import Random  # noqa: F401
    from .methods_coverage import VISION_TEMPERATURE  # noqa: F401
    from .methods_distance import ReDiPrune  # noqa: F401
    from .methods_encoder import EvoPrune  # noqa: F401
    from .methods_relevance import SPENT  # noqa: F401
    from .ops_query import QUERY_WEIGHTINGS  # noqa: F401
    from .ops_relevance import RELEVANCES  # noqa: F401
    from .ops_selection import CANDIDATE_POOLS  # noqa: F401
    from .ops_tokens import MIN_NORM  # noqa: F401

LINK_KEYS = ("weights_from", "weights_revision")
MODEL_AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq")


def _are_sizes(value) -> bool:
    """Whether a value is a list of at least one [height, width]."""
    is_list = lambda values: isinstance(values, (list, tuple)) and len(values) > 0  # noqa: E731
    return is_list(value) and all(is_list(size) and len(size) == 2 and all(map(_is_positive, size)) for size in value)


def _is_positive(value) -> bool:
    return is_whole(value) and value > 0


class PruningConfig:
    """
    The `pruning` block of `config.json`: the only home of the pruning parameters.

    Its keys are `method`, those below, which several methods share, and the parameters of each method, which its class
    declares, checks and documents in `methods_*.py` (docs/methods.md has a table of all).

    Every value is checked when it is set, in the constructor and by attribute. Scalars of numpy and torch are taken as the
    numbers that they hold, and numbers that need not be whole are kept as `float`.

    Args:
        method (`str`, defaults to `"rediprune"`): which tokens stay; a key of `METHODS` in `methods_registry.py`.
        keep_ratio (`float`, defaults to 0.15): share of the visual tokens that stay, in (0, 1]. A set of `n` tokens
            keeps `count_kept(n, keep_ratio)`; 1 is the stock model.
        scope (`str`, *optional*): what shares a budget. `"frame"` = each frame and each image view by itself; `"video"` =
            all frames of a video jointly, image views by themselves; `"item"` = all tokens of a video or an image.
        relevance (`str`, *optional*): the space in which tokens and question are compared, for the methods that look at the
            question. `"pooled"` = the ReDiPrune paper's; `"projected"` = the language model's input embeddings;
            `"attention"` = the query-key space of one of its first layers; `"clip"` = the joint space of `text_tower`.
        relevance_layer (`int`, defaults to 1): the layer of `"attention"`; the question goes through the layers before it.
        text_tower (`str`, *optional*): the CLIP checkpoint that the vision tower was made from, a Hub id (`"id@revision"` to
            pin it) or a folder (absolute, or relative to the variant's and beginning with `.`). With it `"cdpruner"` and
            `"trim"` compare as their papers do; its weights are loaded when they are needed and not saved with the model.
        distance (`str`, *optional*): what max-min diversity is measured in, `"features"` of the vision tower or
            `"projected"` tokens. Used by the ReDiPrune methods and `"divprune"`.
        time_weight (`float`, *optional*): what the whole length of a video adds to that distance, in [0, 1e6].
        proportional_attention (`bool`, *optional*): a kept token weighs in the language model's attention as much as all
            tokens that it stands for.
        merge_weight (`float`, *optional*): how far a kept token's features move to the mean of all tokens that it stands for, in
            [0, 1].
        query_weighting (`str`, defaults to `"exponential"`): how text embeddings become one query vector (paper,
            Table 4); `"none"` drops the text, so that diversity alone decides.
        query_max_tokens (`int`, defaults to 128): at most so many tokens of the text after the last placeholder.
        video_pooling (`bool`, defaults to `True`): the tokens of a video are those that the checkpoint's own 2x2 pooling
            leaves; else the unpooled ones of each frame.
        positions (`str`, *optional*): `"compact"` = the pruned prompt is numbered 0..n-1, as in the paper; `"original"` =
            every token keeps the position that it has in the unpruned prompt.

    Of a key that may be `None` (the default of all that are *optional*, but for `text_tower` and `max_candidates`), `None` is
    what the paper of the method has; `resolved` looks it up.

    Raises:
        ValueError: unknown key, or a value out of range; the message names key, value and allowed range.
    """

    def __init__(self, **values):
        settings = self.settings()
        self._check_keys(values)
        checked = {key: setting.checked(key, values.get(key, setting.default)) for key, setting in settings.items()}
        self._check_together(checked)
        vars(self).update(checked)

    def __setattr__(self, key, value):
        self._check_keys([key])
        value = self.settings()[key].checked(key, value)
        self._check_together({**vars(self), key: value})
        super().__setattr__(key, value)

    def __eq__(self, other):
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    @staticmethod
    def settings() -> dict:
        """The [`Setting`] of every key."""
        return collect_settings(METHODS)

    @classmethod
    def _check_keys(cls, keys):
        allowed = cls.settings()
        for key in keys:
            if key not in allowed:
                close = difflib.get_close_matches(str(key), allowed, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown pruning key {key!r}; allowed keys: {', '.join(allowed)}{hint}")

    @staticmethod
    def _check_together(values: dict):
        for method in METHODS.values():
            method.check(values)
        if values["relevance"] == "clip" and values["text_tower"] is None:
            raise ValueError(
                "pruning key 'relevance' is 'clip', but text_tower is None; set text_tower to a CLIP checkpoint, such as "
                "'openai/clip-vit-large-patch14-336', or choose another relevance"
            )
        if METHODS[values["method"]].merges_in_encoder:
            for key in ("scope", "proportional_attention", "merge_weight"):
                if values[key] not in (None, "frame", False, 0):
                    raise ValueError(
                        f"pruning key {key} is {values[key]!r}, but method={values['method']!r} merges tokens inside the vision "
                        f"encoder, frame by frame and with sizes of its own; leave {key} at None"
                    )

    @classmethod
    def from_value(cls, value) -> "PruningConfig":
        """A block from `None` (the defaults), a dictionary (merged over the defaults) or another block (copied)."""
        if isinstance(value, PruningConfig):
            return cls(**value.to_dict())
        if value is None:
            return cls()
        if not isinstance(value, dict):
            raise ValueError(
                f"pruning is {value!r}, but must be a dictionary with keys among {', '.join(cls().to_dict())}"
            )
        cls._check_keys(value)
        return cls(**value)

    def with_keep_ratio(self, keep_ratio: Optional[float]) -> "PruningConfig":
        """This block with another keep ratio; itself when `keep_ratio` is `None`."""
        return self if keep_ratio is None else type(self)(**{**vars(self), "keep_ratio": keep_ratio})

    @property
    def prunes(self) -> bool:
        """Whether any token can be dropped."""
        return self.method != "none" and self.keep_ratio < 1

    def resolved(self, key: str):
        """The value of a key that may be `None`: then the method's own."""
        value, method = getattr(self, key), METHODS[self.method]
        if value is None and key == "relevance" and self.text_tower is not None:
            value = method.relevance_with_tower
        return getattr(method, key) if value is None else value

    @property
    def reads_clip(self) -> bool:
        """Whether the question is read by a CLIP text tower, so that the processor has to give its token ids."""
        reads = "relevance" in METHODS[self.method].required_signals and self.query_weighting != "none"
        return self.prunes and reads and self.resolved("relevance") == "clip"

    @property
    def reads_words(self) -> bool:
        """Whether the question's content words are looked up, so that the processor has to give their token ids."""
        reads = "text_affinity" in METHODS[self.method].required_signals and self.query_weighting != "none"
        return (
            self.prunes and reads and self.resolved("relevance") != "attention" and self.resolved("words") == "content"
        )

    def count(self, num_tokens: int) -> int:
        """How many of the `num_tokens` tokens of one set (a frame, an image view, or all tokens of an item) stay."""
        return METHODS[self.method].count(num_tokens, self) if self.prunes and num_tokens else num_tokens

    def to_dict(self) -> dict:
        return dict(vars(self))


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
        trained_frames: how many frames of a video it was trained with; `None` where its checkpoints name that themselves.
        model_class, model_file, processor_class: names of the classes that load with it, and of the file of the model's.
        can_merge_in_encoder, cannot_merge_because: whether methods that merge in the vision encoder work, and why not.
    """

    base_model_type = model_class = processor_class = ""
    model_file = "modeling_rediprune_llava"
    takes_videos, video_processor = False, ""
    trained_frames = None
    can_merge_in_encoder, cannot_merge_because = True, ""

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
            overrides = {**PruningConfig.from_value(config_dict.get("pruning")).to_dict(), **overrides}
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
        """Raises ValueError for a vision tower, a config or its dictionary, that is no CLIP; without a type it is one."""
        of = vision_config.get if isinstance(vision_config, dict) else lambda key: getattr(vision_config, key, None)
        if of("model_type") not in (None, CLIPVisionConfig.model_type):
            raise ValueError(
                f"config key 'vision_config' is of the type {shown(of('model_type'))}, but must be "
                f"{CLIPVisionConfig.model_type!r}: pruning reads the layers, patches and CLS of a CLIP vision tower. Take a "
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


# Every family, by the `model_type` of the checkpoints that its variants are made from.
CONFIGS = {
    cls.base_model_type: cls
    for cls in (ReDiPruneConfig, ReDiPruneLlavaConfig, ReDiPruneLlavaNextConfig, ReDiPruneVideoLlavaConfig)
}

for cls in CONFIGS.values():
    register_for_serving(cls.model_type, cls.model_class)
    cls.register_for_auto_class()  # so that saving copies this file and those that it imports
