"""Models of true sizes with random weights: what they cost does not depend on what the weights are."""

from dataclasses import dataclass, field

import torch
from repository import code_module, fail
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

try:
    from transformers.initialization import no_init_weights
except ImportError:  # 4.57
    from transformers.modeling_utils import no_init_weights

# Of the published models: Vicuna-7B, Qwen2-7B and -2.5-7B, Qwen3-8B, CLIP ViT-L/14 at 336 pixels, the layers of SigLIP So400m/14 at 384
# that run, and the towers of Qwen2.5-VL and Qwen3-VL. Those of Qwen are dictionaries, which is what their configs take.
QWEN2 = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
LANGUAGE = {
    "vicuna": (LlamaConfig, {"vocab_size": 32064, "num_hidden_layers": 32, "max_position_embeddings": 4096}),
    "qwen2": (Qwen2Config, QWEN2),
    "qwen2.5": (dict, QWEN2),
    "qwen3": (
        dict,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
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
    "qwen2.5": (
        dict,
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "qwen3": (dict, {"depth": 27, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}),
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
        sizes = VISION[self.vision][1]
        return sizes[depth_key(sizes)]


def depth_key(vision: dict) -> str:
    """What the number of layers of a vision tower is called."""
    return "depth" if "depth" in vision else "num_hidden_layers"


STRETCHED = {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
SHAPES = {
    "llava-next-video-7b": Shape(
        "the sizes of LLaVA-NeXT-Video-7B with random weights", "llava_next_video", text_options=STRETCHED
    ),
    "llava-1.5-7b": Shape("the sizes of LLaVA-1.5-7B with random weights", "llava", frames=(1,), fixed=True),
    "llava-onevision-7b": Shape(
        "the sizes of LLaVA-OneVision-Qwen2-7B with random weights", "llava_onevision", "qwen2", "siglip"
    ),
    "qwen2.5-vl-7b": Shape(
        "the sizes of Qwen2.5-VL-7B with random weights",
        "qwen2_5_vl",
        "qwen2.5",
        "qwen2.5",
        text_options={"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ),
    "qwen3-vl-8b": Shape(
        "the sizes of Qwen3-VL-8B with random weights",
        "qwen3_vl",
        "qwen3",
        "qwen3",
        text_options={"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
    ),
}


def shape_of(name: str) -> Shape:
    if name not in SHAPES:
        fail(f"--shape {name}: no such shape; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def cut_tower(sizes: dict, layers: int) -> dict:
    """
    The sizes of a vision tower with so many layers. Of those that it names, the ones with full attention are cut with the others, so
    that as many see all patches; those with DeepStack features stay spread over the tower.
    """
    key = depth_key(sizes)
    cut = {**sizes, key: layers}
    if "fullatt_block_indexes" in sizes:
        cut["fullatt_block_indexes"] = [index for index in sizes["fullatt_block_indexes"] if index < layers]
    if "deepstack_visual_indexes" in sizes:
        cut["deepstack_visual_indexes"] = [index * layers // sizes[key] for index in sizes["deepstack_visual_indexes"]]
    return cut


def shape_config(shape: Shape, layers: int = None, vision_layers: int = None):
    """The configuration of a shape, its language model and its vision tower cut to so many layers."""
    (text_class, text), (vision_class, vision) = LANGUAGE[shape.language], VISION[shape.vision]
    options = {"rms_norm_eps": 1e-5, **shape.text_options}
    text = text_class(**{**text, **options, "num_hidden_layers": layers or shape.layers})
    vision = vision_class(**cut_tower(vision, vision_layers or shape.vision_layers))
    config_class = code_module("configuration_rediprune").CONFIGS[shape.family]
    return config_class(text_config=text, vision_config=vision)


def random_model(config, dtype=torch.bfloat16, device="cpu", attention: str = None):
    """
    A model in eval mode with random weights, drawn once each on its device: the usual initialisation of a 7B model takes as
    long as all that is to be measured.
    """
    if attention is not None:
        config._attn_implementation = attention
    model_class = getattr(code_module(config.model_file), config.model_class)
    if hasattr(config.vision_config, "depth"):  # rotary angles of Qwen's towers are lost on the meta device
        with no_init_weights():
            model = model_class._from_config(config, dtype=dtype)
        return _filled(model.to(device).eval())
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    model = model.to_empty(device=device).eval()
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
        if hasattr(module, "inv_freq"):  # made anew: buffers that are not saved are lost on the meta device
            module.__init__(config.text_config)
            module.to(device)
    return _filled(model)


def _filled(model):
    """The model with random weights."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.generation_config.pad_token_id = 0
    return model
