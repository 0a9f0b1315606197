"""Rows of `docs/ecosystem.md`: tests with the mark `ecosystem("title of the row")`, each for one variant.

A plain run of pytest takes the quick rows of two families. With `--rows-to FILE`, as `scripts/check_ecosystem.py` runs them, all rows
of all variants run, and FILE gets a line of JSON for each: first that it was not measured, and what it found when it ends. So a run
that breaks off leaves no row that looks measured.
"""

import json
import time
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import transformers
from ecosystem_case import Case
from families import FAMILIES
from places import ROOT

FAMILY = {family.name: family for family in FAMILIES}
CHECKPOINT = "checkpoint"
ORDINARY = ["llava", "video_llava"]
PACKAGES = ("torch", "accelerate", "peft", "torchao", "optimum-quanto", "huggingface_hub", "openai")


def pytest_addoption(parser):
    group = parser.getgroup("ecosystem")
    group.addoption("--rows-to", metavar="FILE", help="a line of JSON for each row; runs all rows of all variants")
    group.addoption(
        "--variant",
        action="append",
        metavar="NAME",
        help=f"a family, as a small random model, {CHECKPOINT!r}, or a folder; repeatable",
    )


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("ecosystem"):
        everything = [CHECKPOINT, *FAMILY] if metafunc.config.getoption("--rows-to", default=None) else ORDINARY
        variants = metafunc.config.getoption("--variant", default=None) or everything
        metafunc.parametrize("case", variants, indirect=True, scope="session")


def pytest_collection_modifyitems(config, items):
    """Rows with `families=False` take long, and a small random model would add nothing to them."""
    left_out = [item for item in items if is_row(item) and not belongs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def is_row(item) -> bool:
    return item.get_closest_marker("ecosystem") is not None


def variant_of(item) -> str:
    return item.callspec.params["case"]


def belongs(item) -> bool:
    return item.get_closest_marker("ecosystem").kwargs.get("families", True) or variant_of(item) not in FAMILY


@pytest.fixture(scope="session")
def case(request, tmp_path_factory):
    if request.param in FAMILY:
        folder = tmp_path_factory.mktemp(request.param)
        save_random(FAMILY[request.param], folder)
    else:
        folder = ROOT if request.param == CHECKPOINT else request.param
    return Case(str(folder))


def save_random(family, folder) -> None:
    model, processor = family.model(keep_ratio=0.25), family.processor(keep_ratio=0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.25 if parameter.dim() > 1 else 1)  # the tests' are so large that rounding changes all
    words = range(6, len(processor.tokenizer))  # the rest of the vocabulary decodes to nothing
    model.generation_config.suppress_tokens = [
        token for token in range(model.config.text_config.vocab_size) if token not in words
    ]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture
def note(record_property):
    """Called with what the table tells of a row that works."""
    return lambda text: record_property("note", text)


# -- what is written ---------------------------------------------------------------------------------------------------


def pytest_configure(config):
    path = config.getoption("--rows-to", default=None)
    if path is not None:
        config.pluginmanager.register(RowWriter(path))


class RowWriter:
    def __init__(self, path: str):
        self.path = path

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_row(self, item, state: str, text: str) -> None:
        title = item.get_closest_marker("ecosystem").args[0]
        row = {"variant": variant_of(item), "row": item.originalname.removeprefix("test_"), "title": title}
        self.write({**row, "state": state, "note": text})

    def pytest_collection_finish(self, session):
        self.write(
            {"transformers": transformers.__version__, "packages": packages(), "date": time.strftime("%Y-%m-%d")}
        )
        for item in filter(is_row, session.items):
            self.write_row(item, "not measured", "the run ended before this row")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if is_row(item) and (call.when == "call" or not report.passed):
            self.write_row(item, *outcome(item, call, report))
        return report


def outcome(item, call, report) -> tuple:
    """The state of a row, and what the table tells of it."""
    if report.passed:
        return "works", "; ".join(text for name, text in item.user_properties if name == "note")
    lines = str(call.excinfo.value).strip().splitlines() or [""]
    if report.skipped:
        return "not measured", lines[0]
    return "fails", f"{call.excinfo.typename}: {lines[0][:300]}"


def packages() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found
