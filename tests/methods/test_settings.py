"""Keys of the pruning block that methods declare beside themselves, and what one key takes."""

import copy
import json
import pickle
import re

import pytest
from places import ROOT
from rediprune.configuration_rediprune import PruningConfig, ReDiPruneConfig
from rediprune.methods_base import Method
from rediprune.methods_distance import ReDiPrune
from rediprune.methods_registry import INNER_METHODS, METHODS
from rediprune.methods_settings import INNER, SHARED, choice, collect_settings, integer, number


class Every(Method):
    """Every n-th token, from a number on."""

    parameters = {"stride": integer(3, 1), "start": number(0.0, 0, 10)}

    def check(self, values):
        if values["start"] > values["stride"]:
            raise ValueError(f"pruning key start={values['start']!r} is above stride={values['stride']!r}")


@pytest.fixture
def every(monkeypatch):
    monkeypatch.setitem(METHODS, "every", Every())


def test_a_parameter_is_declared_beside_its_method_alone(every, tmp_path):
    block = PruningConfig(method="every", stride=5)
    assert (block.stride, block.start) == (5, 0.0)
    assert list(block.to_dict())[-2:] == ["stride", "start"]
    assert "method='every'" in repr(block) and repr(block).endswith("stride=5, start=0.0)")
    assert block != PruningConfig(method="every") and block == PruningConfig.from_value(block.to_dict())
    for same in (
        copy.copy(block),
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        block.with_budget(0.15),
    ):
        assert same == block and same is not block
    ReDiPruneConfig(pruning=block).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruning"]["stride"] == 5
    loaded = ReDiPruneConfig.from_pretrained(tmp_path, pruning={"start": 1}).pruning
    assert (loaded.stride, loaded.start) == (5, 1.0)


@pytest.mark.parametrize(
    "block, message",
    [
        ({"stride": 0}, "pruning key 'stride' is 0, but must be an integer of at least 1"),
        ({"start": "0"}, r"pruning key 'start' is '0', but must be a number in \[0, 10\]"),
        ({"start": 4}, "pruning key start=4.0 is above stride=3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["every", "rediprune"])
def test_a_parameter_is_checked_whichever_method_is_set(block, message, method, every):
    with pytest.raises(ValueError, match=message):
        PruningConfig(method=method, **block)
    by_attribute = PruningConfig(method=method)
    with pytest.raises(ValueError, match=message):
        for key, value in block.items():
            setattr(by_attribute, key, value)
    assert by_attribute == PruningConfig(method=method)


def test_one_key_of_two_methods_is_one_setting():
    class Again(Method):
        parameters = {"alpha": ReDiPrune.parameters["alpha"]}

    class Other(Method):
        parameters = {"alpha": number(1.0, 0, 2)}

    class Shared(Method):
        parameters = {"scope": choice(None, ("clip",))}

    assert collect_settings({"rediprune": ReDiPrune(), "again": Again()}, {})["alpha"] is ReDiPrune.parameters["alpha"]
    for method, key in ((Other(), "alpha"), (Shared(), "scope")):
        with pytest.raises(
            ValueError, match=f"method 'new' declares .* of its own for pruning key '{key}'.*take that one"
        ):
            collect_settings({"rediprune": ReDiPrune(), "new": method}, {})


@pytest.mark.parametrize("method", [*METHODS.values(), *INNER_METHODS.values()], ids=[*METHODS, *INNER_METHODS])
def test_a_class_documents_its_parameters(method):
    for cls in type(method).__mro__:
        own = cls.__dict__.get("parameters", {}).keys() - getattr(cls.__base__, "parameters", {}).keys()
        for key in own:
            assert re.search(rf"^\s+{key} \(`\w+`, .*\): \S", cls.__doc__, re.MULTILINE), f"{cls.__name__}: {key}"


def test_the_block_documents_the_shared_keys():
    documented = re.findall(r"^        (\w+) \(`\w+`, .*\): \S", PruningConfig.__doc__, re.MULTILINE)
    assert documented == ["method", *SHARED, "inner_method", *INNER]


def test_the_table_of_keys_is_that_of_the_code():
    """docs/methods.md has a row for each key: its default as in config.json, and the methods that declare it."""
    text = (ROOT / "docs" / "methods.md").read_text()
    section = text.partition("\n## Parameters\n")[2].partition("\n## ")[0]
    rows = [re.split(r"\s+\|\s+", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    found = {key.strip("`"): (json.loads(default.strip("`")), names) for key, default, names, *_ in rows}
    expected = {}
    for key, setting in PruningConfig.settings().items():
        units = [*METHODS.items(), *INNER_METHODS.items()]
        names = [f"`{name}`" for name, method in units if key in method.parameters]
        expected[key] = (setting.default, ", ".join(names) or "all")
    assert found == expected


@pytest.mark.parametrize("key, close", [
    ("keepratio", "keep_ratio"), ("treshold", "threshold"), ("merging", "merge_weight"), ("pooling", "video_pooling"), (3, None),
])  # fmt: skip
def test_an_unknown_key_is_told_what_may_be_meant(key, close):
    with pytest.raises(ValueError, match=f"unknown pruning key {key!r}; allowed keys: method, ") as error:
        PruningConfig.from_value({key: 1})
    assert str(error.value).endswith(f"; did you mean {close!r}?" if close else ", seed")
