"""Models of true sizes with random weights: what they cost does not depend on what the weights are."""

from dataclasses import dataclass, field

import torch
from repository import code_module, fail
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

# Of the published models: Vicuna-7B, Qwen2-7B, CLIP ViT-L/14 at 336 pixels, and the layers of SigLIP So400m/14 at 384 that run.
LANGUAGE = {
    "vicuna": (LlamaConfig, {"vocab_size": 32064, "num_hidden_layers": 32, "max_position_embeddings": 4096}),
    "qwen2": (
        Qwen2Config,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
    ),
}
VISION = {
    "clip": (
        CLIPVisionConfig,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    ),
    "siglip": (
        SiglipVisionConfig,
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
    ),
}


@dataclass(frozen=True)
class Shape:
    """
    The sizes of a published model.

    Attributes:
        title: what it is.
        family: the `model_type` of its checkpoints.
        language, vision: keys of `LANGUAGE` and `VISION`.
        frames: the numbers of frames that the benchmark takes unless told otherwise.
        text_options: of its language model, beside the sizes.
        fixed: whether it takes one image, so that there is no other number of frames.
    """

    title: str
    family: str
    language: str = "vicuna"
    vision: str = "clip"
    frames: tuple = (8,)
    text_options: dict = field(default_factory=dict)
    fixed: bool = False

    @property
    def layers(self) -> int:
        return LANGUAGE[self.language][1]["num_hidden_layers"]

    @property
    def vision_layers(self) -> int:
        return VISION[self.vision][1]["num_hidden_layers"]


STRETCHED = {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
SHAPES = {
    "llava-next-video-7b": Shape(
        "the sizes of LLaVA-NeXT-Video-7B with random weights", "llava_next_video", text_options=STRETCHED
    ),
    "llava-1.5-7b": Shape("the sizes of LLaVA-1.5-7B with random weights", "llava", frames=(1,), fixed=True),
    "llava-onevision-7b": Shape(
        "the sizes of LLaVA-OneVision-Qwen2-7B with random weights", "llava_onevision", "qwen2", "siglip"
    ),
}


def shape_of(name: str) -> Shape:
    if name not in SHAPES:
        fail(f"--shape {name}: no such shape; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def shape_config(shape: Shape, layers: int = None, vision_layers: int = None):
    """The configuration of a shape, its language model and its vision tower cut to so many layers."""
    (text_class, text), (vision_class, vision) = LANGUAGE[shape.language], VISION[shape.vision]
    options = {"rms_norm_eps": 1e-5, **shape.text_options}
    text = text_class(**{**text, **options, "num_hidden_layers": layers or shape.layers})
    vision = vision_class(**{**vision, "num_hidden_layers": vision_layers or shape.vision_layers})
    config_class = code_module("configuration_rediprune").CONFIGS[shape.family]
    return config_class(text_config=text, vision_config=vision)


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
