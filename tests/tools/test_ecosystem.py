"""The table of what works with which tool: its rows, how they are written down, and what the command says."""

import json

import check_ecosystem
import pytest
import transformers
from check_ecosystem import add_rows, as_cell, as_document, run_row
from ecosystem_case import Case, families, save_random
from ecosystem_rows import ROWS

# What takes long: the others run here, with every family where they are quick.
SLOW = {
    "compiled",
    "serve",
    "published",
    "finetune",
    "data_parallel",
    "share_torchrun",
    "share_accelerate",
    "tensor_parallel",
}
TITLE = "A small random `llava`"


def result(state="works", note="as said", date="2026-01-01", **packages):
    return {"state": state, "note": note, "packages": packages, "date": date}


@pytest.fixture(scope="module", params=["llava", "video_llava"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_random(request.param, folder)
    return Case(str(folder))


@pytest.mark.parametrize("name", [name for name in ROWS if name not in SLOW])
def test_a_row_works(case, name):
    found = run_row(case, name)
    if found["state"] == "not run":
        pytest.skip(found["note"])
    assert found["state"] == "works", found["note"]


def run(*arguments):
    check_ecosystem.main([*map(str, arguments)])


def fails(case):
    raise RuntimeError("no such thing\nand more")


@pytest.mark.parametrize("row, state", [("eager", "works"), ("broken", "fails"), ("missing", "not run")])
def test_a_row_that_fails_ends_the_command_with_an_error(monkeypatch, tmp_path, row, state):
    def missing(case):
        raise NotImplementedError("no server here")

    monkeypatch.setitem(ROWS, "broken", ("A broken thing", fails))
    monkeypatch.setitem(ROWS, "missing", ("A missing thing", missing))
    arguments = ("--output", tmp_path / "table", "--family", "llava", "--rows", row)
    if state == "fails":
        with pytest.raises(SystemExit, match="1 failed: A small random `llava`: broken") as error:
            run(*arguments)
        assert error.value.code != 0
    else:
        run(*arguments)
    found = json.loads((tmp_path / "table.json").read_text())[TITLE][transformers.__version__][row]
    assert found["state"] == state
    assert as_cell(found) in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "found, cell",
    [
        (result(), "yes: as said"),
        (result("fails", "Error: a|b"), "**no**: Error: a\\|b"),
        (result("not run", "not installed: peft"), "not run: not installed: peft"),
        (None, "not run"),
    ],
)
def test_a_cell_tells_what_was_not_measured(found, cell):
    assert as_cell(found) == cell


def test_rows_are_added_to_those_of_earlier_runs_with_their_own_packages(tmp_path):
    output = tmp_path / "table"
    add_rows(output, TITLE, {"eager": result(torch="1"), "lora": result(torch="1")})
    (tmp_path / "table.md").write_text((tmp_path / "table.md").read_text() + "\nNotes by hand.\n")
    add_rows(output, TITLE, {"eager": result(note="again", torch="2", date="2026-02-02")})
    add_rows(output, "Another", {"eager": result(torch="3")})
    page = (tmp_path / "table.md").read_text()
    assert (
        "torch 1; 2026-01-01 (lora)" in page
        and "torch 2; 2026-02-02 (eager)" in page
        and "torch 3; 2026-01-01\n" in page
    )
    assert page.count("yes: again") == 1 and page.count("yes: as said") == 2
    assert page.endswith("Notes by hand.\n") and page.count("Notes by hand.") == 1


def test_a_version_that_lacks_a_row_has_a_cell_for_it():
    page = as_document({TITLE: {"4.57.6": {"eager": result()}, "5.0": {"lora": result()}}})
    assert '| `attn_implementation="eager"` | yes: as said | not run |' in page
    assert "torchao" not in page


def test_a_record_that_cannot_be_read(tmp_path):
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(SystemExit, match="table.json cannot be read .*; choose another --output"):
        run("--output", tmp_path / "table")


def test_every_family_can_be_checked():
    from rediprune.configuration_rediprune import CONFIGS

    assert set(families()) == set(CONFIGS)
