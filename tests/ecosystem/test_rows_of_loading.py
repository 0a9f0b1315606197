"""Rows of `docs/ecosystem.md`: how weights are loaded, in which precision, and where they lie."""

import pytest
import torch
import transformers

NOT_QUANTISED = ["vision_tower", "multi_modal_projector", "lm_head"]


@pytest.mark.ecosystem("`dtype=torch.bfloat16`")
def test_bfloat16(case, note):
    note(case.close(case.load(dtype=torch.bfloat16), 0.1))


@pytest.mark.ecosystem("`dtype=torch.float16`")
def test_float16(case, note):
    note(case.close(case.load(dtype=torch.float16), 0.02))


@pytest.mark.ecosystem('`attn_implementation="eager"`')
def test_eager(case, note):
    note(case.same(case.load(attn_implementation="eager")))


@pytest.mark.ecosystem("`device_map` with layers offloaded to disk")
def test_offload(case, note, tmp_path):
    pytest.importorskip("accelerate")
    on_disk = ("multi_modal_projector", "language_model")
    parts = [*case.model.model.named_children(), *case.model.model.named_parameters(recurse=False)]
    places = {f"model.{name}": "disk" if name in on_disk else "cpu" for name, _ in parts} | {"lm_head": "cpu"}
    model = case.load(device_map=places, offload_folder=tmp_path)
    note(f"{case.same(model)}; on disk: {', '.join(k for k, v in places.items() if v == 'disk')}")


@pytest.mark.ecosystem('`device_map="auto"` with little CPU memory')
def test_offload_auto(case, note, tmp_path):
    pytest.importorskip("accelerate")
    size = sum(parameter.numel() * 4 for parameter in case.model.parameters())
    model = case.load(device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=tmp_path)
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    note(f"{case.same(model)}; places: {', '.join(sorted(places))}")


@pytest.mark.ecosystem("weight-only int8 on the CPU (torchao)")
def test_torchao_int8(case, note):
    quantization = pytest.importorskip("torchao.quantization")
    int8 = quantization.Int8WeightOnlyConfig()
    config = transformers.TorchAoConfig(int8, modules_to_not_convert=NOT_QUANTISED)
    note(close_and_answer(case, case.load(quantization_config=config)))


@pytest.mark.ecosystem("weight-only int8 on the CPU (quanto)")
def test_quanto_int8(case, note):
    pytest.importorskip("optimum.quanto")
    config = transformers.QuantoConfig(weights="int8", modules_to_not_convert=NOT_QUANTISED)
    note(close_and_answer(case, case.load(quantization_config=config)))


def close_and_answer(case, model) -> str:
    same = "the same answer" if case.answer(model) == case.expected else "another answer"
    return f"{case.close(model, 0.1)}; {same}"
