"""Compares a variant with the checkpoint that it was made from: at keep ratio 1 their logits must be the same.

Both are loaded one after the other, so memory for one of them is enough.

Examples:
    python scripts/check_variant.py my-variant --base llava-hf/LLaVA-NeXT-Video-7B-hf
    python scripts/check_variant.py me/name --base checkpoints/mine --device cuda
"""

import argparse
import gc
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from repository import code_module, fail

configuration = code_module("configuration_rediprune")
untrusted = code_module("hub_untrusted")

QUESTION = "What is this?"


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="folder or Hub id")
    parser.add_argument("--base", required=True, help="folder or Hub id of the stock checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser.parse_args(argv)


def prepare(processor, keep_ratio=None) -> dict:
    """One prompt with an image and, where the family takes videos, one with a video of two frames, both of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 336, 336, 3), dtype=np.uint8)
    media = {"image": {"images": [Image.fromarray(noise[0])]}, "video": {"videos": [noise]}}
    inputs = {}
    for kind in processor.placeholders:
        messages = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs[kind] = processor(text=prompt, keep_ratio=keep_ratio, return_tensors="pt", **media[kind])
    return inputs


@torch.inference_mode()
def logits_of(model, inputs: dict, device: str) -> dict:
    model = model.to(device).eval()
    last = {kind: model(**batch.to(device, model.dtype)).logits[:, -1].float().cpu() for kind, batch in inputs.items()}
    for kind, logits in last.items():
        if not torch.isfinite(logits).all():
            fail(f"the {kind} prompt gives logits that are not finite")
    return last


def load_base(place: str, dtype: torch.dtype):
    """The base in the stock class, without running anything that it brings along, and the information on its loading."""
    source = str(Path(place).resolve()) if Path(place).is_dir() else place
    values, commit = untrusted.read_config(source)
    config_class, model_class = stock_classes(values.get("model_type"))
    files = untrusted.weight_files(source, **({"revision": commit} if commit else {}))
    return model_class.from_pretrained(
        untrusted.link_files(files),
        config=config_class.from_dict(values),
        generation_config=transformers.GenerationConfig(),
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )


def stock_classes(model_type) -> list:
    """Config and model class of transformers for a base of this type."""
    if model_type not in configuration.CONFIGS:
        raise ValueError(
            f"--base is a model of type {model_type!r}, but variants are made of {', '.join(configuration.CONFIGS)}"
        )
    own_config = configuration.CONFIGS[model_type]
    own_model = getattr(code_module(own_config.model_file), own_config.model_class)
    is_stock = lambda cls: cls.__module__.startswith("transformers.")  # noqa: E731
    return [next(filter(is_stock, own.__mro__)) for own in (own_config, own_model)]


def main(argv=None):
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    try:
        processor = transformers.AutoProcessor.from_pretrained(args.variant, trust_remote_code=True)
        auto_class = transformers.AutoModelForImageTextToText
        model = auto_class.from_pretrained(args.variant, trust_remote_code=True, dtype="auto")
        found = logits_of(model, prepare(processor, keep_ratio=1.0), args.device)
        logits_of(model, prepare(processor), args.device)  # and as its config.json says
        dtype = model.dtype
        del model
        gc.collect()
        base, info = load_base(args.base, dtype)
        if info["missing_keys"]:
            fail(
                f"the stock class of transformers {transformers.__version__} does not read {args.base}: it lacks "
                f"{len(info['missing_keys'])} tensors, among them {sorted(info['missing_keys'])[0]}; use another version"
            )
        inputs = prepare(processor, keep_ratio=1.0)
        for batch in inputs.values():
            batch.pop("keep_ratio")
        expected = logits_of(base, inputs, args.device)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    differences = {kind: (found[kind] - expected[kind]).abs().max().item() for kind in found}
    if any(differences.values()):
        fail(f"at keep ratio 1 the logits of {args.variant} differ from those of {args.base} by {differences}")
    print(f"at keep ratio 1 the logits are those of the base, bit for bit ({' and '.join(differences)} prompt)")


if __name__ == "__main__":
    main()
