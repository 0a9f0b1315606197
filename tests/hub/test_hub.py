"""Variants on a Hub: pushed, loaded by id, pinned, private, offline, broken off, linked. Every step runs in a fresh process.

Steps that cross transformers 4.57 and 5.x need the other line's interpreter in the environment variable OTHER_PYTHON.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import export
import pytest
from code_package import code_files
from hub_server import Hub
from places import ROOT, SUPPORT
from rediprune.configuration_rediprune import ReDiPruneConfig
from tiny import save_stock_checkpoint

pytestmark = [pytest.mark.hub, pytest.mark.slow]
OTHER_PYTHON = os.environ.get("OTHER_PYTHON")
needs_other = pytest.mark.skipif(not OTHER_PYTHON, reason="OTHER_PYTHON does not name the other line's interpreter")
AUTO_KEYS = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForVision2Seq",
    "AutoProcessor",
}


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.add_token("hf_me", "me")
        hub.add_token("hf_reader", "me", write=False)
        yield hub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_stock_checkpoint(tmp_path_factory.mktemp("stock") / "tiny-stock")
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n")
    return folder


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "tiny-variant"
    export_here(base, "--keep-ratio", 0.25, "--output", folder)
    return folder


def export_here(*arguments):
    """In this process, where no Hub is needed."""
    export.export(export.parse_arguments([*map(str, arguments), "--no-check"]))


def environment(hub=None, home=None, token="hf_me", offline=False):
    values = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = str(home or "/nonexistent")
    values |= {"HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    values |= {"HF_TOKEN": token} if token else {}
    values |= {"HF_HUB_OFFLINE": "1"} if offline or hub is None else {}
    return values | ({"HF_ENDPOINT": hub.url} if hub is not None else {})


def run_step(step, hub, home, python=sys.executable, token="hf_me", offline=False, **arguments):
    result = subprocess.run(
        [python, str(SUPPORT / "steps.py"), step, json.dumps(arguments, default=str)],
        env=environment(hub, home, token, offline),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def run_steps(hub, home, python=sys.executable, **steps):
    """Several in one process, each a pair of a step and its arguments; what they gave, by their names."""
    return run_step("several", hub, home, python, steps=steps)


def run_export(*arguments, hub, home, check=False):
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), *map(str, arguments)]
    command += [] if check else ["--no-check"]
    result = subprocess.run(command, env=environment(hub, home), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def assert_same(found, expected, keep_ratio=None):
    """The same prompt, ratio, answer and logits; frames are resized by other code in 4.57 and 5.x, so not to the last bit."""
    assert found["prompt"] == expected["prompt"] and found["answer"] == expected["answer"]
    assert found["keep_ratio"] == (expected["keep_ratio"] if keep_ratio is None else keep_ratio)
    assert found["logits"] == pytest.approx(expected["logits"], abs=1e-4)


@pytest.fixture(scope="module")
def pushed(hub, variant, tmp_path_factory):
    return run_step("push", hub, tmp_path_factory.mktemp("home-push"), folder=variant, repo="me/tiny")


def test_push_brings_every_file(pushed):
    assert code_files(ReDiPruneConfig.auto_map_of_class()) <= set(pushed["files"])
    assert {"config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json"} <= set(
        pushed["files"]
    )


def check_loaded(loaded, pushed, repo="me/tiny"):
    assert loaded["config"] == "ReDiPruneConfig"
    assert set(loaded["auto_map"]) == AUTO_KEYS
    assert set(loaded["classes"].values()) == {"ReDiPruneLlavaNextVideoForConditionalGeneration"}
    kinds = {
        "AutoTokenizer": "PreTrainedTokenizerFast|TokenizersBackend",
        "AutoImageProcessor": "LlavaNextImageProcessor",
    }
    for name, kind in {**kinds, "AutoVideoProcessor": "LlavaNextVideoVideoProcessor"}.items():
        assert re.match(kind, loaded["parts"][name]), loaded["parts"]
    assert loaded["pipeline"] == "ReDiPruneProcessor"
    assert_same(loaded["pinned"], pushed["seen"])
    assert loaded["main"]["keep_ratio"] == 0.5 and loaded["branch"] == loaded["with token"] == 0.75
    assert loaded["main"]["prompt"] != pushed["seen"]["prompt"]
    for message in loaded["private"].values():
        assert f"{repo}-private" in message and ("token" in message or "authenticated" in message), message


def test_load_by_id(hub, pushed, tmp_path):
    check_loaded(run_step("load_by_id", hub, tmp_path, repo="me/tiny", first=pushed["first"]), pushed)


@needs_other
def test_other_line_loads_what_this_one_pushed(hub, pushed, tmp_path):
    """The tests on the other line see the other direction."""
    found = run_step("load_by_id", hub, tmp_path, python=OTHER_PYTHON, repo="me/tiny", first=pushed["first"])
    check_loaded(found, pushed)


def test_offline_after_a_download(hub, pushed, tmp_path):
    home, folder = tmp_path / "home", tmp_path / "tiny-snapshot"
    run_step("download", hub, home, repo="me/tiny", folder=folder)
    found = run_step("load_offline", hub, home, offline=True, repo="me/tiny", folder=folder)
    assert_same(found["cached"], found["snapshot"])


def test_an_upload_broken_off_leaves_the_old_revision(hub, pushed, tmp_path):
    before = hub.repositories["me/tiny"].branches["main"]
    hub.broken = r"PUT /lfs/|POST .*/commit/"
    start = len(hub.requests)
    try:
        found = run_step("broken_pushes", hub, tmp_path, repo="me/tiny")
    finally:
        hub.broken = None
    assert "no error" not in found.values()
    methods = {method for method, path in hub.requests[start:] if method == "PUT" or "/commit/" in path}
    assert methods == {"PUT", "POST"}  # one broken off while the weights go up, one at the commit
    assert hub.repositories["me/tiny"].branches["main"] == before
    assert found["after"]["logits"] == found["before"]["logits"]


def add_folder(hub, name, folder, **kwargs):
    return hub.add_repository(name, {path.name: path.read_bytes() for path in folder.iterdir()}, **kwargs)


def test_linked_variant_on_the_hub(hub, base, variant, tmp_path):
    commit = add_folder(hub, "me/base", base)
    planned = run_export("me/base", "--output", tmp_path / "planned", "--dry-run", hub=hub, home=tmp_path / "a")
    assert re.search(r"\d kB  model.safetensors\n", planned) and not (tmp_path / "planned").exists()
    stdout = run_export(
        "me/base",
        "--link",
        "--keep-ratio",
        0.25,
        "--push-to-hub",
        "me/linked",
        hub=hub,
        home=tmp_path / "a",
        check=True,
    )
    assert "bit for bit" in stdout
    files = hub.repositories["me/linked"].commits[hub.repositories["me/linked"].branches["main"]]
    assert not any(name.endswith(".safetensors") for name in files)
    card = files["README.md"].data.decode()
    for piece in ("base_model: me/base", "license: llama2", commit, "576 of them 144 stay", "export.py me/base --link"):
        assert piece in card
    config = json.loads(files["config.json"].data)
    assert (config["weights_from"], config["weights_revision"]) == ("me/base", commit)
    changed = {path.name: path.read_bytes() for path in base.iterdir()}
    changed["config.json"] = b"{}"
    hub.add_repository("me/base", changed)  # main moves on, the link does not

    home = tmp_path / "b"
    found = run_step("linked", hub, home, repo="me/linked", folder=tmp_path)
    assert found["weights_from"] == "me/base"
    assert [found[name]["weights"] for name in ("linked", "materialised", "trained")] == [False, True, True]
    assert_same(found["linked"]["fingerprint"], found["loaded"])
    assert_same(found["materialised"]["fingerprint"], found["loaded"])
    assert_same(run_step("linked_offline", hub, home, offline=True, repo="me/linked"), found["loaded"])
    if OTHER_PYTHON:
        assert_same(
            run_step("linked_offline", hub, tmp_path / "c", python=OTHER_PYTHON, repo="me/linked"), found["loaded"]
        )


def test_a_link_that_is_not_pinned(hub, base, tmp_path):
    """Is loaded with a warning, and pinned when it is saved: the repository may have moved on by then."""
    commit = add_folder(hub, "me/moving", base)
    hub.repositories["me/moving"].branches["release"] = commit
    export_here(base, "--link", "--output", tmp_path / "pinned")
    edit_config(tmp_path / "pinned", weights_from="me/moving", weights_revision=commit)
    folders = {"pinned": tmp_path / "pinned"}
    for name, revision in {"unpinned": None, "branch": "release"}.items():
        folders[name] = shutil.copytree(tmp_path / "pinned", tmp_path / name)
        edit_config(folders[name], weights_revision=revision)
    folders = {name: str(folder) for name, folder in folders.items()}
    found = run_step("pins", hub, tmp_path / "home", folders=folders, again=tmp_path / "again")
    assert {value["loaded"] for value in found.values()} == {value["saved"] for value in found.values()} == {commit}
    assert not any(value["weights"] for value in found.values())
    about = {name: [text for text in value["warnings"] if "not pinned" in text] for name, value in found.items()}
    assert about["pinned"] == []
    for name, revision in {"unpinned": "None", "branch": "'release'"}.items():
        (text,) = about[name]
        assert "weights_from='me/moving'" in text and f"weights_revision is {revision}" in text and commit in text


def test_an_export_of_a_branch_is_pinned_to_its_commit(hub, base, tmp_path):
    commit = add_folder(hub, "me/branching", base)
    hub.repositories["me/branching"].branches["v1"] = commit
    add_folder(hub, "me/branching", base)
    for number, revision in enumerate((["--base-revision", "v1"], [])):
        arguments = ["me/branching", "--link", *revision, "--output", tmp_path / f"{number}"]
        run_export(*arguments, hub=hub, home=tmp_path / "home")
        config = json.loads((tmp_path / f"{number}" / "config.json").read_text())
        assert config["weights_revision"] == (commit if revision else hub.repositories["me/branching"].branches["main"])


def test_a_linked_base_without_safetensors_is_refused(hub, base, tmp_path):
    """Before anything is written, although a link needs no weights."""
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.suffix != ".safetensors"}
    hub.add_repository("me/pickles", {**files, "pytorch_model.bin": b""})
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    hub.add_repository("me/shards", {**files, "model.safetensors.index.json": index})
    cases = {
        name: ("hf_me", [f"me/{name}", mode, "--output", str(tmp_path / "x"), *dry])
        for name, mode, dry in (("pickles", "--link", []), ("shards", "--copy", ["--dry-run"]))
    }
    found = run_step("exports", hub, tmp_path / "home", script=ROOT / "scripts" / "export.py", cases=cases)
    assert "holds no model.safetensors and no model.safetensors.index.json" in found["pickles"]
    assert "model-00001-of-00001.safetensors, which its model.safetensors.index.json names" in found["shards"]
    assert not (tmp_path / "x").exists()


def test_linked_to_a_folder(base, variant, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    export_here(tmp_path / "base", "--link", "--keep-ratio", 0.25, "--output", tmp_path / "tiny-linked")
    edit_config(tmp_path / "tiny-linked", weights_from="../base")
    found = run_step("linked", None, tmp_path / "home", repo=tmp_path / "tiny-linked", folder=tmp_path)
    assert found["weights_from"] == str(tmp_path / "base")
    assert_same(found["linked"]["fingerprint"], found["loaded"])


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_cannot_be_loaded_says_why(hub, base, variant, tmp_path):
    def broken(name, **changes):
        folder = tmp_path / name
        shutil.copytree(variant, folder)
        edit_config(folder, **changes)
        return folder

    hub.add_repository("me/other-kind", {"config.json": b'{"model_type": "llama"}'})
    add_folder(hub, "you/gated", base, gated=True)
    add_folder(hub, "you/moved-here", base)
    hub.moved["you/moved"] = "you/moved-here"
    cases = {
        "missing": broken("missing-base", weights_from="me/nowhere"),
        "missing folder": broken("missing-folder", weights_from="./nowhere"),
        "revision": broken("no-such-revision", weights_from="you/moved-here", weights_revision="0" * 40),
        "gated": broken("gated-base", weights_from="you/gated"),
        "moved": broken("moved-base", weights_from="you/moved"),
        "architecture": broken("another-architecture", weights_from="me/other-kind"),
        "nonsense": broken("nonsense", weights_from=7),
        "ratio": broken("ratio", pruning={"keep_ratio": 3}),
        "key": broken("unknown-key", pruning={"keep_ration": 0.5}),
        "no code": broken("no-code"),
        "truncated": broken("truncated"),
    }
    for path in cases["no code"].glob("*.py"):
        path.unlink()
    weights = cases["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = run_step("load_errors", hub, tmp_path / "home", cases={name: str(folder) for name, folder in cases.items()})
    for name, pieces in {
        "missing": ("weights_from='me/nowhere'", "moved"),
        "missing folder": ("weights_from=", "no folder", "nowhere"),
        "revision": ("you/moved-here", "0" * 40),
        "gated": ("you/gated", "gated", "token="),
        "architecture": ("me/other-kind", "'llama'", "llava_next_video"),
        "nonsense": ("weights_from", "7"),
        "ratio": ("keep_ratio", "3", "(0, 1]"),
        "key": ("keep_ration",),
        "no code": ("configuration_rediprune.py",),
        "truncated": ("truncated", "Download it again"),
    }.items():
        assert all(piece in found[name] for piece in pieces), (name, found[name])
    assert found["moved"] == "no error"


def test_sizes_of_copy_and_link(base, variant, tmp_path):
    export_here(base, "--link", "--output", tmp_path / "linked")
    size = lambda folder: sum(path.stat().st_size for path in folder.iterdir())  # noqa: E731
    print(f"--copy: {size(variant)} bytes, --link: {size(tmp_path / 'linked')} bytes")
    assert size(variant) - size(tmp_path / "linked") > 0.9 * (base / "model.safetensors").stat().st_size


def test_export_pushes_to_a_branch(hub, base, tmp_path):
    arguments = (
        base,
        "--push-to-hub",
        "me/branched",
        "--revision",
        "ratio-30",
        "--private",
        "--commit-message",
        "third",
    )
    run_export(*arguments, "--keep-ratio", 0.3, hub=hub, home=tmp_path)
    repository = hub.repositories["me/branched"]
    assert repository.private and set(repository.branches) == {"main", "ratio-30"}
    files = repository.commits[repository.branches["ratio-30"]]
    assert json.loads(files["config.json"].data)["pruning"]["keep_ratio"] == 0.3
    assert "config.json" not in repository.commits[repository.branches["main"]]


def test_export_refused_by_the_hub(hub, base, tmp_path):
    to = [str(base), "--push-to-hub"]
    output = ["--output", str(tmp_path / "x")]
    cases = {
        "reader": ("hf_reader", [*to, "me/name"]),
        "somebody else's": ("hf_me", [*to, "somebody/name"]),
        "no token": (None, [*to, "me/name"]),
        "no namespace": ("hf_me", [*to, "name"]),
        "no such base": ("hf_me", ["you/nowhere", *output]),
        "gated base": ("hf_me", ["you/gated-base", *output]),
    }
    add_folder(hub, "you/gated-base", base, gated=True)
    found = run_step("exports", hub, tmp_path, script=ROOT / "scripts" / "export.py", cases=cases)
    assert "token that may write" in found["reader"] and "cannot be written" in found["somebody else's"]
    assert "token" in found["no token"] and "NAMESPACE/NAME" in found["no namespace"]
    assert "no such repository" in found["no such base"]
    assert "you/gated-base is gated" in found["gated base"] and "hf auth login" in found["gated base"]
    assert "me/name" not in hub.repositories and not (tmp_path / "x").exists()


def test_no_network(base, tmp_path):
    unreachable = type("Unreachable", (), {"url": "http://127.0.0.1:9"})
    cases = {
        "push": ("hf_me", [str(base), "--push-to-hub", "me/name"]),
        "base": ("hf_me", ["you/nowhere", "--output", str(tmp_path / "x")]),
    }
    export_here(base, "--link", "--output", tmp_path / "alone")
    edit_config(tmp_path / "alone", weights_from="you/nowhere")
    script = ROOT / "scripts" / "export.py"
    found = run_step("without_network", unreachable, tmp_path, script=script, cases=cases, variant=tmp_path / "alone")
    assert "weights_from='you/nowhere'" in found["linked"] and "cannot be loaded" in found["linked"]
    assert "me/name" in found["push"] and "reachable" in found["push"]
    assert "you/nowhere" in found["base"] and "network" in found["base"] and not (tmp_path / "x").exists()


def test_linked_to_a_folder_goes_to_the_hub_with_its_weights_alone(hub, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    export_here(tmp_path / "base", "--link", "--keep-ratio", 0.25, "--output", tmp_path / "folder-linked")
    found = run_step(
        "push_folder_link", hub, tmp_path / "home", folder=tmp_path / "folder-linked", repo="me/from-folder"
    )
    assert "materialise=True" in found["linked"] and found["on the Hub before"] is False
    assert "model.safetensors" in found["files"] and found["weights_from"] is None
    assert_same(found["again"], found["loaded"])
