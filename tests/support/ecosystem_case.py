"""The variant that the rows of `docs/ecosystem.md` try, and what its answers are compared with.

`python ecosystem_case.py NAME` prints what another process, or another line of transformers, makes of the same question.
"""

import copy
import json
import sys

import numpy as np
import torch
import transformers

NEW_TOKENS = 6
QUESTION = "what colour is the star?"


class Case:
    """A variant, a question, and the answer of plain generation in fp32."""

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


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    case = Case(sys.argv[1])
    logits = case.logits(case.model).tolist()
    print(json.dumps({"version": transformers.__version__, "logits": logits, "answer": case.expected}))
