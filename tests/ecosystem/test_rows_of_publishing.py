"""Rows of `docs/ecosystem.md`: a variant that is served, and one that is published and loaded by the other line of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from ecosystem_case import NEW_TOKENS, QUESTION
from hub_server import Hub
from places import ROOT, SUPPORT
from tiny import random_image, random_video, write_video

pytestmark = pytest.mark.slow


@pytest.mark.ecosystem("`transformers serve` with an OpenAI client; media as data URLs", families=False)
def test_serve(case, note, tmp_path):
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 serves no images and videos")
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package)
    from serving import Server, part_of

    files = {"image": tmp_path / "image.png", "video": tmp_path / "video.mp4"}
    random_image().save(files["image"])
    write_video(files["video"], random_video(frames=12))
    lengths = []
    with Server(tmp_path / "log") as server:
        for kind in case.processor.placeholders:
            content = [part_of(files[kind]), {"type": "text", "text": QUESTION}]
            text, length = server.ask(case.folder, content, NEW_TOKENS)
            streamed, _ = server.ask(case.folder, content, NEW_TOKENS, stream=True)
            assert streamed == text, f"the streamed answer {streamed!r} is not the whole one {text!r}"
            lengths.append(f"{kind}: prompt of {length} tokens")
    note(f"the same answer in one piece and streamed; {', '.join(lengths)}")


@pytest.fixture
def hub(case, tmp_path):
    """Variables of the environment for a Hub on loopback that holds `me/stock`, what the variant was made from."""
    with Hub() as hub:
        hub.add_token("hf_me", "me")
        hub.add_repository("me/stock", stock_files(case))
        home = str(tmp_path / "home")
        yield {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}


@pytest.mark.ecosystem("exported by `--copy` and `--link`, pushed, loaded by id on the other version", families=False)
@pytest.mark.skipif(not os.environ.get("OTHER_PYTHON"), reason="OTHER_PYTHON names no interpreter")
def test_published(case, note, hub, tmp_path):
    """On a Hub of this process; everything else happens in fresh ones."""
    for name in ("copy", "link"):
        export(case, name, tmp_path / name, hub)
        found = load_elsewhere(f"me/{name}", {**hub, "HF_HOME": str(tmp_path / f"{name}-elsewhere")})
        difference = (torch.tensor(found["logits"]) - case.logits(case.model)).abs().max().item()
        same = found["answer"] == case.expected and difference <= 1e-4
        assert same, f"{name}: answers {found['answer']} instead of {case.expected}; logits differ by {difference}"
        size = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        equal = "bit for bit" if difference == 0 else f"within {difference:.0e}"
        note(f"`--{name}` is {size / 1e6:.2f} MB, and on {found['version']} answers the same, its logits {equal}")


def export(case, name: str, folder: Path, variables: dict) -> None:
    pruning = case.model.config.pruning
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), "me/stock", f"--{name}"]
    command += ["--method", pruning.method, "--keep-ratio", str(pruning.keep_ratio)]
    run_fresh([*command, "--output", str(folder), "--push-to-hub", f"me/{name}"], variables)


def load_elsewhere(name: str, variables: dict) -> dict:
    """Version, logits and answer of a variant that the other line loads by its id, with a cache of its own."""
    command = [os.environ["OTHER_PYTHON"], str(SUPPORT / "ecosystem_case.py"), name]
    return json.loads(run_fresh(command, variables).splitlines()[-1])


def run_fresh(command: list, variables: dict) -> str:
    """What the command prints, in an environment without settings of the Hub other than `variables`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(command, capture_output=True, text=True, env={**own, **variables})
    assert result.returncode == 0, result.stderr.strip()[-300:]
    return result.stdout


def stock_files(case) -> dict:
    """The variant as the stock checkpoint that it was made from; the content of its files by name."""
    endings = (".json", ".jinja", ".safetensors")
    files = {path.name: path.read_bytes() for path in Path(case.folder).iterdir() if path.suffix in endings}
    config, processor = (json.loads(files[name]) for name in ("config.json", "processor_config.json"))
    for values in (config, processor):
        values.pop("auto_map")
    config.pop("pruning")
    config |= {"model_type": case.model.config.base_model_type, "architectures": [stock_name(case.model)]}
    processor["processor_class"] = stock_name(case.processor)
    changed = {"config.json": config, "processor_config.json": processor}
    return files | {name: json.dumps(values).encode() for name, values in changed.items()}


def stock_name(thing) -> str:
    return next(cls.__name__ for cls in type(thing).__mro__ if cls.__module__.startswith("transformers.models."))
