"""Workarounds for single versions of transformers, each in the form that every version has of it."""

import types

import pytest
import torch
import transformers
from rediprune import hub_versions
from rediprune.hub_versions import (
    TESTED,
    clip_transformer,
    layer_states,
    loading_options,
    no_masks,
    register_for_serving,
)

REGISTER, GET = "register_checkpoint_conversion_mapping", "get_checkpoint_conversion_mapping"


class Stock:
    _checkpoint_conversion_mapping = {"^language_model.model": "model.language_model"}


def test_the_conversion_of_the_stock_class_is_registered(monkeypatch):
    registered = []
    monkeypatch.setattr(hub_versions, GET, lambda model_type: f"mapping of {model_type}")
    monkeypatch.setattr(hub_versions, REGISTER, lambda *args, **kwargs: registered.append((args, kwargs)))
    assert loading_options("ours", "theirs", Stock) == {}
    assert registered == [(("ours", "mapping of theirs"), {"overwrite": True})]


def test_without_a_registry_the_conversion_of_the_stock_class_is_passed(monkeypatch):
    monkeypatch.setattr(hub_versions, REGISTER, None)
    mapping = loading_options("ours", "theirs", Stock)["key_mapping"]
    assert mapping.items() >= Stock._checkpoint_conversion_mapping.items()
    assert "model.vision_tower.vision_model." in mapping.values()


@pytest.mark.parametrize(
    "changed",
    [
        {REGISTER: lambda model_type, mapping: None},
        {REGISTER: lambda *, name, mapping, overwrite: None},
        {GET: lambda model_type, model_class: []},
    ],
)
def test_a_registry_with_another_signature_is_told_by_its_version(changed, monkeypatch):
    current = {GET: lambda model_type: [], REGISTER: lambda model_type, mapping, overwrite=False: None}
    for name, function in {**current, **changed}.items():
        monkeypatch.setattr(hub_versions, name, function)
    with pytest.raises(TypeError) as error:
        loading_options("ours", "theirs", Stock)
    assert str(error.value).startswith(f"transformers {transformers.__version__} takes other arguments")
    assert f"tested with transformers {TESTED}; install one of these" in str(error.value) and "'theirs'" in str(
        error.value
    )
    assert isinstance(error.value.__cause__, TypeError)


def test_other_errors_of_the_registry_are_its_own(monkeypatch):
    monkeypatch.setattr(hub_versions, GET, lambda model_type: {}[model_type])
    monkeypatch.setattr(hub_versions, REGISTER, print)
    with pytest.raises(KeyError, match="theirs"):
        loading_options("ours", "theirs", Stock)


def test_model_types_are_listed_for_serving_where_there_is_a_list(monkeypatch):
    names = {"known": "Known"}
    monkeypatch.setattr(hub_versions, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", names)
    register_for_serving("ours", "Ours")
    register_for_serving("known", "Other")
    assert names == {"known": "Known", "ours": "Ours"}
    monkeypatch.setattr(hub_versions, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    register_for_serving("another", "Another")


class OldLayer:
    def forward(self, states, attention_mask, causal_attention_mask, output_attentions=False):
        return (states + 1,)


class NewLayer:
    def forward(self, states, attention_mask, **kwargs):
        return states + 1


@pytest.mark.parametrize("layer, number", [(OldLayer(), 2), (NewLayer(), 1)], ids=["4.57", "5.x"])
def test_a_layer_of_either_line_gives_its_states(layer, number):
    states = torch.zeros(2, 3, 4)
    assert no_masks(layer) == (None,) * number
    assert torch.equal(layer_states(layer.forward(states, *no_masks(layer))), states + 1)


def test_the_transformer_of_a_tower_of_either_line():
    inner = types.SimpleNamespace(encoder=None)
    assert clip_transformer(inner) is inner
    assert clip_transformer(types.SimpleNamespace(vision_model=inner)) is inner
