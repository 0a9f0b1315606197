"""`python true_size.py REPORT`: forward passes through the shapes of the 7B model, and what they took."""

import json
import resource
import sys
from pathlib import Path

import code_package  # noqa: F401
import numpy as np
import torch
import transformers
from PIL import Image
from places import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextVideoVideoProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(ROOT / "scripts"))
from rediprune.processing_rediprune import ReDiPruneProcessor  # noqa: E402
from shapes import SHAPES, random_model, shape_config  # noqa: E402

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def build_processor(config) -> ReDiPruneProcessor:
    """The published preprocessing around a tokenizer with the published ids of the placeholders."""
    words = {
        "<unk>": 0,
        "where": 1,
        "is": 2,
        "it": 3,
        "<image>": config.image_token_index,
        "<video>": config.video_token_index,
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"height": 336, "width": 336}
    return ReDiPruneProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": 336}, crop_size=size, do_center_crop=True),
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 336}, crop_size=size, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<image>", "<video>"]
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def measure(model, inputs, token_id) -> dict:
    projected = []
    projector = model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda module, args: projected.append(args[0].flatten(0, -2).shape[0]))
    outputs = model(**inputs.to(torch.bfloat16), logits_to_keep=1, use_cache=False)
    handle.remove()
    kept = outputs.get("video_kept_indices")
    return {
        "placeholders": int((inputs["input_ids"] == token_id).sum()),
        "projected": sum(projected),
        "kept": None if kept is None else list(kept[0].shape),
        "logits": list(outputs.logits.shape),
        "finite": bool(outputs.logits.isfinite().all()),
    }


@torch.no_grad()
def main(report: str) -> None:
    config = shape_config(SHAPES["llava-next-video-7b"], layers=2)
    model, processor = random_model(config), build_processor(config)
    generator = np.random.default_rng(0)
    video = generator.integers(0, 256, (8, 336, 336, 3), dtype=np.uint8)
    result = {
        "token_ids": [config.image_token_id, config.video_token_id],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    media = {"text": "<video> where is it", "videos": video}
    unpruned = processor(**media, keep_ratio=1)["input_ids"]
    result["unpruned"] = {"placeholders": int((unpruned == config.video_token_id).sum())}
    for name, pooling in (("pooled", True), ("unpooled", False)):
        model.config.pruning = {"video_pooling": pooling}
        processor.pruning = model.config.pruning
        result[name] = measure(model, processor(**media), config.video_token_id)
    image = Image.fromarray(generator.integers(0, 256, (336, 672, 3), dtype=np.uint8))
    inputs = processor(text="<image> where is it", images=image)
    result["image"] = measure(model, inputs, config.image_token_id)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(report).write_text(json.dumps(result))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(sys.argv[1])
