"""The trained checkpoint as a folder that transformers 4.57 and 5.x read with their stock classes."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from training.pixels import IMAGE_MEAN, IMAGE_STD
from training.tokenizing import BOS, EOS, PAD
from transformers import GenerationConfig

# What the files of image and video processors have in common.
PIXELS = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "do_convert_rgb": True,
}


def public_layout(family, model) -> dict[str, torch.Tensor]:
    """The weights under the names of the family's public checkpoints, float32."""
    weights = {}
    for name, weight in model.state_dict().items():
        own = next(prefix for prefix in family.public_names if name.startswith(prefix))
        weights[family.public_names[own] + name.removeprefix(own)] = weight.float().contiguous()
    return weights


def export(family, model, tokenizer: Tokenizer, output: Path) -> None:
    """Writes weights, config, tokenizer and processor files into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    text = model.config.text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids, do_sample=False, max_new_tokens=16).save_pretrained(output)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = "float32"
    model.config.save_pretrained(output)
    config = output / "config.json"
    write_json(config, family.published_config(json.loads(config.read_text())))
    save_file(public_layout(family, model), output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"))
    processor_class = {"processor_class": family.processor_class}
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    others = {"additional_special_tokens": list(family.special_tokens[3:])}
    write_json(output / "tokenizer_config.json", tokenizer_config(family, tokenizer, named | others) | processor_class)
    write_json(output / "special_tokens_map.json", named | others)
    for name, content in family.processor_files().items():
        write_json(output / name, content | processor_class)
    if family.chat_template is not None:
        (output / "chat_template.jinja").write_text(family.chat_template)


def tokenizer_config(family, tokenizer: Tokenizer, tokens: dict) -> dict:
    """Written by hand: the class name that 5.x writes is unknown to 4.57."""
    return tokens | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": family.max_length,
        "padding_side": "left",
        "model_input_names": [
            "input_ids",
            "attention_mask",
        ],  # 4.57 gives types of tokens, too, which not every model takes
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in family.special_tokens
        },
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
