"""`python true_size.py FAMILY REPORT`: forward passes through the widths of a family's 7B model, and what they took."""

import json
import resource
import sys
from pathlib import Path

import code_package  # noqa: F401
import numpy as np
import torch
import transformers
from families import FAMILIES, MARKS
from PIL import Image
from places import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT / "scripts"))
from benchmarking.shapes import SHAPES, random_model, shape_config  # noqa: E402

FRAMES = 8
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
RATIOS = (1, 0.15, 0.1)  # for which placeholders are counted
# Forward passes: kind, keep ratio, and what is changed in the pruning block.
RUNS = {
    "llava": [("image", 0.1, {})],
    "llava_next": [("image", 0.1, {})],
    "llava_next_video": [
        ("image", 0.15, {}),
        ("video", 0.15, {}),
        ("video", 0.15, {"video_pooling": False}),
    ],
    "llava_onevision": [("image", 0.1, {}), ("video", 0.15, {}), ("video", 0.1, {"video_pooling": False})],
    "video_llava": [("image", 0.1, {}), ("video", 0.1, {})],
    "qwen2_5_vl": [("image", 0.1, {}), ("video", 0.15, {})],
    "qwen3_vl": [("image", 0.1, {}), ("video", 0.15, {})],
}
TOKENS = {
    "image": 32000,
    "video": 32001,
}  # of the published checkpoints, but for LLaVA-NeXT-Video, which has them swapped


VOCABULARY = 1024


def build_config(family):
    """The published widths with few layers: one of the language model, and of the tower as many as differ from one another."""
    for shape in SHAPES.values():
        if shape.family == family.name:
            # Of Qwen2.5-VL's layers each eighth sees all patches; Qwen3-VL hands on those of three.
            vision_layers = {"qwen2.5": 8, "qwen3": 9}.get(shape.vision, 2)
            return shape_config(shape, layers=1, vision_layers=vision_layers)
    config = shape_config(SHAPES["llava-next-video-7b"], layers=1, vision_layers=2)
    parts = {"text_config": config.text_config, "vision_config": config.vision_config}
    if family.name == "video_llava":
        parts["vision_config"].image_size = 224
    if family.name == "llava_next":
        parts["image_grid_pinpoints"] = PINPOINTS
    return family.config_class(**parts, **{f"{kind}_token_index": TOKENS[kind] for kind in family.kinds})


def cut_vocabulary(family, config):
    """A few words instead of up to 152064, which would be most of the memory: placeholders get ids below `VOCABULARY`."""
    marks = ["vision_start", "vision_end"] if family.has_mrope else []
    for number, name in enumerate([*family.kinds, *marks], start=VOCABULARY - 10):
        setattr(config, f"{name}_token_id", number)
    config.text_config.vocab_size = VOCABULARY


def build_processor(family, config):
    """The published preprocessing around a tokenizer with the ids of the config."""
    words = {"<unk>": 0, "where": 1, "is": 2, "it": 3}
    marks = {f"<{kind}>": getattr(config, f"{kind}_token_id") for kind in family.kinds}
    if family.has_mrope:
        ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        marks = dict(zip(MARKS, ids))
    words |= marks
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=list(marks)
    )
    if family.has_mrope:
        options = {"patch_size": config.vision_config.patch_size}
        parts = {"image_processor": family.image_processor_class(**options), "tokenizer": tokenizer}
        return family.processor_class(**parts, video_processor=family.video_processor_class(**options))
    side = config.vision_config.image_size
    options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pinpoints = {"image_grid_pinpoints": PINPOINTS} if "next" in family.name else {}
    sizes = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family.name == "llava_onevision":
        options, sizes = {"size": options["crop_size"]}, {"vision_feature_select_strategy": "full"}
    parts = {"image_processor": family.image_processor_class(**options, **pinpoints)}
    if "video" in family.kinds:
        crop = {"do_center_crop": True} if "crop_size" in options else {}
        parts["video_processor"] = family.video_processor_class(**options, **crop)
    return family.processor_class(**parts, tokenizer=tokenizer, **sizes)


def measure(model, inputs) -> dict:
    projected = []
    projector = getattr(model.model, "multi_modal_projector", torch.nn.Identity())  # Qwen's is a part of its tower
    handle = projector.register_forward_pre_hook(lambda module, args: projected.append(args[0].flatten(0, -2).shape[0]))
    outputs = model(**inputs, logits_to_keep=1, use_cache=False)
    handle.remove()
    kept = outputs.get("video_kept_indices") or outputs.get("image_kept_indices")
    return {
        "projected": sum(projected),
        "kept": list(kept[0].shape),
        "logits": list(outputs.logits.shape),
        "finite": bool(outputs.logits.isfinite().all()),
    }


@torch.no_grad()
def main(name: str, report: str) -> None:
    (family,) = [family for family in FAMILIES if family.name == name]
    config = build_config(family)
    published = [getattr(config, f"{kind}_token_id") for kind in family.kinds]
    cut_vocabulary(family, config)
    # In float32: a CPU that has no bfloat16 of its own takes fifteen times as long for that.
    model, processor = random_model(config, torch.float32), build_processor(family, config)
    generator, side = np.random.default_rng(0), getattr(config.vision_config, "image_size", 336)
    media = {
        "image": Image.fromarray(generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)),
        "video": generator.integers(0, 256, (FRAMES, side, side, 3), dtype=np.uint8),
    }
    tokens = {kind: getattr(config, f"{kind}_token_id") for kind in family.kinds}
    result = {
        "token_ids": published,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "counts": {},
        "runs": [],
    }

    def prepare(kind, keep_ratio):
        inputs = processor(
            text=family.written(f"<{kind}> where is it"), **{f"{kind}s": media[kind]}, keep_ratio=keep_ratio
        )
        return inputs, int((inputs["input_ids"] == tokens[kind]).sum())

    for kind in family.kinds:
        result["counts"][kind] = [prepare(kind, keep_ratio)[1] for keep_ratio in RATIOS]
    for kind, keep_ratio, block in RUNS[name]:
        model.config.pruning = block
        processor.pruning = model.config.pruning
        inputs, placeholders = prepare(kind, keep_ratio)
        result["runs"].append({"placeholders": placeholders, **measure(model, inputs)})
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(report).write_text(json.dumps(result))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(*sys.argv[1:])
