"""Whoever lets the code of a variant run has not let that of its base run, or that of its text tower."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import check_variant
import export
import pytest
import torch
from exporting import broken, refused, run
from hub_server import Hub
from rediprune.hub_untrusted import CODE_KEYS, without_code
from rediprune.inputs_text_tower import question_segments
from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration as Model
from rediprune.vision_joint_space import JointSpace
from safetensors.torch import load_file
from tiny import save_clip, save_stock_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

ALLOWED = {"config.json", "model.safetensors", "model.safetensors.index.json"}
QUESTION = ["where is the star ?"]


class Pickle:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_stock_checkpoint(tmp_path_factory.mktemp("stock") / "base")


@pytest.fixture
def ran(tmp_path):
    """A file that exists when code ran that should not."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def code(ran, *names):
    """Of a module with these classes or functions."""
    return f"open({str(ran)!r}, 'w').close()\n" + "".join(f"class {name}:\n    pass\n" for name in names)


def edit(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def armed(stock, folder, ran):
    """The stock checkpoint with everything in it by which transformers comes to run code or to read other files."""
    shutil.copytree(stock, folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(ran) + "def generate(model, **kwargs): return None\n")
    (folder / "evil.py").write_text(code(ran, "Config", "Model", "Tokenizer", "Image", "Video"))
    kernel = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    text_config |= {**kernel, "auto_map": {"AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}}
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    edit(folder / "config.json", **kernel, auto_map=auto_map, text_config=text_config)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    for name, key in {"preprocessor_config.json": "Image", "video_preprocessor_config.json": "Video"}.items():
        edit(folder / name, auto_map={f"Auto{key}Processor": f"evil.{key}"})
    edit(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.Processor"})
    edit(folder / "generation_config.json", max_new_tokens=99)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(ran), peft_type="LORA")
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Pickle(str(ran))))
    shutil.copyfile(stock / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    return folder


def linked(stock, folder, base):
    """A variant that is linked to another base than the one that it was made from."""
    run(stock, "--link", "--keep-ratio", 0.3, "--output", folder)
    edit(folder / "config.json", weights_from=str(base))
    return folder


def load(variant):
    return AutoModelForImageTextToText.from_pretrained(variant, trust_remote_code=True)


def assert_weights_of(model, stock):
    weights = load_file(stock / "model.safetensors")
    for name in ("image_newline", "multi_modal_projector.linear_1.weight"):
        assert torch.equal(model.state_dict()[f"model.{name}"], weights[name])


def test_a_linked_variant_runs_no_code_of_its_base(stock, tmp_path, ran):
    base = armed(stock, tmp_path / "base", ran)
    variant = linked(stock, tmp_path / f"linked_{os.getpid()}", base)
    for model in (load(variant), Model.from_pretrained(variant, trust_remote_code=True)):
        assert_weights_of(model, stock)
        assert "generate" not in vars(model) and model.generation_config.max_new_tokens == 4
        assert not getattr(model, "_hf_peft_config_loaded", False)


@pytest.mark.hub
@pytest.mark.slow
def test_a_linked_variant_asks_the_hub_for_nothing_else(stock, tmp_path, ran):
    """In a fresh process, where transformers has not looked at its settings yet."""
    base = armed(stock, tmp_path / "base", ran)
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with Hub() as hub:
        hub.add_repository("me/base", files)
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        variant = linked(stock, tmp_path / "variant", "me/base")
        script = f"""
import transformers
model = transformers.AutoModelForImageTextToText.from_pretrained({str(variant)!r}, trust_remote_code=True)
assert "generate" not in vars(model), model.generate
"""
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert result.returncode == 0, result.stderr[-3000:]
        asked = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert asked and asked <= ALLOWED, asked


@pytest.mark.parametrize("name", ["../mine.safetensors", "{there}/mine.safetensors", "pytorch_model.bin"])
def test_a_linked_variant_reads_no_file_elsewhere(stock, tmp_path, name):
    base = broken(stock, tmp_path / "base", model__safetensors=None)
    for path in (tmp_path / "mine.safetensors", base / "pytorch_model.bin"):
        shutil.copyfile(stock / "model.safetensors", path)
    weight_map = dict.fromkeys(load_file(stock / "model.safetensors"), name.format(there=tmp_path))
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="only plain names|not a safetensors file"):
        load(linked(stock, tmp_path / f"linked_{os.getpid()}", base))


def test_a_linked_variant_reads_no_pickle(stock, tmp_path):
    base = broken(stock, tmp_path / "base", model__safetensors=None)
    torch.save(load_file(stock / "model.safetensors"), base / "pytorch_model.bin")
    variant = linked(stock, tmp_path / f"linked_{os.getpid()}", base)
    for arguments in ({}, {"use_safetensors": None}):
        with pytest.raises(OSError, match="no model.safetensors .*can run code"):
            Model.from_pretrained(variant, **arguments)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        Model.from_pretrained(variant, use_safetensors=False)


@pytest.mark.parametrize("mode", ["--copy", "--link"])
def test_an_exported_variant_names_no_code_of_its_base(stock, tmp_path, ran, mode):
    """Whose code would run with that of the variant: transformers follows `auto_map` wherever it leads."""
    base = armed(stock, tmp_path / "base", ran)
    variant = tmp_path / f"variant_{os.getpid()}"
    run(base, mode, "--output", variant)
    auto_map = export.configuration.ReDiPruneConfig.auto_map_of_class()
    ours = {"config.json": auto_map, "processor_config.json": {"AutoProcessor": auto_map["AutoProcessor"]}}
    for path in variant.glob("*.json"):
        values = json.loads(path.read_text())
        assert values.pop("auto_map", None) == ours.get(path.name), path
        assert without_code(values) == values, path
    assert not list(variant.rglob("evil.py")) and not (variant / "custom_generate").exists()
    assert_weights_of(load(variant), stock)
    AutoProcessor.from_pretrained(variant, trust_remote_code=True)


def test_the_check_of_an_export_runs_no_code_of_the_base(stock, tmp_path, ran):
    base = armed(stock, tmp_path / "base", ran)
    model, info = check_variant.load_base(str(base), torch.float32)
    assert_weights_of(model, stock)
    assert not info["missing_keys"] and "generate" not in vars(model)


def test_code_keys_at_any_depth():
    values = {"a": 1, "b": {key: "evil" for key in CODE_KEYS}, "c": [{"auto_map": {}}, 2]}
    assert without_code(values) == {"a": 1, "b": {}, "c": [{}, 2]}


def test_weights_named_in_the_config_of_a_base(stock, tmp_path):
    """transformers 4.57 takes any path there."""
    base = broken(stock, tmp_path / "base")
    edit(base / "config.json", transformers_weights="../mine.safetensors")
    assert "transformers_weights" in refused(base, "--output", tmp_path / "variant")


# -- text towers -------------------------------------------------------------------------------------------------------


def armed_tower(folder, ran):
    save_clip(folder)
    (folder / "evil.py").write_text(code(ran, "Tokenizer", "Config", "Model"))
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, _attn_implementation="evil/kernel")
    edit(folder / "adapter_config.json", base_model_name_or_path=str(ran), peft_type="LORA")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickle(str(ran))))
    return str(folder)


def test_a_text_tower_runs_no_code_and_asks_nothing(tmp_path, text_tower, ran, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked the user"))
    tower = armed_tower(tmp_path / "clip", ran)
    ids, mask = question_segments(tower, QUESTION)
    plain_ids, plain_mask = question_segments(text_tower, QUESTION)
    assert torch.equal(ids, plain_ids) and torch.equal(mask, plain_mask)
    space, plain = JointSpace(tower, 16), JointSpace(text_tower, 16)
    assert torch.equal(space.place_questions(ids, mask), plain.place_questions(ids, mask))


def test_a_text_tower_without_tokenizer_or_safetensors(tmp_path):
    tower = Path(save_clip(tmp_path / "clip"))
    for path in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tower / path).unlink(missing_ok=True)
    with pytest.raises(OSError, match="no tokenizer.json and no vocab.json with merges.txt"):
        question_segments(str(tower), QUESTION)
    torch.save(load_file(tower / "model.safetensors"), tower / "pytorch_model.bin")
    (tower / "model.safetensors").unlink()
    with pytest.raises(OSError, match="text_tower=.*no model.safetensors .*can run code"):
        JointSpace(str(tower), 16)


def test_a_text_tower_with_a_vocabulary_and_merges_alone(tmp_path, text_tower):
    """As the first CLIP checkpoints were published."""
    tower = Path(shutil.copytree(text_tower, tmp_path / "clip"))
    model = json.loads((tower / "tokenizer.json").read_text())["model"]
    (tower / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tower / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tower / "tokenizer.json").unlink()
    for found, expected in zip(question_segments(str(tower), QUESTION), question_segments(text_tower, QUESTION)):
        assert torch.equal(found, expected)
