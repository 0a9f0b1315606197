"""The variant that `check_ecosystem.py` takes through the tools around transformers, and what its answers are compared with."""

import copy
import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from repository import ROOT, code_module

sys.path.insert(0, str(ROOT / "tests" / "support"))
NEW_TOKENS = 6
QUESTION = "what colour is the star?"


@contextmanager
def variant_folder(model: str, family, method):
    """
    The folder of a variant.

    Args:
        model: a folder, which is not written to.
        family: instead of it, a small random model of this family.
        method: instead of its own pruning method; `None` leaves it.
    """
    if family is None and method is None:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="variant_") as folder:
        if family is None:
            for path in Path(model).iterdir():
                if path.is_file():
                    shutil.copyfile(path, Path(folder, path.name))
        else:
            save_random(family, folder)
        if method is not None:
            config = json.loads(Path(folder, "config.json").read_text())
            config["pruning"] = {"method": method, "keep_ratio": config["pruning"]["keep_ratio"]}
            Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


def families() -> dict:
    """Every family by its name, as the tests build it."""
    code_module("configuration_rediprune")  # makes the code files a package, which the next import needs
    from families import FAMILIES

    return {family.name: family for family in FAMILIES}


def save_random(name: str, folder: str) -> None:
    family = families()[name]
    model, processor = family.model(keep_ratio=0.25), family.processor(keep_ratio=0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25 if parameter.dim() > 1 else 1)  # the tests' are so large that rounding changes all
    words = range(6, len(processor.tokenizer))  # the rest of the vocabulary decodes to nothing
    model.generation_config.suppress_tokens = [
        token for token in range(model.config.text_config.vocab_size) if token not in words
    ]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


class Case:
    """The variant that is tried, a question, and the answer of plain generation in fp32."""

    def __init__(self, folder: str):
        self.folder = folder
        self.processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.inputs = question_inputs(self.processor)
        self.model = self.load()
        self.expected = self.answer(self.model)

    def load(self, **kwargs):
        kwargs.setdefault("dtype", torch.float32)
        auto_class = transformers.AutoModelForImageTextToText
        model = auto_class.from_pretrained(self.folder, trust_remote_code=True, **kwargs).eval()
        model.generation_config.eos_token_id = -1  # all answers are of one length
        return model

    def answer(self, model, **kwargs) -> list:
        inputs = self.inputs_for(model)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def same(self, model, **kwargs) -> str:
        """Says that the answer is that of plain generation, or raises."""
        found = self.answer(model, **kwargs)
        if found != self.expected:
            raise AssertionError(f"answers {found} instead of {self.expected}")
        return "same answer as plain generation"

    @torch.no_grad()
    def logits(self, model) -> torch.Tensor:
        return model(**self.inputs_for(model)).logits[0, -1].float()

    def inputs_for(self, model):
        return copy.copy(self.inputs).to(model.device, model.dtype)  # which changes what it is called on

    def close(self, model, limit: float) -> str:
        """Says how far the logits are from those of fp32, or raises."""
        expected = self.logits(self.model)
        difference = ((self.logits(model) - expected).norm() / expected.norm()).item()
        if not difference < limit:
            raise AssertionError(f"logits differ by {difference:.2%}")
        return f"logits within {difference:.2%} of fp32"


def question_inputs(processor, seed: int = 0):
    """A question about noise: a video of 4 frames where the family takes videos, else an image."""
    frames = np.random.default_rng(seed).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    kind, media = (
        ("video", {"videos": [frames]}) if "video" in processor.placeholders else ("image", {"images": frames[0]})
    )
    content = [{"type": kind}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, **media, return_tensors="pt")
