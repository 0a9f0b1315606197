"""Builders of small random models, processors and media for the tests: 32-pixel frames of 8x8 patches, 16 after pooling."""

import json
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE_SIZE, PATCH_SIZE = 32, 4
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
POOLED = PATCHES // 4
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
TEXT_SIZES = dict(  # of the language models
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION_SIZES = dict(
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
)
WORDS = (
    "USER : ASSISTANT what colour is the star ? where which way does it move red blue left right top how many".split()
)
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_tokenizer(marks=("<image>", "<video>")):
    """Of words; `marks` are the placeholders of images and videos, and what else is no text."""
    words = [*SPECIALS[:4], *marks[:2], *WORDS, *marks[2:]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(marks),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _processor(cls, **kwargs):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return cls(
        video_processor=LlavaNextVideoVideoProcessor(
            size=size, crop_size=size, do_center_crop=True, do_sample_frames=True, num_frames=4
        ),
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tiny_tokenizer(),
        chat_template=CHAT_TEMPLATE,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **kwargs,
    )


def tiny_processor(**pruning):
    from rediprune.processing_rediprune import ReDiPruneProcessor

    return _processor(ReDiPruneProcessor, pruning=pruning)


def stock_processor():
    """The stock class around the same parts."""

    class Stock(LlavaNextVideoProcessor):
        tokenizer_class = "AutoTokenizer"  # 4.57 takes Llama's alone

    return _processor(Stock)


def tiny_config(cls=None, **kwargs):
    from rediprune.configuration_rediprune import ReDiPruneConfig

    vision = CLIPVisionConfig(**VISION_SIZES)
    text = LlamaConfig(**TEXT_SIZES, max_position_embeddings=2048)
    cls = cls or ReDiPruneConfig
    of_type = cls.base_model_type if hasattr(cls, "base_model_type") else cls.model_type
    if of_type == "llava_onevision":
        vision = SiglipVisionConfig(**VISION_SIZES, vision_use_head=False)
        text = Qwen2Config(**TEXT_SIZES, max_position_embeddings=2048)
        kwargs = {"vision_aspect_ratio": "anyres_max_2", **kwargs}
    if "video" in of_type or "onevision" in of_type:
        kwargs["video_token_index"] = SPECIALS.index("<video>")
    if "next" in of_type or "onevision" in of_type:
        kwargs["image_grid_pinpoints"] = PINPOINTS
    return cls(
        vision_config=vision,
        text_config=kwargs.pop("text_config", text),
        image_token_index=SPECIALS.index("<image>"),
        **kwargs,
    )


def tiny_model(seed=0, **pruning):
    """A random model with weights large enough that its tokens differ and its logits are not flat."""
    from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration

    torch.manual_seed(seed)
    model = ReDiPruneLlavaNextVideoForConditionalGeneration(tiny_config(pruning=pruning)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def stock_twin(model, **kwargs):
    """The stock class with the same weights."""
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    twin = LlavaNextVideoForConditionalGeneration(tiny_config(LlavaNextVideoConfig, **kwargs)).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config = model.generation_config
    return twin


def save_stock_checkpoint(folder, seed=0):
    """A stock checkpoint with random weights, named as in the public ones, whichever transformers writes it."""
    from safetensors.torch import save_file

    model = stock_twin(tiny_model(seed))
    model.generation_config.max_new_tokens = 4
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    stock_processor().save_pretrained(folder)
    weights = {public_name(name): weight.clone() for name, weight in model.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def public_name(name):
    """A tensor's name in the public checkpoints of the LLaVA family, from its name in the module tree."""
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "lm_head":
        return f"language_model.lm_head.{rest}"
    if part == "language_model":
        return f"language_model.model.{rest}"
    if part.endswith("_tower"):
        return f"{part}.vision_model.{rest.removeprefix('vision_model.')}"
    return f"{part}.{rest}".rstrip(".")


def save_clip(folder, seed=0, width=16):
    """A random CLIP checkpoint with a tokenizer, whose text tower reads 12 tokens at once."""
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    start, end = tokenizer.bos_token, tokenizer.eos_token
    sizes = dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=vocabulary[start], eos_token_id=vocabulary[end], pad_token_id=vocabulary[end])
    config = CLIPConfig(
        text_config=dict(**sizes, **ids, vocab_size=len(vocabulary), hidden_size=24, max_position_embeddings=12),
        vision_config=dict(**sizes, hidden_size=width, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        projection_dim=10,
    )
    torch.manual_seed(seed)
    clip = CLIPModel(config)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.normal_()
    clip.save_pretrained(folder)
    return str(folder)


def clip_tokenizer():
    """Of CLIP's own class: every word of the tests is one token."""
    words = sorted({word.lower() for word in WORDS})
    alphabet = {piece for word in words for letter in word for piece in (letter, f"{letter}</w>")}
    merges = {}
    for word in words:
        *letters, last = word
        pieces, joined = [*letters, f"{last}</w>"], ""
        for piece in pieces:
            if joined:
                merges[joined, piece] = joined + piece
            joined += piece
    tokens = dict.fromkeys([*sorted(alphabet), *merges.values(), "<|startoftext|>", "<|endoftext|>"])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    options = {"model_max_length": 12, "model_input_names": ["input_ids", "attention_mask"]}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        return CLIPTokenizerFast.from_pretrained(folder, **options)


def random_video(seed=0, frames=4, size=(40, 48)):
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def random_image(seed=0, size=(40, 48)):
    return Image.fromarray(random_video(seed, 1, size)[0])


def write_video(path, frames, fps=10, **options):
    """An mp4 file of uint8 RGB frames (F, height, width, 3)."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey_video(frames, size=(48, 64)):
    """Frame i is of the grey 20 i, so that a decoded frame says which one it is."""
    return np.stack([np.full((*size, 3), 20 * i, dtype=np.uint8) for i in range(frames)])


def make_inputs(processor, text, **media):
    media.setdefault("padding", isinstance(text, list))
    return processor(text=text, **media)


def shown(model, inputs):
    """What the method is shown, one `VisualTokens` for each entry of each item's sets."""
    items = model.select_tokens(**inputs, return_signals=True)
    return [tokens for item in items for tokens in item.signals if tokens is not None]


def by_frame(kept, frames=4):
    """Flat kept indices of a video whose frames keep equally many, as (frames, k) indices within the frames."""
    kept = kept.unflatten(0, (frames, -1))
    return kept - kept.new_tensor(range(frames))[:, None] * POOLED
