"""Exported variants: what is written, and what is refused without leaving anything behind."""

import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path

import export
import pytest
import torch
from exporting import broken, leftovers, refused, run
from places import ROOT
from rediprune.configuration_rediprune import ReDiPruneConfig
from rediprune.methods_registry import METHODS
from tiny import POOLED, random_image, random_video, save_clip
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

MODELS = ("modeling_rediprune_llava.py", "modeling_rediprune_qwen.py")
ENTRIES = ("configuration_rediprune.py", *MODELS, "processing_rediprune.py")


@pytest.mark.parametrize("entry", ENTRIES)
def test_code_files_import_directly_what_they_need(entry):
    """4.57 copies the files that an entry file of a local folder imports itself, and not what those import."""
    direct = {f"{name}.py" for name in get_relative_imports(ROOT / entry)}
    assert {Path(path).name for path in get_relative_import_files(ROOT / entry)} <= direct | {entry}


def test_everything_of_a_variant(base, tmp_path, capsys):
    run(base, "--keep-ratio", 0.3, "--method", "uniform", "--max-candidates", "null", "--output", tmp_path / "variant")
    names = set(leftovers(tmp_path / "variant"))
    assert {*export.code_files(), "README.md", "config.json", "model.safetensors", "generation_config.json"} <= names
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"} <= names
    assert leftovers(tmp_path) == ["variant"]
    config = json.loads((tmp_path / "variant" / "config.json").read_text())
    assert config["model_type"] == "rediprune_llava_next_video" and len(config["auto_map"]) == 6
    assert (config["pruning"]["keep_ratio"], config["pruning"]["method"]) == (0.3, "uniform")
    processor = json.loads((tmp_path / "variant" / "processor_config.json").read_text())
    assert processor["processor_class"] == "ReDiPruneProcessor" and "image_processor" not in processor
    tokenizer = json.loads((tmp_path / "variant" / "tokenizer_config.json").read_text())
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    card = (tmp_path / "variant" / "README.md").read_text()
    for piece in (
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "576 of them 173 stay",
        "`uniform`",
    ):
        assert piece in card
    assert f"in {len(names)} files" in capsys.readouterr().out


def test_into_the_repository_of_a_base_without_processor_file(base, tmp_path):
    """Other files of the folder stay; a file that old checkpoints lack is written."""
    old = broken(base, tmp_path / "old")
    values = json.loads((old / "processor_config.json").read_text())
    for part, name in export.portability.PARTS.items():
        if part in values:
            (old / name).write_text(json.dumps(values[part]))
    (old / "processor_config.json").unlink()
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    written = export.convert_files(old, output, {"keep_ratio": 0.5})
    assert set(written) | {"notes.txt"} == set(leftovers(output))
    assert json.loads((output / "processor_config.json").read_text())["patch_size"] == 4


def test_dry_run_writes_nothing(base, tmp_path, capsys):
    run(base, "--output", tmp_path / "variant", "--dry-run")
    assert leftovers(tmp_path) == []
    listed = capsys.readouterr().out
    run(base, "--output", tmp_path / "variant")
    assert all(name in listed for name in leftovers(tmp_path / "variant"))
    assert "--force" in refused(base, "--output", tmp_path / "variant", "--dry-run")


def test_every_key_of_the_pruning_block_has_an_option(base, tmp_path):
    """Each takes a value as JSON has it, and the block that is written is what was asked for."""
    block = export.configuration.PruningConfig(
        method="rediprune_plus", keep_ratio=0.3, scope="item", relevance="projected", relevance_layer=0, time_weight=0.5,
        distance="features", proportional_attention=False, candidate_pool="algorithm1", max_candidates=9, positions="compact",
    ).to_dict()  # fmt: skip
    options = [
        piece for key, value in block.items() for piece in (f"--{key.replace('_', '-')}", export.json.dumps(value))
    ]
    run(base, "--output", tmp_path / "variant", *(piece.strip('"') for piece in options))
    assert json.loads((tmp_path / "variant" / "config.json").read_text())["pruning"] == block


@pytest.mark.parametrize("method", export.configuration.METHODS)
def test_the_card_says_what_the_method_does(method, base, tmp_path):
    config = {"model_type": "rediprune_llava_next_video", "pruning": {"method": method, "keep_ratio": 0.125}}
    export.write_card(tmp_path, "me/name", "you/base", base, config, "command")
    card = (tmp_path / "README.md").read_text()
    kept = {"prumerge_plus": "325 stay", "none": "all of them stay"}.get(method, "72 stay")
    kept = {"vtw": "0 of 576 reach"}.get(method, "72 of 576 reach") if METHODS[method].inner else kept
    assert kept in card and f"(`keep_ratio=0.125`, method `{method}`)" in card and "base_model: you/base" in card


def test_the_card_takes_the_licence_of_the_base(base, tmp_path):
    (tmp_path / "base").mkdir()
    config = {"model_type": "rediprune_llava", "pruning": {}}
    licence = ["license: other", "license_name: some-terms", "license_link: LICENSE.txt"]
    (tmp_path / "base" / "README.md").write_text("\n".join(["---", "language: en", *licence, "---", "license: none"]))
    export.write_card(tmp_path, "me/name", "you/base", tmp_path / "base", config, "command")
    card = (tmp_path / "README.md").read_text()
    assert all(f"\n{line}\n" in card for line in licence) and "Licence: some-terms." in card


def test_existing_output(base, tmp_path):
    output = tmp_path / "variant"
    run(base, "--output", output)
    assert "--force" in refused(base, "--output", output)
    (output / "stale.txt").write_text("of an earlier export")
    run(base, "--output", output, "--force", "--link")
    assert not (output / "stale.txt").exists() and not (output / "model.safetensors").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("...")
    assert "not an exported variant" in refused(base, "--output", mine, "--force")
    assert leftovers(tmp_path) == ["mine", "variant"] and (mine / "thesis.tex").exists()


def test_no_disk_space(base, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    message = refused(base, "--output", tmp_path / "variant")
    assert "1.0 kB left" in message and "--link" in message
    assert leftovers(tmp_path) == []


def test_disk_that_fills_up_midway(base, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "tqdm", full)
    assert "No space left" in refused(base, "--output", tmp_path / "variant")
    assert leftovers(tmp_path) == []


def test_bad_bases(base, tmp_path):
    weights = (base / "model.safetensors").read_bytes()
    nonsense = b'{"model_type": "llava_next_video", "text_config": 3}'
    cases = {
        ("llama",): broken(base, tmp_path / "a", config__json=b'{"model_type": "llama"}'),
        ("no config.json",): broken(base, tmp_path / "b", config__json=None),
        ("not JSON",): broken(base, tmp_path / "c", config__json=b"{"),
        ("config.json holds no JSON object",): broken(base, tmp_path / "h", config__json=b"[]"),
        ("not the config of a model",): broken(base, tmp_path / "i", config__json=nonsense),
        ("bytes, but its header says",): broken(base, tmp_path / "d", model__safetensors=weights[:-100]),
        ("not a whole safetensors file",): broken(base, tmp_path / "e", model__safetensors=b"12"),
        ("no model.safetensors",): broken(base, tmp_path / "f", model__safetensors=None),
        ("tokenizer_config.json",): broken(base, tmp_path / "g", tokenizer_config__json=None),
        ("no such folder",): tmp_path / "nowhere",
    }
    (tmp_path / "out").mkdir()
    for pieces, folder in cases.items():
        for weights in ("--copy", "--link"):
            message = refused(folder, weights, "--output", tmp_path / "out" / "variant")
            assert all(piece in message for piece in pieces), message
    assert leftovers(tmp_path / "out") == []


def test_a_shard_that_is_missing(base, tmp_path):
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode()
    folder = broken(base, tmp_path / "base", model__safetensors=None)
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert "model-00001-of-00002.safetensors" in refused(folder, "--output", tmp_path / "variant")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "not an index" in refused(folder, "--output", tmp_path / "variant")


def test_sharded_weights_are_copied_with_their_index(base, tmp_path):
    folder = broken(base, tmp_path / "base", model__safetensors=None)
    names = []
    for number in (1, 2):
        names.append(f"model-0000{number}-of-00002.safetensors")
        shutil.copyfile(base / "model.safetensors", folder / names[-1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", names))}))
    run(folder, "--output", tmp_path / "variant")
    assert {*names, "model.safetensors.index.json"} <= set(leftovers(tmp_path / "variant"))


@pytest.mark.parametrize(
    "arguments, pieces",
    [
        (("--keep-ratio", 3, "--output", "x"), ("keep_ratio", "3", "(0, 1]")),
        (("--method", "best", "--output", "x"), ("method", "'best'")),
        (("--base-revision", "v1", "--output", "x"), ("--base-revision v1", "folder")),
    ],
)
def test_bad_arguments(base, tmp_path, arguments, pieces, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(base, *arguments)
    assert all(piece in message for piece in pieces), message
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, piece",
    [
        ((), "nothing to write"),
        (("--output", "x", "--private"), "--push-to-hub"),
        (("--push-to-hub", "name"), "NAMESPACE/NAME"),
        (("--output", "x", "--copy", "--link"), "not allowed"),
    ],
)
def test_arguments_that_do_not_go_together(base, arguments, piece, capsys):
    with pytest.raises(SystemExit):
        export.parse_arguments([str(base), *arguments])
    assert piece in capsys.readouterr().err


@pytest.mark.slow
def test_command_line_ends_with_a_message(base, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "export.py", tmp_path / "nowhere", "--output", tmp_path / "variant"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "no such folder" in result.stderr and "Traceback" not in result.stderr


def test_variant_answers_like_its_base_and_prunes(base, tmp_path):
    """In this process, through the classes of the repository; fresh processes are for test_hub.py."""
    from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration
    from rediprune.processing_rediprune import ReDiPruneProcessor
    from transformers import LlavaNextVideoForConditionalGeneration

    for weights in ("--copy", "--link"):
        folder = tmp_path / weights.strip("-")
        run(base, weights, "--keep-ratio", 0.25, "--output", folder)
        model = ReDiPruneLlavaNextVideoForConditionalGeneration.from_pretrained(folder)
        processor = ReDiPruneProcessor.from_pretrained(folder)
        stock = LlavaNextVideoForConditionalGeneration.from_pretrained(base)
        inputs = processor(text="<video> what colour ?", videos=[random_video()], keep_ratio=1.0)
        with torch.no_grad():
            found = model(**inputs).logits
            inputs.pop("keep_ratio")
            assert torch.equal(found, stock(**inputs).logits)
        pruned = processor(text="<video> what colour ?", videos=[random_video()])
        assert (pruned["input_ids"] == model.config.video_token_id).sum() == 4 * POOLED // 4
        model(**pruned)


def test_a_text_tower(base, tmp_path, monkeypatch):
    """A folder is found from everywhere on this computer, and not pushed; a Hub id stays as it is."""
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip")
    tower = lambda name: json.loads((tmp_path / name / "config.json").read_text())["pruning"]["text_tower"]  # noqa: E731
    run(base, "--method", "cdpruner", "--text-tower", "clip", "--output", tmp_path / "folder")
    run(base, "--text-tower", "openai/clip@main", "--relevance", "clip", "--link", "--output", tmp_path / "id")
    assert tower("folder") == str(tmp_path / "clip") and tower("id") == "openai/clip@main"
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    message = refused(base, "--text-tower", "clip", "--push-to-hub", "me/name")
    assert "--text-tower clip is a folder" in message and "Hub id" in message
    assert "text_tower is None" in refused(base, "--relevance", "clip", "--output", tmp_path / "none")


def test_a_link_to_a_folder_is_not_pushed(base, tmp_path):
    """Nobody else would find the weights. Together with them the push goes on to the Hub."""
    from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration

    shutil.copytree(base, tmp_path / "base")
    run(tmp_path / "base", "--link", "--output", tmp_path / "linked")
    config = json.loads((tmp_path / "linked" / "config.json").read_text())
    (tmp_path / "linked" / "config.json").write_text(json.dumps({**config, "weights_from": "../base"}))
    model = ReDiPruneLlavaNextVideoForConditionalGeneration.from_pretrained(tmp_path / "linked")
    for push in (
        lambda: model.push_to_hub("me/name"),
        lambda: model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/name"),
        lambda: ReDiPruneConfig.from_pretrained(tmp_path / "linked").push_to_hub("me/name"),
        lambda: model.config.push_to_hub("me/name"),
    ):
        with pytest.raises(ValueError, match="nobody who loads it from the Hub.*materialise=True.*Hub id"):
            push()
    assert not (tmp_path / "again").exists()
    with pytest.raises(Exception, match="(?i)offline|connect"):  # past that check, with no Hub in this test
        model.push_to_hub("me/name", materialise=True)
    assert model.config.weights_from == str(tmp_path / "base")


@pytest.mark.parametrize("method", METHODS)
def test_a_variant_of_every_method_answers_about_batches(base, tmp_path, method):
    layer = ("--inner-layer", 1) if METHODS[method].inner else ()
    run(base, "--method", method, "--keep-ratio", 0.3, *layer, "--link", "--output", tmp_path / "variant")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "variant", trust_remote_code=True)
    assert model.config.pruning.method == processor.pruning.method == method
    for kind, media in {
        "video": [random_video(1), random_video(2)],
        "image": [random_image(1), random_image(2)],
    }.items():
        text = [f"USER : <{kind}> what colour is the star ? ASSISTANT :", f"<{kind}> where ?"]
        inputs = processor(text=text, **{f"{kind}s": media}, padding=True, return_tensors="pt")
        answers = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert len(answers) == 2 and answers.shape[1] > inputs["input_ids"].shape[1]
