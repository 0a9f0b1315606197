"""Linked variants: what is saved as a link gives the weights that were saved, to the last value."""

import json
import shutil

import pytest
import torch
from exporting import run
from rediprune.hub_linking import checksum_weights, same_weights
from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration as Model
from tiny import random_video, tiny_processor
from transformers import GenerationConfig

NAMES = ("model.image_newline", "model.multi_modal_projector.linear_1.weight", "lm_head.weight",
         "model.vision_tower.vision_model.embeddings.position_embedding.weight")  # fmt: skip


@pytest.fixture(scope="module")
def variant(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linked") / "variant"
    run(base, "--link", "--keep-ratio", 0.3, "--output", folder)
    return folder


@pytest.fixture
def model(variant):
    return Model.from_pretrained(variant)


def is_link(folder):
    """Whether the folder has a link and no weights; it has one of the two."""
    has_weights = (folder / "model.safetensors").exists()
    assert ("weights_from" in json.loads((folder / "config.json").read_text())) != has_weights
    return not has_weights


def assert_saves_itself(model, folder, link, **options):
    """What is loaded from where it was saved has its weights, and is a link or not."""
    model.save_pretrained(folder, **options)
    assert is_link(folder) == link
    expected = model.state_dict()
    found = Model.from_pretrained(folder, dtype=model.dtype).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def parameter_named(model, name):
    """In 5.x the vision tower has one level less."""
    parameters = dict(model.named_parameters())
    return parameters.get(name, parameters.get(name.replace("vision_tower.vision_model.", "vision_tower.")))


@pytest.mark.parametrize("name", NAMES)
def test_any_value_that_changes_is_saved(model, tmp_path, name):
    values = parameter_named(model, name).data.view(-1)
    assert_saves_itself(model, tmp_path / "before", link=True)
    for place in {0, 1, 64, len(values) // 2, len(values) - 2, len(values) - 1} & set(range(len(values))):
        was = values[place].item()
        values[place] = torch.nextafter(values[place], torch.tensor(torch.inf))  # the smallest change that there is
        assert_saves_itself(model, tmp_path / f"{place}", link=False)
        values[place] = was
        model.save_pretrained(tmp_path / f"{place}-again")
        assert is_link(tmp_path / f"{place}-again")


def test_values_that_change_places(model, tmp_path):
    """A sum of them would be the same."""
    weight = parameter_named(model, NAMES[2]).data
    weight[[0, 1]] = weight[[1, 0]]
    assert_saves_itself(model, tmp_path, link=False)


def test_other_parameters(model, tmp_path):
    checksums = checksum_weights(model)
    assert same_weights(model, checksums)
    model.value_head = torch.nn.Linear(4, 1)
    assert not same_weights(model, checksums)
    del model.value_head, model.lm_head
    assert not same_weights(model, checksums)


def test_a_resized_vocabulary(model, tmp_path):
    model.resize_token_embeddings(70)
    assert_saves_itself(model, tmp_path, link=False)


def test_another_dtype(variant, tmp_path):
    """That holds the same values changes nothing; one that rounds them does."""
    half = Model.from_pretrained(variant, dtype=torch.bfloat16)
    assert_saves_itself(half, tmp_path / "as loaded", link=True)
    half.float().save_pretrained(tmp_path / "wider")
    assert is_link(tmp_path / "wider")
    first = parameter_named(half, NAMES[1]).data.view(-1)[:1]
    was = first.clone()
    first.copy_(torch.nextafter(first, torch.tensor(torch.inf)))  # less than bfloat16 can tell
    assert not same_weights(half, half._linked[-1])
    first.copy_(was)
    assert same_weights(half.bfloat16(), half._linked[-1])
    rounded = Model.from_pretrained(variant, dtype=torch.float32).bfloat16()
    assert_saves_itself(rounded, tmp_path / "rounded", link=False)


def test_a_state_dict_of_the_caller(model, tmp_path):
    """As trainers pass it, whose model holds a part of the weights."""
    trained = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "trained", state_dict=trained)
    assert not is_link(tmp_path / "trained")
    found = Model.from_pretrained(tmp_path / "trained").state_dict()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    model.save_pretrained(tmp_path / "positional", True, trained)
    assert not is_link(tmp_path / "positional")
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists()


def test_a_share_of_a_tensor(tmp_path):
    """Under tensor parallelism each process looks at its own."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = torch.nn.Linear(4, 3)
        module.weight = torch.nn.Parameter(distribute_tensor(module.weight.data, DeviceMesh("cpu", [0])))
        checksums = checksum_weights(module)
        assert same_weights(module, checksums)
        module.weight.data.to_local()[-1, -1] += 1
        assert not same_weights(module, checksums)
    finally:
        torch.distributed.destroy_process_group()


def test_parts_of_tensors():
    """A tensor that consists of others, as a quantised one does, is looked at part by part."""

    class Pair(torch.Tensor):
        @staticmethod
        def __new__(cls, *parts):
            return torch.Tensor._make_wrapper_subclass(cls, parts[0].shape, dtype=parts[0].dtype)

        def __init__(self, *parts):
            self.parts = parts

        first = property(lambda self: self.parts[0])
        second = property(lambda self: self.parts[1])

        def __tensor_flatten__(self):
            return ["first", "second", "parts"], None  # newer ones name what is no tensor, too

        def detach(self):
            return self

        __torch_dispatch__ = torch._C._disabled_torch_function_impl

    module = torch.nn.Module()
    pair = Pair(torch.zeros(3), torch.zeros(5, dtype=torch.int8))
    module.named_parameters = lambda: [("pair", pair)]
    checksums = checksum_weights(module)
    assert same_weights(module, checksums)
    pair.second[4] = 1
    assert not same_weights(module, checksums)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights(variant, base, tmp_path, place):
    """They are read again and again, and cannot be changed where they are."""
    pytest.importorskip("accelerate")
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": place, "model.image_newline": "cpu"}
    device_map |= {"model.language_model": place, "lm_head": "cpu"}
    model = Model.from_pretrained(variant, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    inputs = tiny_processor(keep_ratio=0.3)(text="<video> where", videos=random_video())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, Model.from_pretrained(variant)(**inputs).logits)
    model.save_pretrained(tmp_path / "same")
    assert is_link(tmp_path / "same")
    parameter_named(model, NAMES[2]).data[-1, -1] += 1
    assert not same_weights(model, model._linked[-1])
    on_cpu = Model.from_pretrained(variant)
    assert same_weights(on_cpu, on_cpu._linked[-1])
    if place == "disk":  # what was not seen when it was loaded may be anything
        assert not same_weights(on_cpu, model._linked[-1]) and not same_weights(model, on_cpu._linked[-1])


def test_the_generation_config_is_the_variants_own(base, variant, tmp_path):
    """Not that of the base, which is somebody else's file."""
    assert GenerationConfig.from_pretrained(base).max_new_tokens == 4
    folder = tmp_path / "variant"
    shutil.copytree(variant, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 7}))
    assert Model.from_pretrained(folder).generation_config.max_new_tokens == 7
    given = Model.from_pretrained(folder, generation_config=GenerationConfig(max_new_tokens=3))
    assert given.generation_config.max_new_tokens == 3
    path.unlink()
    without = Model.from_pretrained(folder)
    assert without.generation_config.max_new_tokens != 4 and without.generation_config.eos_token_id == 2
    inputs = tiny_processor(keep_ratio=0.3)(text="<video> where", videos=random_video())
    without.generate(**inputs, max_new_tokens=2)
    path.write_text("{")
    with pytest.raises(OSError, match="generation_config.json"):
        Model.from_pretrained(folder)


def test_weights_of_another_precision_by_name(base, variant, tmp_path):
    """`variant=` of `from_pretrained` chooses among the files of the base."""
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    linked = tmp_path / "linked"
    shutil.copytree(variant, linked)
    config = json.loads((linked / "config.json").read_text())
    (linked / "config.json").write_text(json.dumps({**config, "weights_from": str(folder)}))
    Model.from_pretrained(linked, variant="fp16")
    with pytest.raises(OSError, match="no model.safetensors"):
        Model.from_pretrained(linked)


def test_a_hub_id_that_is_a_folder_here(variant, tmp_path, monkeypatch):
    """transformers would take the folder, whatever `weights_revision` says."""
    linked = tmp_path / "linked"
    shutil.copytree(variant, linked)
    config = json.loads((linked / "config.json").read_text())
    (linked / "config.json").write_text(json.dumps({**config, "weights_from": "me/base", "weights_revision": "0" * 40}))
    (tmp_path / "me" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="'me/base' is a Hub id, but the working directory holds a folder of this name"):
        Model.from_pretrained(linked)
