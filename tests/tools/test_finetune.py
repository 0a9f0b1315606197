"""Fine-tuning: what a batch asks the model for, and runs that are stopped and go on."""

import json
import sys

import finetune
import pytest
import torch
from families import FAMILIES
from finetune import IGNORED, Collator, Lines, World, read_samples
from tiny import random_image, random_video

FAMILY = FAMILIES[0]
SAMPLES = [
    {"question": "what colour is the star ?", "answer": "red"},
    {"question": "where ?", "answer": "left top"},
]
MEDIA = {"image": random_image, "video": random_video}
CASES = [pytest.param(family, kind, id=f"{family.name}-{kind}") for family in FAMILIES for kind in family.kinds]


def samples_of(kind):
    return [{**sample, kind: MEDIA[kind](seed)} for seed, sample in enumerate(SAMPLES)]


@pytest.mark.parametrize("family, kind", CASES)
def test_labels_are_the_answers_alone(family, kind):
    processor = family.processor(keep_ratio=0.25)
    batch = Collator(processor)(samples_of(kind))
    tokenizer = processor.tokenizer
    for row, sample in enumerate(SAMPLES):
        labels = batch["labels"][row]
        is_answer = labels != IGNORED
        answer = [*tokenizer(sample["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert labels[is_answer].tolist() == answer == batch["input_ids"][row][is_answer].tolist()
        assert batch["attention_mask"][row][is_answer].all()
        before = batch["input_ids"][row][: int(is_answer.nonzero()[0])]
        assert "ASSISTANT :" in tokenizer.decode(before[-2:]) or "ASSISTANT" in tokenizer.decode(before)
        assert not batch["attention_mask"][row][int(is_answer.nonzero()[-1]) + 1 :].any()
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape


@torch.no_grad()
def test_a_batch_keeps_what_generation_keeps_and_its_loss_is_that_of_its_rows():
    """The answer must not choose tokens, and padding must not count."""
    model, processor = FAMILY.model(keep_ratio=0.25), FAMILY.processor(keep_ratio=0.25)
    collator, samples = Collator(processor), samples_of("image")
    output = model(**collator(samples))
    losses, counts = [], []
    for sample, kept in zip(samples, output.image_kept_indices):
        prompt = processor(text=collator.prompt(sample), images=sample["image"])
        assert torch.equal(model(**prompt).image_kept_indices[0], kept)
        losses.append(model(**collator([sample])).loss * len(collator.answer(sample)))
        counts.append(len(collator.answer(sample)))
    torch.testing.assert_close(output.loss, sum(losses) / sum(counts))


def test_the_ratio_of_the_collator_is_that_of_its_batches():
    processor = FAMILY.processor(keep_ratio=0.25)
    few, many = (Collator(processor, ratio)(samples_of("image"))["input_ids"].shape[1] for ratio in (None, 1.0))
    assert few < many


def test_an_answer_is_spaced_as_the_template_does(processor):
    collator = Collator(processor)
    sample = samples_of("video")[0]
    processor_without_answers = FAMILY.processor()
    processor_without_answers.chat_template = "{% if add_generation_prompt %}USER: <image> ASSISTANT:{% endif %}"
    with pytest.raises(ValueError, match="the chat template writes an answer as '', which does not go on from"):
        Collator(processor_without_answers).answer(samples_of("image")[0])
    assert processor.tokenizer.decode(collator.answer(sample)).split() == ["red", "</s>"]


def test_the_world_does_not_repeat_itself_and_leaves_out_what_is_measured():
    world = World("image", 3)
    first, again, other = world.batch(5, 4), World("image", 3).batch(5, 4), world.batch(6, 4)
    assert all((a["image"] == b["image"]).all() and a["answer"] == b["answer"] for a, b in zip(first, again))
    assert any(a["image"].shape != b["image"].shape or (a["image"] != b["image"]).any() for a, b in zip(first, other))


def write_lines(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_line_is_seen_once_in_an_epoch(tmp_path):
    path = write_lines(tmp_path / "x", [{"image": f"{n}.png", "question": "q", "answer": str(n)} for n in range(10)])
    lines = Lines(path, 0)
    assert [sample["answer"] for sample in lines.held_out()] == ["8", "9"]
    seen = [sample["answer"] for step in range(4) for sample in lines.batch(step, 4)]
    assert sorted(seen[:8]) == sorted(seen[8:]) == list("01234567") and seen[:8] != seen[8:]
    assert lines.batch(0, 1)[0]["image"] == str(tmp_path / f"{seen[0]}.png")


GOOD = {"image": "a.png", "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    "line", ["{", "[]", {"image": "a.png", "question": "q"}, {**GOOD, "video": "b"}, {**GOOD, "answer": 5}, "null"]
)
def test_a_line_that_is_no_sample(tmp_path, line):
    with pytest.raises(ValueError, match='x, line 2: must be {"video": "clip.mp4", "question"'):
        read_samples(write_lines(tmp_path / "x", [GOOD, line]))


def run(*arguments):
    finetune.main([*map(str, arguments)])


@pytest.fixture
def variant(tmp_path):
    pytest.importorskip("peft", reason="needs the adapter library: pip install -r requirements-ecosystem.txt")
    model, processor = FAMILY.model(keep_ratio=0.25), FAMILY.processor(keep_ratio=0.25)
    model.save_pretrained(tmp_path / "variant")
    processor.save_pretrained(tmp_path / "variant")
    return tmp_path / "variant"


@pytest.mark.gradients
def test_a_run_that_was_stopped_ends_as_one_that_was_not(variant, tmp_path, capsys):
    arguments = ("--model", variant, "--batch-size", 2, "--dtype", "float32", "--save-every", 2)
    run(*arguments, "--output", tmp_path / "whole", "--steps", 4)
    assert "loss on held-out questions" in capsys.readouterr().out
    run(*arguments, "--output", tmp_path / "parts", "--steps", 2)
    run(*arguments, "--output", tmp_path / "parts", "--steps", 4)
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert all(torch.equal(weight, parts["weights"][name]) for name, weight in whole["weights"].items())
    assert any(weight.any() for name, weight in whole["weights"].items() if "lora_B" in name)
    with pytest.raises(SystemExit, match="holds a run with other arguments .*batch_size was 2"):
        run(*arguments, "--output", tmp_path / "parts", "--batch-size", 3)


def test_what_is_missing_is_a_message(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="fine-tuning needs PEFT: pip install peft"):
        run("--output", tmp_path)
