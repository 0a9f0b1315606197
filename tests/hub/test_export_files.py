"""Exports touch nothing but the files of the base and their own output, however they end."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import export
import exporter.folder as export_folder
import pytest
from exporting import broken, contents, leftovers, refused, run
from hub_server import Hub
from places import ROOT
from test_hub import run_step

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PLAIN = "only plain names"


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "variant"
    run(base, "--output", folder)
    return folder


def sharded(base, folder, names=SHARDS):
    """The base with two shards of these names in its index; only the usual ones are there, each with all tensors."""
    broken(base, folder, model__safetensors=None)
    for name in SHARDS:
        shutil.copyfile(base / "model.safetensors", folder / name)
    weight_map = {f"tensor {number}": name for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# -- names that lead out of the base -----------------------------------------------------------------------------------

ESCAPES = ["../mine.safetensors", "{there}/mine.safetensors", "sub/../../mine.safetensors", "sub/mine.safetensors"]
ESCAPES += ["..\\mine.safetensors", "C:mine.safetensors", "a\0.safetensors", "..", ".", ""]
MODES = [["--copy"], ["--link"], ["--copy", "--dry-run"], ["--link", "--dry-run"]]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_name_in_the_index_that_is_a_path(base, tmp_path, name, mode):
    """The file that it leads to from the base, and the one from the output, stay as they are."""
    there = tmp_path / "there"
    there.mkdir()
    folder = sharded(base, there / "base", [SHARDS[0], name.format(there=there)])
    (folder / "sub").mkdir()
    for place in (there, folder / "sub"):
        shutil.copyfile(base / "model.safetensors", place / "mine.safetensors")
    before = contents(there)
    message = refused(folder, *mode, "--output", there / "variant")
    assert PLAIN in message and repr(name.format(there=there)) in message
    assert contents(there) == before and not (there / "variant").exists()


@pytest.mark.parametrize("weight_map", [{"a": 3}, {"a": None}, {"a": ["x"]}, {}, [], "x", None])
def test_an_index_of_nonsense(base, tmp_path, weight_map):
    folder = sharded(base, tmp_path / "base")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "not an index of safetensors files" in refused(folder, "--output", tmp_path / "variant")


@pytest.mark.parametrize("name", ["config.json", "modeling_rediprune_llava.py", "pytorch_model.bin"])
def test_an_index_that_names_other_files(base, tmp_path, name):
    """What is no safetensors file may be a pickle, or would take the place of a file of the variant."""
    folder = sharded(base, tmp_path / "base", [SHARDS[0], name])
    shutil.copyfile(base / "model.safetensors", folder / name) if name != "config.json" else None
    for mode in ("--copy", "--link"):
        assert f"{name!r}, which is not a safetensors file" in refused(folder, mode, "--output", tmp_path / "variant")


@pytest.mark.parametrize("mode", [["--copy"], ["--link"], ["--dry-run"]], ids=" ".join)
@pytest.mark.parametrize("name", [SHARDS[1], INDEX, "tokenizer.json", "LICENSE", "README.md", "config.json"])
def test_a_link_that_leads_out_of_the_base(base, tmp_path, name, mode):
    """Whoever publishes the variant would publish what it leads to."""
    folder = sharded(base, tmp_path / "base")
    outside = tmp_path / "outside"
    if (folder / name).exists():
        shutil.move(folder / name, outside)
    else:
        outside.write_text("---\nlicense: mine\n---\n")
    (folder / name).symlink_to("../outside")
    message = refused(folder, *mode, "--output", tmp_path / "variant")
    assert "leads out of the checkpoint" in message and name in message and str(outside) in message
    outside.unlink()
    assert "leads out of the checkpoint" in refused(folder, *mode, "--output", tmp_path / "variant")
    assert leftovers(tmp_path) == ["base"]


def test_a_link_within_the_base(base, tmp_path):
    folder = sharded(base, tmp_path / "base")
    (folder / "parts").mkdir()
    shutil.move(folder / SHARDS[1], folder / "parts" / "second")
    (folder / SHARDS[1]).symlink_to("parts/second")
    run(folder, "--output", tmp_path / "variant")
    copied = tmp_path / "variant" / SHARDS[1]
    assert copied.read_bytes() == (base / "model.safetensors").read_bytes() and not copied.is_symlink()


def test_what_is_no_file(base, tmp_path):
    """A pipe would be waited for, without end if nobody opened its other end."""
    folder = sharded(base, tmp_path / "base")
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])
    threading.Thread(target=lambda: open(folder / SHARDS[1], "wb").close(), daemon=True).start()
    assert f"{SHARDS[1]} is not a file" in refused(folder, "--output", tmp_path / "variant")


def cached(base, folder, commit="0" * 40):
    """The base as the Hub's cache holds it: links into `blobs`."""
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copyfile(path, folder / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_base_in_the_cache_of_the_hub(base, tmp_path):
    """Named as a folder, it has the links of the cache and no others."""
    snapshot = cached(base, tmp_path / "models--me--base")
    run(snapshot, "--output", tmp_path / "variant")
    for name in ("model.safetensors", "tokenizer.json"):
        copied = tmp_path / "variant" / name
        assert copied.read_bytes() == (base / name).read_bytes() and not copied.is_symlink()
    blob = (snapshot / "model.safetensors").resolve()
    shutil.move(blob, tmp_path / "outside")
    for target in (blob, tmp_path / "models--me--base" / "blobs"):  # a link in `blobs`, and `blobs` as a link
        if target != blob:
            blob.unlink()
            shutil.move(target, tmp_path / "elsewhere")
            shutil.move(tmp_path / "outside", tmp_path / "elsewhere" / blob.name)
        target.symlink_to(tmp_path / ("outside" if target == blob else "elsewhere"))
        assert "leads out of the checkpoint" in refused(snapshot, "--output", tmp_path / "again")


def export_from(hub, folder, *arguments):
    """The command line with a Hub, in a folder, where the cache is, too."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "home"}
    command = [sys.executable, ROOT / "scripts" / "export.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.hub
@pytest.mark.slow
def test_a_base_on_the_hub_whose_index_names_paths(base, tmp_path):
    """Whether its weights are copied, linked or only listed; nothing is downloaded for it."""
    modes = {"copied": ["--copy"], "linked": ["--link"], "listed": ["--copy", "--dry-run"]}
    output = ["--output", str(tmp_path / "variant")]
    cases = {name: (None, ["me/base", *mode, *output]) for name, mode in modes.items()}
    with Hub() as hub:
        hub.add_repository("me/base", files_of(sharded(base, tmp_path / "base", ["../mine.safetensors"])))
        found = run_step("exports", hub, tmp_path / "home", script=ROOT / "scripts" / "export.py", cases=cases)
        assert not any(path.endswith(".safetensors") for _, path in hub.requests)
    for message in found.values():
        assert PLAIN in message and "Traceback" not in message, message
    assert leftovers(tmp_path) == ["base", "home"]


@pytest.mark.hub
@pytest.mark.slow
def test_shards_on_the_hub(base, tmp_path):
    """Those of the index are copied, and no other file is downloaded."""
    others = {"unused.safetensors": b"", "pytorch_model.bin": b"", "custom_generate/generate.py": b"", "evil.py": b""}
    with Hub() as hub:
        hub.add_repository("me/base", {**files_of(sharded(base, tmp_path / "base")), **others})
        result = export_from(hub, tmp_path, "me/base", "--output", "variant", "--no-check")
        assert result.returncode == 0, result.stderr
        asked = {path for _, path in hub.requests if "/resolve/" in path}
    assert all(contents(tmp_path / "variant")[name] == contents(tmp_path / "base")[name] for name in [*SHARDS, INDEX])
    assert not any(path.endswith(name) for path in asked for name in others)


def test_the_check_reads_a_base_in_the_same_way(base, tmp_path):
    import check_variant
    import torch

    with pytest.raises(ValueError, match=PLAIN):
        check_variant.load_base(str(sharded(base, tmp_path / "base", ["../mine.safetensors"])), torch.float32)


# -- what may be replaced ----------------------------------------------------------------------------------------------


def test_a_variant_under_version_control_is_not_replaced(base, variant, tmp_path):
    """With `.git` as a folder, as the file of a worktree, and as a link to nowhere."""
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        output = tmp_path / "variant"
        shutil.copytree(variant, output)
        make(output / ".git")
        before = contents(output)
        assert "--force does not replace it" in refused(base, "--output", output, "--force")
        assert contents(output) == before and leftovers(tmp_path) == ["variant"]
        shutil.rmtree(output)


def test_variants_of_every_family_and_nothing_else_are_replaced(tmp_path):
    for cls in export_folder.configuration.CONFIGS.values():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": cls.model_type}))
        export_folder.check_replaceable(tmp_path, force=True)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": cls.base_model_type}))
        with pytest.raises(export_folder.ExportError, match="--force does not replace it"):
            export_folder.check_replaceable(tmp_path, force=True)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_appears_at_the_output_during_the_work_stays(base, tmp_path, monkeypatch, force):
    output, written = tmp_path / "variant", export.write_card

    def slow(*args):
        output.mkdir()
        (output / "thesis.tex").write_text("...")
        written(*args)

    monkeypatch.setattr(export, "write_card", slow)
    message = refused(base, "--output", output, *force)
    assert "--force does not replace it" in message if force else "exists already" in message
    assert leftovers(tmp_path) == ["variant"] and leftovers(output) == ["thesis.tex"]


def test_an_output_that_is_a_link(base, variant, tmp_path):
    """What it leads to is written, or replaced; the link stays."""
    (tmp_path / "link").symlink_to("place/variant")
    run(base, "--output", tmp_path / "link", "--link")
    run(base, "--output", tmp_path / "link", "--link", "--force")
    assert (tmp_path / "link").is_symlink() and leftovers(tmp_path / "place") == ["variant"]


def test_folders_made_for_the_output_go_with_it(base, tmp_path):
    no_tokenizer = broken(base, tmp_path / "base", tokenizer_config__json=None)
    refused(no_tokenizer, "--output", tmp_path / "a" / "b" / "variant")
    assert leftovers(tmp_path) == ["base"]
    run(base, "--output", tmp_path / "a" / "b" / "variant", "--link")
    assert leftovers(tmp_path / "a" / "b") == ["variant"]


def test_the_work_is_done_on_the_disk_of_the_output(base, tmp_path, monkeypatch):
    """Folders move within one file system alone."""
    moved, real = [], os.replace

    def on_one_disk(source, target, *args, **kwargs):
        if not all(Path(place).resolve().is_relative_to(tmp_path / "disk") for place in (source, target)):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        moved.append(Path(target))
        real(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "replace", on_one_disk)
    monkeypatch.setattr(os, "rename", on_one_disk)
    output = tmp_path / "disk" / "variant"
    output.parent.mkdir()
    run(base, "--output", output)
    run(base, "--output", output, "--force")
    assert moved.count(output) == 2 and leftovers(output.parent) == ["variant"]


# -- runs that are stopped or killed -----------------------------------------------------------------------------------

STOPPED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell ignores
sys.path[:0] = [{scripts!r}]
import export
class Bar(export.tqdm):
    def update(self, count):  # in the middle of copying the weights
        os.kill(os.getpid(), {number})
export.tqdm = Bar
export.CHUNK = 1000
export.main()
"""


def stopped(base, number, *arguments):
    """The export in a process that gets a signal in the middle of its work."""
    script = STOPPED.format(scripts=str(ROOT / "scripts"), number=int(number))
    command = [sys.executable, "-c", script, base, "--no-check", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(base, tmp_path, number):
    result = stopped(base, number, "--output", tmp_path / "variant")
    assert result.returncode == 128 + number and f"stopped by {number.name}" in result.stderr
    assert "Traceback" not in result.stderr and leftovers(tmp_path) == []


@pytest.mark.slow
def test_what_a_killed_run_leaves_is_removed_by_the_next(base, variant, tmp_path, capsys):
    for arguments in ([], ["--force"]):
        if arguments:
            shutil.copytree(variant, tmp_path / "variant")
        result = stopped(base, signal.SIGKILL, "--output", tmp_path / "variant", *arguments)
        assert result.returncode == -signal.SIGKILL
        (left,) = tmp_path.glob(".export-*")
        run(base, "--output", tmp_path / "other", "--link")
        told = f"removed {left}, which an export to {tmp_path / 'variant'} left when it was killed"
        assert told in capsys.readouterr().out and not left.exists()
        shutil.rmtree(tmp_path / "other")
    assert contents(tmp_path / "variant") == contents(variant)


@pytest.mark.slow
def test_a_dry_run_removes_nothing(base, tmp_path):
    stopped(base, signal.SIGKILL, "--output", tmp_path / "variant")
    before = contents(tmp_path)
    run(base, "--output", tmp_path / "variant", "--dry-run")
    assert contents(tmp_path) == before


def test_the_work_of_others_is_left_alone(base, tmp_path, capsys):
    """Of an export that is running, and whatever else has such a name."""
    for name in (".export-mine.part", ".export-of-an-earlier-version.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("...")
    (tmp_path / ".export-file.part").write_text("...")
    (tmp_path / ".export-link.part").symlink_to(".export-mine.part")
    with export_folder.whole_folder(tmp_path / "running") as folder:
        (folder / "shard").write_text("...")
        before = contents(tmp_path)
        run(base, "--output", tmp_path / "variant", "--link")
        shutil.rmtree(tmp_path / "variant")
        assert contents(tmp_path) == before
    assert leftovers(tmp_path / "running") == ["shard"]
    assert ".export-mine.part may be what a killed export left, but nothing in it says so" in capsys.readouterr().out


def test_a_leftover_names_no_place_but_beside_it(tmp_path):
    """Whoever may write into a shared folder could have files moved anywhere otherwise."""
    left = tmp_path / "shared" / ".export-planted.part"
    (left / "old").mkdir(parents=True)
    for output in ("../victim", str(tmp_path / "victim"), "..", 3):
        (left / "owner.json").write_text(json.dumps({"output": output}))
        export_folder.tidy(tmp_path / "shared")
        assert leftovers(tmp_path) == ["shared"] and (left / "old").exists()


class Killed:
    """Ends the process at the n-th change to the file system, as SIGKILL would."""

    CHANGES = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove")

    def __init__(self, step):
        self.left = step
        for name in self.CHANGES:
            setattr(os, name, self.counted(getattr(os, name)))
        export_folder.open = self.counted(open)

    def counted(self, function):
        def change(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return change


def in_a_process(step, function, *args):
    """Whether it ended well in a process that is killed at a step."""
    process = os.fork()
    if not process:
        Killed(step)
        try:
            function(*args)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9)
    return code == 0


def write_variant(output, content, force=True):
    with export_folder.whole_folder(output, force) as folder:
        (folder / "config.json").write_text(json.dumps({"model_type": export.configuration.ReDiPruneConfig.model_type}))
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text(content)


def state_of(output):
    """Whose files are at the output: `None` where none are, "torn" where they are not one variant's."""
    if not output.exists():
        return None
    found = contents(output)
    whole = set(found) == {"config.json", "a", "sub/b"} and found["a"] == found["sub/b"]
    return found["a"].decode() if whole else "torn"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [None, "old"])
def test_killed_at_any_step(tmp_path, before):
    """The variant that was there, or the new one, is there whole, at the latest after the next run, killed as well or not."""
    seen = set()

    def killed_at(step):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        if before:
            write_variant(folder / "variant", before)
        done = in_a_process(step, write_variant, folder / "variant", "new")
        assert state_of(folder / "variant") in {before, None, "new"}
        return done, folder

    for step in range(1000):
        done, folder = killed_at(step)
        for second in range(1000):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            if in_a_process(second, export_folder.tidy, copy):
                break
            export_folder.tidy(copy)
            seen.add(state_of(copy / "variant"))
            assert state_of(copy / "variant") in {before, "new"} and set(leftovers(copy)) <= {"variant"}
            shutil.rmtree(copy)
        assert state_of(copy / "variant") in {before, "new"} and set(leftovers(copy)) <= {"variant"}
        shutil.rmtree(copy)
        if state_of(folder / "variant") == "new":  # removed by the user, whose old variant may be gone in part
            shutil.rmtree(folder / "variant")
            export_folder.tidy(folder)
            assert state_of(folder / "variant") in {before, None}
        if done:
            break
    assert done and step >= 8 and seen == {before, "new"}


def test_a_place_that_was_taken_between(tmp_path, capsys):
    """Killed between making room and moving in; then something else went there: both stay, and the user is told."""
    write_variant(tmp_path / "variant", "old")
    real = os.replace
    for step in range(100):
        in_a_process(step, write_variant, tmp_path / "variant", "new")
        if not (tmp_path / "variant").exists():
            break
        export_folder.tidy(tmp_path)
    assert os.replace is real
    (tmp_path / "variant").mkdir()
    before = contents(tmp_path)
    capsys.readouterr()
    export_folder.tidy(tmp_path)
    assert contents(tmp_path) == before
    (old,) = tmp_path.glob(".export-*/old")
    assert f"{old} was at {tmp_path / 'variant'}, which something else has taken" in capsys.readouterr().out
    (tmp_path / "variant").rmdir()
    export_folder.tidy(tmp_path)
    assert state_of(tmp_path / "variant") == "old" and leftovers(tmp_path) == ["variant"]
