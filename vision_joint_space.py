"""CLIP's joint space of text and pictures, of the checkpoint that `text_tower` names, for CDPruner and TRIM.

Shapes: B questions in M segments of T tokens; N sets of L tokens; C the width of the vision tower, D that of the joint space.
"""

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from .hub_untrusted import link_files, weight_files
from .inputs_text_tower import errors_about_tower, find_tower
from .ops_tokens import MIN_NORM


class JointSpace:
    """
    The parts of a CLIP checkpoint that lead into its joint space, in fp32; on the device of what it is given.

    The last norm of the vision tower is the checkpoint's, as the projection after it is: the two were trained together. A
    LLaVA taps its own tower before that norm, which nothing there has trained.

    Not an `nn.Module`, so that a model which has one neither saves nor counts its weights.

    Args:
        text_tower (`str`): as in [`PruningConfig`].
        width (`int`): of the vision tower whose features come in.

    Raises:
        OSError: the checkpoint cannot be reached, or has no safetensors weights.
        ValueError: it is no whole CLIP, or its vision tower is of another width.
    """

    def __init__(self, text_tower: str, width: int):
        self.text_tower = text_tower
        with errors_about_tower(text_tower):
            source, hub, config = find_tower(text_tower)
            if config.vision_config.hidden_size != width:
                raise ValueError(
                    f"pruning key 'text_tower' is {text_tower!r}, whose visual_projection takes features of width "
                    f"{config.vision_config.hidden_size}, but the model's vision tower gives {width}; set it to the CLIP "
                    "checkpoint that this vision tower was made from, or to None"
                )
            clip, info = CLIPModel.from_pretrained(
                link_files(weight_files(source, **hub)),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise ValueError(
                f"pruning key 'text_tower' is {text_tower!r}, which lacks {len(names)} tensors of a whole CLIP, such as "
                f"{names[0]}; set it to a complete checkpoint"
            )
        parts = {
            "text_model": clip.text_model,
            "text_projection": clip.text_projection,
            "visual_norm": clip.vision_model.post_layernorm,
            "visual_projection": clip.visual_projection,
        }
        self.parts = torch.nn.ModuleDict(parts).eval().requires_grad_(False)

    @torch.no_grad()
    def place_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, L, C) of the vision tower, any floating dtype, in the joint space: (N, L, D) fp32, not normalized."""
        parts = self.parts.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return parts["visual_projection"](parts["visual_norm"](features.float()))

    @torch.no_grad()
    def place_questions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Questions, from `question_segments`, in the joint space: (B, D) fp32, the mean of the unit vectors of their segments.

        The cosine of a token with a question is the mean of those with its segments, which is its product with this vector.
        An empty question is zero.
        """
        parts, there = self.parts.to(ids.device), mask.any(-1)
        vectors = torch.zeros(
            *there.shape, parts["text_projection"].out_features, dtype=torch.float32, device=ids.device
        )
        if there.any():
            with torch.autocast(ids.device.type, enabled=False):
                states = parts["text_model"](input_ids=ids[there], attention_mask=mask[there]).pooler_output
                vectors[there] = F.normalize(parts["text_projection"](states), dim=-1, eps=MIN_NORM)
        return vectors.sum(1) / there.sum(1, keepdim=True).clamp_min(1)
