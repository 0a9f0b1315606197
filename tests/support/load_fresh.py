"""`python load_fresh.py FOLDER INPUTS REPORT`: loads a saved folder through every Auto class, edits it and saves it again.

Writes one JSON object to REPORT. Runs in a process of its own, so that nothing of the repository is imported but what transformers
imports from the folder.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
torch.set_grad_enabled(False)
folder, inputs, report = sys.argv[1:]
saved = torch.load(inputs)
inputs, logits = saved["inputs"], saved["logits"]
trust = {"trust_remote_code": True}

config = transformers.AutoConfig.from_pretrained(folder, **trust)
processor = transformers.AutoProcessor.from_pretrained(folder, **trust)
assert processor.pruning.to_dict() == config.pruning.to_dict()
assert transformers.AutoTokenizer.from_pretrained(folder).vocab_size == processor.tokenizer.vocab_size

loaded = []
for name in (
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    "AutoModelForMultimodalLM",
):
    if hasattr(transformers, name):
        model = getattr(transformers, name).from_pretrained(folder, **trust).eval()
        assert torch.equal(model(**inputs).logits, logits), name
        assert "rediprune" in type(model).__module__ and type(model).__module__.startswith("transformers_modules.")
        loaded.append(name)

other = transformers.AutoModelForImageTextToText.from_pretrained(folder, pruning={"keep_ratio": 0.6}, **trust)
other_processor = transformers.AutoProcessor.from_pretrained(folder, pruning={"keep_ratio": 0.6}, **trust)
assert other_processor.pruning.keep_ratio == 0.6
fresh = transformers.AutoModelForImageTextToText.from_config(config, **trust)
assert fresh.config.pruning.keep_ratio == config.pruning.keep_ratio

model.config.pruning.keep_ratio = 0.8
again = folder + "_again"
model.save_pretrained(again)
processor.save_pretrained(again)
reloaded = transformers.AutoModelForImageTextToText.from_pretrained(again, **trust).eval()
reprocessor = transformers.AutoProcessor.from_pretrained(again, **trust)
assert reprocessor.pruning.keep_ratio == 0.8
ratios = {
    "file": config.pruning.keep_ratio,
    "argument": other.config.pruning.keep_ratio,
    "saved again": reloaded.config.pruning.keep_ratio,
}
Path(report).write_text(json.dumps({"loaded": loaded, "keep_ratio": ratios}))
