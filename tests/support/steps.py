"""What the tests of publishing do in fresh processes: `python steps.py STEP '{"argument": ...}'` prints one JSON object.

A step runs under whichever transformers its interpreter has, and knows nothing of the tests' own package. `several` of them run
one after another in one process: to import torch and transformers takes longer than most steps."""

import json
import os
import sys
import zlib

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")
QUESTION = "what colour is the star ?"


def auto_classes() -> list:
    return [getattr(transformers, name) for name in AUTO_CLASSES if hasattr(transformers, name)]


def load(repo, **kwargs) -> tuple:
    model = transformers.AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **kwargs)
    return model.eval(), AutoProcessor.from_pretrained(repo, trust_remote_code=True, **kwargs)


def pixels(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def inputs_of(processor, kind, **kwargs) -> dict:
    """A question about one image or one video, both of noise."""
    content = [{"type": kind}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # Where nobody says how fast a video is, the two lines have different opinions.
    video = {"videos": [pixels(4, 32, 32, 3)], "video_metadata": [{"total_num_frames": 4, "fps": 2.0}]}
    media = {"image": {"images": [Image.fromarray(pixels(32, 32, 3))]}, "video": video}
    return processor(text=prompt, **media[kind], **kwargs)


@torch.no_grad()
def fingerprint(model, processor) -> dict:
    """What has to be the same wherever a variant was loaded: the keep ratio, the prompts, and the logits."""
    seen = {"keep_ratio": model.config.pruning.keep_ratio, "prompt": [], "logits": [], "answer": []}
    for kind in processor.placeholders:
        inputs = inputs_of(processor, kind)
        new_tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        seen["prompt"].append(zlib.crc32(inputs["input_ids"].numpy().tobytes()))
        seen["logits"] += model(**inputs).logits[0, -1][:16].tolist()
        seen["answer"] += new_tokens.tolist()
    return seen


def checksums(model) -> list:
    """Of every weight; names differ between the lines, so that the values alone say that they are the same."""
    weights = model.state_dict().values()
    return sorted([*weight.shape, zlib.crc32(weight.contiguous().numpy().tobytes())] for weight in weights)


def fails(function, *args, **kwargs) -> str:
    """Name and message of the error that the call ends in."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def pipeline_processor(repo) -> str:
    """Which class a pipeline uses, after it has answered a chat."""
    pipe = transformers.pipeline("image-text-to-text", model=repo, trust_remote_code=True, device="cpu")
    content = [{"type": "image", "image": Image.fromarray(pixels(32, 32, 3))}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    assert isinstance(pipe(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"], str)
    return type(pipe.processor).__name__


# -- steps -------------------------------------------------------------------------------------------------------------


def push(folder, repo) -> dict:
    """Pushes model and processor, an edited config, a branch and a private repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    model, processor = load(folder)
    seen = fingerprint(model, processor)
    model.push_to_hub(repo)
    processor.push_to_hub(repo)
    first = api.model_info(repo).sha
    model.config.pruning.keep_ratio = 0.5
    model.push_to_hub(repo)
    api.create_branch(repo, branch="half")
    model.config.pruning.keep_ratio = 0.75
    model.push_to_hub(repo, revision="half")
    model.push_to_hub(f"{repo}-private", private=True)
    processor.push_to_hub(f"{repo}-private", private=True)
    return {"first": first, "seen": seen, "files": sorted(api.list_repo_files(repo))}


def load_by_id(repo, first) -> dict:
    """Loads by id, by every Auto class, pinned and from a branch; a private repository without a token."""
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    classes = {}
    for auto_class in auto_classes():
        model = auto_class.from_pretrained(repo, trust_remote_code=True)
        classes[auto_class.__name__] = type(model).__name__
    private = {
        key: fails(call, f"{repo}-private", trust_remote_code=True, token=False)
        for key, call in {
            "model": transformers.AutoModelForImageTextToText.from_pretrained,
            "processor": AutoProcessor.from_pretrained,
        }.items()
    }
    parts = {
        auto_class.__name__: type(auto_class.from_pretrained(repo, trust_remote_code=True)).__name__
        for auto_class in (transformers.AutoTokenizer, transformers.AutoImageProcessor, transformers.AutoVideoProcessor)
    }
    return {
        "classes": classes,
        "parts": parts,
        "pipeline": pipeline_processor(repo),
        "config": type(config).__name__,
        "auto_map": config.auto_map,
        "main": fingerprint(*load(repo)),
        "pinned": fingerprint(*load(repo, revision=first)),
        "branch": load(repo, revision="half")[0].config.pruning.keep_ratio,
        "with token": load(f"{repo}-private")[0].config.pruning.keep_ratio,
        "private": private,
    }


def everywhere(repo) -> dict:
    """Loads a folder or a repository through everything that loads one, and does what its card shows."""
    seen = {}
    for auto_class in auto_classes():
        model = auto_class.from_pretrained(repo, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        seen[auto_class.__name__] = [type(model).__name__, fingerprint(model, processor)]
    return {
        "seen": seen,
        "config": type(AutoConfig.from_pretrained(repo, trust_remote_code=True)).__name__,
        "processor": type(processor).__name__,
        "pipeline": pipeline_processor(repo),
        "weights": checksums(model),
    }


def of_subfolder(repo, subfolder) -> dict:
    """Loads what lies in a folder of a repository through every Auto class."""
    where = {"subfolder": subfolder, "trust_remote_code": True}
    classes = [type(auto_class.from_pretrained(repo, **where)).__name__ for auto_class in auto_classes()]
    return {"classes": classes, "seen": fingerprint(*load(repo, subfolder=subfolder))}


def saved_again(repo, folder) -> dict:
    model, processor = load(repo)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again, processor = load(folder)
    return {"weights": checksums(again), "seen": fingerprint(again, processor)}


def card(folder) -> dict:
    """What the code of a card prints, run as it stands where the card and its media are."""
    import contextlib
    import io
    import re

    with open(f"{folder}/README.md", encoding="utf-8") as file:
        (code,) = re.findall(r"^```python\n(.*?)^```$", file.read(), re.MULTILINE | re.DOTALL)
    before = os.getcwd()
    os.chdir(os.path.dirname(folder))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    os.chdir(before)
    return {"printed": printed.getvalue().strip()}


def pushed(folder, repo) -> dict:
    model, processor = load(folder)
    model.push_to_hub(repo)
    processor.push_to_hub(repo)
    return everywhere(repo)


def download(repo, folder) -> dict:
    """Into a folder, and into the cache."""
    from huggingface_hub import snapshot_download

    return {"folder": snapshot_download(repo, local_dir=folder), "seen": fingerprint(*load(repo))}


def load_offline(repo, folder) -> dict:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    return {"cached": fingerprint(*load(repo)), "snapshot": fingerprint(*load(folder))}


def broken_pushes(repo) -> dict:
    """Pushes other weights, then another config, none of which arrives."""
    import time

    time.sleep = lambda seconds: None  # the client waits between its attempts
    model, processor = load(repo)
    before = fingerprint(model, processor)
    model.config.pruning.keep_ratio = 0.9
    config = fails(model.config.push_to_hub, repo)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    weights = fails(model.push_to_hub, repo)
    return {"weights": weights, "config": config, "before": before, "after": fingerprint(*load(repo))}


def push_folder_link(folder, repo) -> dict:
    from huggingface_hub import HfApi

    api = HfApi()
    model, processor = load(folder)
    result = {"loaded": fingerprint(model, processor), "linked": fails(model.push_to_hub, repo)}
    result["on the Hub before"] = api.repo_exists(repo)
    model.push_to_hub(repo, materialise=True)
    processor.push_to_hub(repo)
    again, processor = load(repo)
    return {
        **result,
        "files": sorted(api.list_repo_files(repo)),
        "weights_from": again.config.weights_from,
        "again": fingerprint(again, processor),
    }


def exports(script, cases) -> dict:
    """For each name what the export command says when it ends; a case is a token (or none) and the arguments."""
    import contextlib
    import io

    messages = {}
    sys.path.insert(0, os.path.dirname(script))
    import export

    for name, (token, arguments) in cases.items():
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                export.main([*arguments, "--no-check"])
                messages[name] = "no error"
            except SystemExit as error:
                messages[name] = f"{error.code} {stderr.getvalue()}"
    return messages


def without_network(script, cases, variant) -> dict:
    import time

    time.sleep = lambda seconds: None  # the client waits between its attempts
    return {**exports(script, cases), **load_errors({"linked": variant})}


def load_errors(cases) -> dict:
    """For each name the error that loading a repository or folder ends in."""
    auto_class = transformers.AutoModelForImageTextToText
    return {name: fails(auto_class.from_pretrained, repo, trust_remote_code=True) for name, repo in cases.items()}


def linked(repo, folder) -> dict:
    """Loads a linked variant, saves it again as it is and materialised, and loads both."""
    model, processor = load(repo)
    model.save_pretrained(f"{folder}/linked")
    processor.save_pretrained(f"{folder}/linked")
    model.save_pretrained(f"{folder}/materialised", materialise=True)
    processor.save_pretrained(f"{folder}/materialised")
    results = {"loaded": fingerprint(model, processor), "weights_from": model.config.weights_from}
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(f"{folder}/trained")
    for name in ("linked", "materialised", "trained"):
        saved, _ = load(f"{folder}/{name}") if name != "trained" else (None, None)
        results[name] = {
            "weights": any(file.endswith(".safetensors") for file in os.listdir(f"{folder}/{name}")),
            "fingerprint": fingerprint(saved, processor) if saved is not None else None,
        }
    return results


def pins(folders, again) -> dict:
    """For each name the warnings of loading a linked variant, and its revision, as loaded and as saved again."""
    import logging

    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    results = {}
    for name, folder in folders.items():
        messages.clear()
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        model.save_pretrained(f"{again}/{name}")
        with open(f"{again}/{name}/config.json") as file:
            saved = json.load(file).get("weights_revision")
        results[name] = {"warnings": [*messages], "loaded": model.config.weights_revision, "saved": saved}
        results[name]["weights"] = "model.safetensors" in os.listdir(f"{again}/{name}")
    return results


def linked_offline(repo) -> dict:
    return fingerprint(*load(repo))


def several(steps) -> dict:
    """What each step of {name: (step, its arguments)} gives, by its name."""
    return {name: run(step, arguments) for name, (step, arguments) in steps.items()}


def run(step, arguments) -> dict:
    return globals()[step](**arguments)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(sys.argv[2]))))
