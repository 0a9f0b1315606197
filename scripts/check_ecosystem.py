"""Runs variants through the tools around transformers, on both lines of transformers, and writes the tables of what works.

The rows are the tests of tests/ecosystem. Each line of transformers runs them in an environment of its own, which is made where it is
missing (bootstrap.py, with requirements-ecosystem.txt), and knows the interpreter of the other line. OUTPUT.json and OUTPUT.md hold
what this one run measured, and nothing of earlier ones; text below the tables in OUTPUT.md stays. What could not be measured is
written as such, with the reason. A row that fails, or a run that breaks off, ends the program with 1.

Takes about a quarter of an hour for each line on one core, and 3 GB of memory.

Examples:
    python scripts/check_ecosystem.py --output docs/ecosystem
    python scripts/check_ecosystem.py --output runs/ecosystem --variant checkpoint llava
    python scripts/check_ecosystem.py --output runs/ecosystem --variant my-variant --rows "offload or serve"
    python scripts/check_ecosystem.py --output runs/ecosystem --python .venv-4/bin/python .venv-5/bin/python
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bootstrap import BootstrapError, prepare
from repository import ROOT, fail
from writing import output_prefix, table, write_results

LINES = ("4.57.6", None)  # of transformers; the last is the newest
MARKS = {"works": "yes: ", "fails": "**no**: ", "not measured": "not measured: "}
HEAD = """# What works with which version

Measured on the CPU by `python scripts/check_ecosystem.py --output docs/ecosystem`, whose rows are the tests of `tests/ecosystem`. The
small random models are those of the tests, with weights a quarter as large.
"""
END = "<!-- what stands below this line is kept -->"


# -- the runs ----------------------------------------------------------------------------------------------------------


def interpreters(args) -> list:
    """Those that were named, or those of the environments that `bootstrap.py` makes."""
    if args.python:
        return args.python
    try:
        return [str(prepare(ROOT / ".venv", line, ROOT / "requirements-ecosystem.txt")) for line in LINES]
    except (BootstrapError, OSError) as error:
        fail(str(error))


def measure(python: str, others: list, args) -> tuple:
    """Runs the rows with one interpreter; what they found, and the exit status of pytest."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    variables.pop("OTHER_PYTHON", None)
    if others:
        variables["OTHER_PYTHON"] = others[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        command = [python, "-m", "pytest", "tests/ecosystem", "-m", "ecosystem", "-vv", "--rows-to", str(rows)]
        command += ["--basetemp", str(Path(folder, "work")), *(["-k", args.rows] if args.rows else [])]
        for variant in args.variant:
            command += ["--variant", os.path.abspath(variant) if os.path.isdir(variant) else variant]
        try:
            status = subprocess.run(command, cwd=ROOT, env=variables).returncode
        except OSError as error:
            fail(f"--python {python}: {error.strerror or error}")
        return read_rows(rows), status


def read_rows(path: Path) -> dict:
    """Versions and day of a run, and its rows in their order; the last line of a row counts. `{}` if the run never began."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        return {}
    head, *found = map(json.loads, lines)
    rows = {(row["variant"], row["row"]): row for row in found}
    return {**head, "rows": list(rows.values())}


def failures(run: dict, status: int) -> list:
    """What of a run must end the program with an error."""
    failed = [f"{row['variant']}: {row['row']}" for row in run["rows"] if row["state"] == "fails"]
    return failed if failed or status == 0 else [f"pytest ended with {status}"]


# -- the document ------------------------------------------------------------------------------------------------------


def as_document(runs: list, old: str = "") -> str:
    """
    Args:
        runs: one for each line of transformers, as `read_rows` gives them.
        old: the document so far, of which what stands below `END` is kept.
    """
    lines = [HEAD, *(f"- transformers {run['transformers']}: {measured_with(run)}" for run in runs), ""]
    for variant in dict.fromkeys(row["variant"] for run in runs for row in run["rows"]):
        lines += [f"## {title_of(variant)}", "", *as_table(runs, variant), ""]
    return "\n".join(lines) + "\n" + END + old.partition(END)[2].rstrip("\n") + "\n"


def measured_with(run: dict) -> str:
    return ", ".join(f"{package} {version}" for package, version in run["packages"].items()) + f"; {run['date']}"


def title_of(variant: str) -> str:
    if variant == "checkpoint":
        return "The checkpoint of this repository"
    return f"`{variant}`" if os.path.isdir(variant) else f"A small random `{variant}`"


def as_table(runs: list, variant: str) -> list:
    """A column for each run, and a line for each row that any of them has."""
    columns = [{row["row"]: row for row in run["rows"] if row["variant"] == variant} for run in runs]
    titles = {name: row["title"] for column in columns for name, row in column.items()}
    rows = [[title, *(as_cell(column.get(name)) for column in columns)] for name, title in titles.items()]
    return table(["", *(f"transformers {run['transformers']}" for run in runs)], rows)


def as_cell(row) -> str:
    if row is None:
        return "not measured: this run has no such row"
    return (MARKS[row["state"]] + row["note"]).replace("|", "\\|")


# -- the command -------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the tables go: OUTPUT.json, OUTPUT.md")
    parser.add_argument(
        "--variant",
        nargs="+",
        default=[],
        help="checkpoint, the name of a family (a small random model), or a folder (default: checkpoint and every family)",
    )
    parser.add_argument(
        "--rows", metavar="WORDS", help='names of rows, as of pytest -k: "offload or serve" (default: all)'
    )
    parser.add_argument(
        "--python", nargs="+", metavar="PATH", help="interpreters, one a column (default: environments that are made)"
    )
    args = parser.parse_args(argv)
    args.output = output_prefix(args.output)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    pythons = interpreters(args)
    runs, problems = [], []
    for index, python in enumerate(pythons):
        run, status = measure(python, pythons[:index] + pythons[index + 1 :], args)
        if not run.get("rows"):
            problems.append(f"{python}: nothing was measured, pytest ended with {status}")
            continue
        runs.append(run)
        problems += [f"transformers {run['transformers']}: {problem}" for problem in failures(run, status)]
    if runs:
        page = args.output.with_name(args.output.name + ".md")
        old = page.read_text(encoding="utf-8") if page.exists() else ""
        write_results(args.output, {".json": json.dumps(runs, indent=2) + "\n", ".md": as_document(runs, old)})
    if problems:
        sys.exit(f"{len(problems)} failed: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
