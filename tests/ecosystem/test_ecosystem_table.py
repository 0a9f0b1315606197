"""The table of what works with which tool: how its rows are written down, and what the command makes of them."""

import json
import sys

import check_ecosystem
import pytest
import transformers
from check_ecosystem import as_cell, as_document, read_rows
from conftest import FAMILY
from places import TESTS

ROWS = """
import os
import pytest

@pytest.mark.ecosystem("A thing")
def test_fine(case, note):
    note("as it should")

@pytest.mark.ecosystem("A long thing", families=False)
def test_long(case, note):
    note("long")

@pytest.mark.ecosystem("A missing thing")
def test_missing(case, note):
    pytest.importorskip("no_such_package")

@pytest.mark.ecosystem("A broken thing")
def test_broken(case, note):
    note("never said")
    raise RuntimeError("no such|thing\\nand more")

@pytest.mark.ecosystem("A deadly thing")
def test_deadly(case, note):
    os._exit(7)

@pytest.mark.ecosystem("A thing that comes too late")
def test_late(case, note):
    note("said")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command over rows of its own, in a repository that has nothing else."""
    folder = tmp_path / "tests" / "ecosystem"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text((TESTS / "ecosystem" / "conftest.py").read_text() + "\nCase = str\n")
    (folder / "test_rows_of_this.py").write_text(ROWS)
    paths = [str(TESTS.parent), str(TESTS / "support"), str(TESTS.parent / "scripts")]
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = ecosystem: x\npythonpath = " + " ".join(paths) + "\n")
    (tmp_path / "tests" / "conftest.py").write_text("import code_package\n")
    monkeypatch.setattr(check_ecosystem, "ROOT", tmp_path)

    def run(rows, *more):
        check_ecosystem.main(
            [
                "--output",
                str(tmp_path / "table"),
                "--python",
                sys.executable,
                "--rows",
                rows,
                "--variant",
                "llava",
                *more,
            ]
        )

    return run


def states(tmp_path) -> dict:
    (found,) = json.loads((tmp_path / "table.json").read_text())
    assert found["transformers"] == transformers.__version__ and found["packages"]["torch"]
    return {(row["variant"], row["row"]): (row["state"], row["note"]) for row in found["rows"]}


@pytest.mark.slow
def test_rows_that_work_or_cannot_be_measured_end_well(run, tmp_path):
    run("fine or missing or long", str(tmp_path))
    found = states(tmp_path)
    assert found["llava", "fine"] == ("works", "as it should")
    assert found["llava", "missing"][0] == "not measured" and "no_such_package" in found["llava", "missing"][1]
    assert ("llava", "long") not in found and found[str(tmp_path), "long"] == ("works", "long")
    page = (tmp_path / "table.md").read_text()
    assert "| A thing | yes: as it should |" in page and "| A missing thing | not measured: could not import" in page


@pytest.mark.slow
def test_a_row_that_fails_is_an_error_and_a_run_that_breaks_off_leaves_no_row_that_looks_measured(run, tmp_path):
    with pytest.raises(SystemExit, match="1 failed: transformers .*: llava: broken") as error:
        run("fine or broken or deadly or late")
    assert error.value.code != 0
    found = states(tmp_path)
    assert found["llava", "fine"] == ("works", "as it should")
    assert found["llava", "broken"] == ("fails", "RuntimeError: no such|thing")
    for name in ("deadly", "late"):
        assert found["llava", name] == ("not measured", "the run ended before this row")
    assert "| A broken thing | **no**: RuntimeError: no such\\|thing |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    "found, status, message",
    [
        ({}, 4, "nothing was measured, pytest ended with 4"),
        ({"transformers": "5.0", "rows": []}, 2, "nothing was measured, pytest ended with 2"),
        ({"transformers": "5.0", "rows": [{"state": "works"}]}, 1, "transformers 5.0: pytest ended with 1"),
    ],
)
def test_a_run_without_rows_or_that_ends_badly_is_an_error(monkeypatch, tmp_path, found, status, message):
    monkeypatch.setattr(check_ecosystem, "measure", lambda *args: (found, status))
    monkeypatch.setattr(check_ecosystem, "as_document", lambda *args: "")
    with pytest.raises(SystemExit, match=message):
        check_ecosystem.main(["--output", str(tmp_path / "table"), "--python", "python"])
    assert (tmp_path / "table.md").exists() == bool(found.get("rows"))


def row(state="works", note="as said", name="eager", variant="llava", title="Eager"):
    return {"variant": variant, "row": name, "title": title, "state": state, "note": note}


def of_version(version, *rows):
    return {"transformers": version, "packages": {"torch": "1"}, "date": "2026-01-01", "rows": list(rows)}


@pytest.mark.parametrize(
    "found, cell",
    [
        (row(), "yes: as said"),
        (row("fails", "Error: a|b"), "**no**: Error: a\\|b"),
        (row("not measured", "no peft"), "not measured: no peft"),
        (None, "not measured: this run has no such row"),
    ],
)
def test_a_cell_tells_what_was_not_measured(found, cell):
    assert as_cell(found) == cell


def test_a_document_has_a_column_for_each_line_and_keeps_the_text_below():
    old = "anything\n| old | yes: of an earlier run |\n" + check_ecosystem.END + "\n\nNotes by hand.\n"
    page = as_document([of_version("4.57.6", row()), of_version("5.0", row(name="lora", title="LoRA"))], old)
    assert "| Eager | yes: as said | not measured: this run has no such row |" in page
    assert "| LoRA | not measured: this run has no such row | yes: as said |" in page
    assert "- transformers 5.0: torch 1; 2026-01-01" in page
    assert "earlier run" not in page and page.endswith("Notes by hand.\n")


def test_the_last_line_of_a_row_counts(tmp_path):
    head = of_version("5.0")
    del head["rows"]
    lines = [head, row("not measured", "the run ended before this row"), row(note="said")]
    (tmp_path / "rows").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_rows(tmp_path / "rows") == {**head, "rows": [row(note="said")]}
    assert read_rows(tmp_path / "none") == {}


def test_an_interpreter_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="--python /no/python: No such file"):
        check_ecosystem.main(["--output", str(tmp_path / "table"), "--python", "/no/python"])


def test_every_family_can_be_checked():
    from rediprune.configuration_rediprune import CONFIGS

    assert set(FAMILY) == set(CONFIGS)
