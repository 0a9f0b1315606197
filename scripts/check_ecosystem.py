"""Runs variants through the tools around transformers, and writes down what works on the installed version.

Each row of `ecosystem_rows.py` does its thing for real on the CPU. The results are added to OUTPUT.json, by family, method and
version of transformers; OUTPUT.md gets the tables of all of them, and keeps what stands in it after the tables. A row that cannot
be run here is written as such, and one that fails ends the program with 1. OTHER_PYTHON in the environment is an interpreter with
the other line of transformers, which loads what this one publishes. The packages are those of requirements-ecosystem.txt.

Takes three to ten minutes for each family on one core, and 3 GB of memory.

Examples:
    OTHER_PYTHON=.venv-4/bin/python python scripts/check_ecosystem.py --output docs/ecosystem
    python scripts/check_ecosystem.py --output docs/ecosystem --method rediprune_plus
    python scripts/check_ecosystem.py --output docs/ecosystem --family llava llava_next video_llava
    python scripts/check_ecosystem.py --output runs/ecosystem --model my-variant --rows offload serve
"""

import argparse
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from ecosystem_case import Case, families, variant_folder
from ecosystem_rows import ROWS
from repository import ROOT, environment, fail, output_prefix, write_results

PACKAGES = ("torch", "accelerate", "peft", "torchao", "optimum-quanto", "huggingface_hub", "openai")
MARKS = {"works": "yes: ", "fails": "**no**: ", "not run": "not run: "}
HEAD = """# What works with which version

Measured by `scripts/check_ecosystem.py` on the CPU. \"Not run\" is what it is: nothing was measured there.
"""
END = "<!-- what stands below this line is kept -->"


def run_row(case, name: str) -> dict:
    """What a row found: its state, a note, the packages and the day."""
    title, function = ROWS[name]
    start = time.perf_counter()
    try:
        state, note = "works", function(case)
    except ImportError as error:
        state, note = "not run", f"not installed: {error.name or error}"
    except NotImplementedError as error:
        state, note = "not run", str(error)
    except Exception as error:  # whatever a tool raises is what the table tells of it
        lines = str(error).strip().splitlines() or [""]
        state, note = "fails", f"{type(error).__name__}: {lines[0][:300]}"
    print(f"{state:8} {title}: {note} ({time.perf_counter() - start:.0f} s)", flush=True)
    return {"state": state, "note": note, "packages": package_versions(), "date": environment()["date"]}


def package_versions() -> dict:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


# -- the document ------------------------------------------------------------------------------------------------------


def as_document(record: dict, old: str = "") -> str:
    """
    Args:
        record: rows by name, by version of transformers, by what was tried.
        old: the document so far, of which what stands below `END` is kept.
    """
    lines = [HEAD]
    for tried, by_version in record.items():
        lines += [f"## {tried}", "", *as_table(by_version), ""]
        lines += [f"- transformers {version}: {measured_with(rows)}" for version, rows in sorted(by_version.items())]
        lines.append("")
    return "\n".join(lines) + "\n" + END + old.partition(END)[2].rstrip("\n") + "\n"


def as_table(by_version: dict) -> list:
    """A column for each version, and a line for each row that any of them has."""
    versions = sorted(by_version)
    lines = ["| | " + " | ".join(f"transformers {version}" for version in versions) + " |"]
    lines.append("|---" * (len(versions) + 1) + "|")
    for name, (title, _) in ROWS.items():
        results = [by_version[version].get(name) for version in versions]
        if any(results):
            lines.append(f"| {title} | " + " | ".join(map(as_cell, results)) + " |")
    return lines


def as_cell(result) -> str:
    if result is None:
        return "not run"
    return (MARKS[result["state"]] + result["note"]).replace("|", "\\|")


def measured_with(rows: dict) -> str:
    """The packages and days of the rows, and where they are not of one, which rows are of which."""
    groups = {}
    for name, result in rows.items():
        packages = ", ".join(f"{package} {version}" for package, version in result["packages"].items())
        groups.setdefault(f"{packages}; {result['date']}", []).append(name)
    if len(groups) == 1:
        return next(iter(groups))
    return "; and ".join(f"{text} ({', '.join(names)})" for text, names in groups.items())


# -- the command -------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the tables go: OUTPUT.json, OUTPUT.md")
    parser.add_argument("--model", default=str(ROOT), help="folder of a variant (default: this repository)")
    parser.add_argument(
        "--family",
        nargs="+",
        choices=list(families()),
        help="instead of --model, a small random model of each of these",
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--method", help="another pruning method than that of config.json; a table of its own")
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.show:
        args.output = output_prefix(args.output)
        read_record(args.output)
    return args


def read_record(output: Path) -> dict:
    """What earlier runs wrote; ends the program where it cannot be added to."""
    path = output.with_name(output.name + ".json")
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        fail(
            f"{path} cannot be read ({error}), and results are added to it; choose another --output, or remove that file"
        )


def show(folder: str) -> None:
    """Prints what `published` compares."""
    case = Case(folder)
    logits = case.logits(case.model).tolist()
    print(json.dumps({"version": transformers.__version__, "logits": logits, "answer": case.expected}))


def title_of(args, family) -> str:
    if family is not None:
        tried = f"A small random `{family}`"
    else:
        tried = "The checkpoint of this repository" if args.model == str(ROOT) else f"`{args.model}`"
    return tried if args.method is None else f"{tried}, `{args.method}`"


def add_rows(output: Path, title: str, rows: dict) -> None:
    """Adds rows of this version to what OUTPUT.json holds, and writes the document anew."""
    record, page = read_record(output), output.with_name(output.name + ".md")
    record.setdefault(title, {}).setdefault(transformers.__version__, {}).update(rows)
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    write_results(output, {".json": json.dumps(record, indent=2) + "\n", ".md": as_document(record, old)})


def main(argv=None):
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.show:
        return show(args.model)
    failed = []
    for family in args.family or [None]:
        title = title_of(args, family)
        print(title, flush=True)
        try:
            with variant_folder(args.model, family, args.method) as folder:
                case = Case(folder)
                rows = {name: run_row(case, name) for name in args.rows}
        except (OSError, ValueError) as error:
            fail(str(error))
        add_rows(args.output, title, rows)
        failed += [f"{title}: {name}" for name, result in rows.items() if result["state"] == "fails"]
    if failed:
        sys.exit(f"{len(failed)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
