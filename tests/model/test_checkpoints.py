"""The trained checkpoints of this repository: small, without code of their own, reached by `subfolder`, and right about the samples."""

import json

import pytest
import torch
import transformers
from places import ROOT

SAMPLES = ROOT / "samples"
QUESTIONS = json.loads((SAMPLES / "questions.json").read_text())
NAMES = ["", *(f"checkpoints/{folder.name}" for folder in sorted((ROOT / "checkpoints").iterdir()) if folder.is_dir())]
SUBFOLDERS = NAMES[1:]


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    where = {"subfolder": request.param, "trust_remote_code": True}
    model = transformers.AutoModelForImageTextToText.from_pretrained(ROOT, **where)
    return model.eval(), transformers.AutoProcessor.from_pretrained(ROOT, **where)


def inputs_of(processor, name, question, **kwargs):
    kind = "video" if name.endswith(".mp4") else "image"
    content = [{"type": kind}, {"type": "text", "text": question}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=chat, **{f"{kind}s": [str(SAMPLES / name)]}, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_small(name):
    assert (ROOT / name / "model.safetensors").stat().st_size < 10 * 2**20


@pytest.mark.parametrize("name", SUBFOLDERS)
def test_a_folder_has_no_code_and_names_that_of_the_root(name):
    files = [path.name for path in (ROOT / name).iterdir()]
    assert not [file for file in files if file.endswith(".py")] and "training_log.jsonl" in files
    config = json.loads((ROOT / name / "config.json").read_text())
    assert config["pruning"]["method"] == "rediprune_plus"
    for reference in config["auto_map"].values():
        module, _, attribute = reference.partition(".")
        assert f"class {attribute}(" in (ROOT / f"{module}.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ratio, least", [(1.0, 0.9), (0.25, 0.8)])
@torch.inference_mode()
def test_it_answers_the_sample_questions(loaded, ratio, least):
    model, processor = loaded
    right = []
    for name, questions in QUESTIONS.items():
        for question in questions:
            inputs = inputs_of(processor, name, question["question"], keep_ratio=ratio)
            output = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            right.append(processor.decode(output, skip_special_tokens=True).strip() == question["answer"])
    assert sum(right) >= least * len(right), f"{sum(right)} of {len(right)} right"


@torch.inference_mode()
@pytest.mark.parametrize("name", ["video-1.mp4", "image-1.png"])
def test_at_a_ratio_of_one_it_is_the_stock_model(loaded, name):
    model, processor = loaded
    stock_class = next(cls for cls in type(model).__mro__[1:] if cls.__module__.startswith("transformers.models."))
    stock = stock_class(model.config).eval()
    stock.load_state_dict(model.state_dict())
    inputs = inputs_of(processor, name, "what colour is the square?", keep_ratio=1.0)
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
