"""Models of true sizes with random weights: what they cost does not depend on what the weights are."""

from dataclasses import dataclass

import torch
from repository import code_module, fail
from transformers import CLIPVisionConfig, LlamaConfig


@dataclass(frozen=True)
class Shape:
    """
    The sizes of a published model. All have CLIP ViT-L/14 at 336 pixels (24 layers, 1024 wide) and Vicuna-7B (32 layers,
    4096 wide).

    Attributes:
        title: what it is, and what it is not.
        frames: the numbers of frames that the benchmark takes unless told otherwise.
        video_pooling: the same for the pooling of frames.
        rope_factor: linear stretching of positions.
        fixed: whether other frames and another pooling would be another model.
    """

    title: str
    frames: tuple
    video_pooling: tuple
    rope_factor: float = 1.0
    fixed: bool = False
    layers: int = 32
    vision_layers: int = 24


SHAPES = {
    "llava-next-video-7b": Shape(
        "the sizes of LLaVA-NeXT-Video-7B with random weights", frames=(8,), video_pooling=(True,), rope_factor=2.5
    ),
    "llava-1.5-7b": Shape(
        "the sizes of LLaVA-1.5-7B with random weights, run by the LLaVA-NeXT-Video class as a video of one unpooled frame",
        frames=(1,),
        video_pooling=(False,),
        fixed=True,
    ),
}


def shape_of(name: str) -> Shape:
    if name not in SHAPES:
        fail(f"--shape {name}: no such shape; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def shape_config(shape: Shape, layers: int = None, vision_layers: int = None):
    """The configuration of a shape, its language model and its vision tower cut to so many layers."""
    text = LlamaConfig(
        vocab_size=32064,
        num_hidden_layers=layers or shape.layers,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_scaling={"rope_type": "linear", "factor": shape.rope_factor},
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=vision_layers or shape.vision_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return code_module("configuration_rediprune").ReDiPruneConfig(text_config=text, vision_config=vision)


def random_model(config, dtype=torch.bfloat16, device="cpu", attention: str = None):
    """
    A model in eval mode with random weights, drawn once each on its device: the usual initialisation of a 7B model takes as
    long as all that is to be measured.
    """
    if attention is not None:
        config._attn_implementation = attention
    with torch.device("meta"):
        model = getattr(code_module(config.model_file), config.model_class)(config).to(dtype)
    model = model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
        if hasattr(module, "inv_freq"):  # made anew: buffers that are not saved are lost on the meta device
            module.__init__(config.text_config)
            module.to(device)
    model.generation_config.pad_token_id = 0
    return model
