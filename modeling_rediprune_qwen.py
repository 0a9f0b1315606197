"""The Qwen family, whose visual tokens are pruned behind the merger of its vision tower."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from .configuration_rediprune import ReDiPruneQwen2_5_VLConfig, ReDiPruneQwen3VLConfig
from .core_forward import KeptIndices, PrunedForwardMixin
from .core_generation import PrunedGenerationMixin
from .core_layout import Qwen3Layouts, QwenLayouts
from .core_mrope import MropeGenerationMixin, MropeMixin
from .hub_versions import loading_options, qwen_outputs
from .hub_weights import LinkedWeightsMixin
from .vision_qwen import QwenEncoder, QwenMediaMixin

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
    from .vision_encoders import LlavaEncoder  # noqa: F401


class _Pruned(
    MropeMixin, QwenMediaMixin, PrunedForwardMixin, PrunedGenerationMixin, LinkedWeightsMixin, MropeGenerationMixin
):
    """What all models of the family have before the stock class."""

    encoder_class = QwenEncoder


@dataclass
class ReDiPruneQwen2_5_VLOutput(KeptIndices, qwen_outputs(Qwen2_5_VLForConditionalGeneration)):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneQwen2_5_VLForConditionalGeneration(_Pruned, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL ([`Qwen2_5_VLForConditionalGeneration`]), pruned as `config.pruning` says ([`PrunedForwardMixin`])."""

    config_class = ReDiPruneQwen2_5_VLConfig
    config: ReDiPruneQwen2_5_VLConfig
    layout_class, output_class = QwenLayouts, ReDiPruneQwen2_5_VLOutput
    loading_options = loading_options(
        ReDiPruneQwen2_5_VLConfig.model_type,
        ReDiPruneQwen2_5_VLConfig.base_model_type,
        Qwen2_5_VLForConditionalGeneration,
    )


@dataclass
class ReDiPruneQwen3VLOutput(KeptIndices, qwen_outputs(Qwen3VLForConditionalGeneration)):
    """The stock output, and what was kept ([`KeptIndices`])."""


class ReDiPruneQwen3VLForConditionalGeneration(_Pruned, Qwen3VLForConditionalGeneration):
    """Qwen3-VL ([`Qwen3VLForConditionalGeneration`]), pruned as `config.pruning` says ([`PrunedForwardMixin`])."""

    config_class = ReDiPruneQwen3VLConfig
    config: ReDiPruneQwen3VLConfig
    layout_class, output_class = Qwen3Layouts, ReDiPruneQwen3VLOutput
    loading_options = loading_options(
        ReDiPruneQwen3VLConfig.model_type, ReDiPruneQwen3VLConfig.base_model_type, Qwen3VLForConditionalGeneration
    )

    def companions_by_place(self, items, masks):
        """DeepStack: features of earlier layers of the tower, which are added to the states of the language model's first ones."""
        is_visual, first = torch.stack(list(masks.values())).any(0), items[0].sets[0]["companions"]
        joint = first.new_empty(int(is_visual.sum()), *first.shape[2:])
        for kind, mask in masks.items():
            kept = [
                torch.cat([signals["companions"].flatten(0, 1) for signals in item.sets])[item.kept]
                for item in items
                if item.kind == kind
            ]
            if kept:
                joint[mask[is_visual].to(joint.device)] = torch.cat(kept)
        return {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(joint.unbind(1))}

    def stock_forward(self, deepstack_visual_embeds=None, labels=None, logits_to_keep=0, **inputs):
        """As in the stock class, which drops DeepStack features where it is handed embeddings."""
        if deepstack_visual_embeds is None:
            return super().stock_forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        outputs = self.model.language_model(deepstack_visual_embeds=deepstack_visual_embeds, return_dict=True, **inputs)
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(outputs.last_hidden_state[:, last]), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return self.output_class(loss=loss, logits=logits, **rest)


# So that saving copies this file and those that it imports, also where a class was not loaded through an Auto class.
for _cls in (ReDiPruneQwen2_5_VLForConditionalGeneration, ReDiPruneQwen3VLForConditionalGeneration):
    _cls.register_for_auto_class("AutoModelForImageTextToText")
