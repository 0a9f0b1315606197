"""Rows of `docs/ecosystem.md`: adapters that are trained while tokens are pruned."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT


@pytest.mark.ecosystem("LoRA on pruned inputs (PEFT)")
def test_lora(case, note, tmp_path):
    note(train_adapter(case, tmp_path))


@pytest.mark.ecosystem("LoRA on a linked variant (PEFT)")
def test_lora_linked(case, note, tmp_path):
    """The variant holds no weights: those of `case` are linked."""
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in Path(case.folder).iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "weights_from": os.path.abspath(case.folder)}))
    linked = copy.copy(case)
    linked.folder = str(folder)
    note(train_adapter(linked, tmp_path))


def train_adapter(case, folder) -> str:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(case.load(), config)
    inputs = dict(case.inputs)
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    trained = case.logits(model.eval())
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(case.load(), folder / "adapter")
    difference = (case.logits(again.eval()) - trained).abs().max().item()
    assert difference <= 1e-5, f"the adapter's logits change by {difference} when it is reloaded"
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in 5 steps; the adapter reloads with the same logits"


@pytest.mark.slow
@pytest.mark.ecosystem("LoRA by `scripts/finetune.py`, stopped and gone on with", families=False)
def test_finetune(case, note, tmp_path):
    peft = pytest.importorskip("peft")
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--model", case.folder, "--output", str(tmp_path)]
    command += ["--batch-size", "2", "--dtype", "float32", "--threads", "1", "--save-every", "2", "--steps"]
    for steps in ("2", "4"):
        result = subprocess.run([*command, steps], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr.strip()[-300:]
    adapted = peft.PeftModel.from_pretrained(case.load(), tmp_path).eval()
    assert not torch.equal(case.logits(adapted), case.logits(case.model)), "the adapter changes nothing"
    note(result.stdout.splitlines()[-1].partition(";")[0])
