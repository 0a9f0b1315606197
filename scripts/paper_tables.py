"""Tables 1 to 4 of the ReDiPrune paper (paper_tables.json): what measures them, and the tables with both figures."""

import json
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from lmms_table import read_json, read_run
from repository import ROOT
from tflops import prefill
from writing import table

UNPRUNED = "original"
LOADING_SECONDS = 60  # of a run, before its first sample: an assumption, like `other_seconds` of the benchmarks
SPEED = "speed"  # the benchmark that is a run of benchmark.py
RECORD = "run.json"  # of a finished run
ESTIMATE = (
    f"estimate, of nothing measured here: for each run {LOADING_SECONDS} s to load, and for each sample the end-to-end "
    "latency that the paper's Table 3 has (A100; ReDiPrune's for methods that are not in it) and an assumed time to read "
    "the medium, to write a long answer and to ask the judge (other_seconds in paper_tables.json)"
)


class Incomplete(Exception):
    """A run that ended without the figures that it was for."""


class Run(NamedTuple):
    """One backbone with one method on one benchmark; its folder has the same three names."""

    backbone: str
    method: str
    benchmark: str

    def __str__(self):
        return "/".join(self)


def read_data(local: bool = False) -> dict:
    """Backbones, methods, benchmarks and tables, of the paper or of the small checkpoint of this repository."""
    data = json.loads((ROOT / "scripts" / "paper_tables.json").read_text(encoding="utf-8"))
    return {**data, **data["local"]} if local else data


def runs_of(data: dict, chosen: dict) -> list:
    """The runs that the chosen tables are made of, each once, but for the methods that are not here.

    Args:
        data: as `read_data` gives it.
        chosen: lists of `tables`, `backbones`, `methods` and `benchmarks`; `None` is all of them.
    """
    found = {}
    for name in chosen["tables"] or data["tables"]:
        for backbone, method, _ in data["tables"][name]["rows"]:
            for column in data["tables"][name]["columns"]:
                found |= {Run(backbone, method, benchmark): None for benchmark in column["of"]}
    wanted = [chosen[kind] for kind in ("backbones", "methods", "benchmarks")]
    found = [run for run in found if all(names is None or name in names for name, names in zip(run, wanted))]
    return [run for run in found if "not_here" not in data["methods"][run.method]]


def hours_of(data: dict, run: Run, limit=None, seconds_per_sample=None) -> float:
    """An estimate, see `ESTIMATE`."""
    benchmark = data["benchmarks"][run.benchmark]
    samples = benchmark["samples"] if limit is None or run.benchmark == SPEED else min(limit, benchmark["samples"])
    if seconds_per_sample is None:
        rows = data["tables"]["3"]["rows"]
        latency = {method: figures[1] for backbone, method, figures in rows if backbone == run.backbone}
        seconds_per_sample = (latency.get(run.method) or latency.get("rediprune") or 0) + benchmark["other_seconds"]
    return (LOADING_SECONDS + samples * seconds_per_sample) / 3600


# -- what a run measured -----------------------------------------------------------------------------------------------


def figures_of(data: dict, run: Run, folder: Path) -> tuple:
    """The figures that a run left in a folder, by the names that the columns have, and what it was measured on.

    Raises:
        Incomplete: a figure is missing.
    """
    if run.benchmark == SPEED:
        return figures_of_speed(run, folder)
    if not (any(folder.rglob("*_results.json")) and (folder / "times.json").exists()):
        raise Incomplete("lmms-eval left no results")
    values, figures, missing = {}, {}, []
    for task, metrics in read_run(f"{run}={folder}")["tasks"].items():
        values |= {f"{task} {metric}": figure["value"] for metric, figure in metrics.items()}
    for name, figure in data["benchmarks"][run.benchmark]["figures"].items():
        missing += [metric for metric in figure["mean_of"] if metric not in values]
        figures[name] = figure["scale"] * mean(values.get(metric, 0) for metric in figure["mean_of"])
    if missing:
        raise Incomplete(f"lmms-eval's results lack {', '.join(missing)}; they have {', '.join(values) or 'nothing'}")
    times, layers = read_json(folder / "times.json"), data["backbones"][run.backbone]["language"]
    tokens = [(request["visual_tokens"], request["prompt_tokens"]) for request in times["batches"]]
    figures["visual tokens"] = mean(visual for visual, _ in tokens)
    figures["TFLOPs"] = mean(prefill(visual, prompt - visual, *layers) for visual, prompt in tokens)
    return figures, f"{times['device']}, {times['dtype']}"


def figures_of_speed(run: Run, folder: Path) -> tuple:
    report = read_json(folder / "speed.json")
    name = "unpruned" if run.method == UNPRUNED else run.method
    (row,) = (row for row in report["rows"] if row["method"] == name)
    if row["error"]:
        raise Incomplete(f"benchmark.py: {row['error']}")
    seconds = {stage: median(samples) for stage, samples in row["samples"].items()}
    figures = {
        "prefill": sum(seconds[stage] for stage in ("vision encoder", "selection", "projector", "prefill")),
        "end to end": seconds["end to end"],
        "memory": (report["weights_bytes"] + row["peak_bytes"]) / 2**30,
    }
    environment = report["environment"]
    return figures, f"{environment.get('gpu', environment['device'])}, {environment['dtype']}"


# -- tables ------------------------------------------------------------------------------------------------------------


def measured(records: dict, backbone: str, method: str, column: dict):
    """The measured figure of a cell, the mean over its benchmarks; `None` where a run for it is missing."""
    share = column["figure"] == "share of TFLOPs"
    name, methods = ("TFLOPs", (method, UNPRUNED)) if share else (column["figure"], (method,))
    runs = [[Run(backbone, name, benchmark) for name in methods] for benchmark in column["of"]]
    if any(run not in records for pair in runs for run in pair):
        return None
    values = [[records[run]["figures"][name] for run in pair] for pair in runs]
    return mean(100 * pair[0] / pair[1] if share else pair[0] for pair in values)


def rows_of(data: dict, records: dict, tables=None) -> list:
    """The rows of the tables; each cell has what the paper prints (`paper`) and what was measured here, or `None`."""
    rows = []
    for name in tables or data["tables"]:
        columns = data["tables"][name]["columns"]
        for backbone, method, figures in data["tables"][name]["rows"]:
            cells = [
                {"column": column["title"], "paper": paper, "measured": measured(records, backbone, method, column)}
                for column, paper in zip(columns, figures)
            ]
            rows.append({"table": name, "backbone": backbone, "method": method, "cells": cells})
    return rows


def number(value, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def markdown(data: dict, rows: list, remarks: list) -> str:
    """The tables in Markdown, each with the notes on what the paper's own figures hide."""
    lines = ['Columns "paper" are the paper\'s own figures, columns "measured" those of runs made here; `-`: none.', ""]
    lines += [f"- {remark}" for remark in remarks]
    for name in dict.fromkeys(row["table"] for row in rows):
        content, text = data["tables"][name], []
        for row in (row for row in rows if row["table"] == name):
            text.append([data["backbones"][row["backbone"]]["title"], data["methods"][row["method"]]["title"]])
            for cell in row["cells"]:
                text[-1] += [number(cell["paper"], 6), number(cell["measured"], 5)]
        header = [f"{column['title']}: {whose}" for column in content["columns"] for whose in ("paper", "measured")]
        lines += ["", f"## Table {name}. {content['title']}", "", *table(["backbone", "method", *header], text), ""]
        lines += [f"- {note}" for note in [*content["notes"], *absent(data, [name])]]
    return "\n".join(lines) + "\n"


def absent(data: dict, tables=None) -> list:
    """The methods of these tables that this project does not have, each with the reason."""
    names = dict.fromkeys(method for name in tables or data["tables"] for _, method, _ in data["tables"][name]["rows"])
    methods = [data["methods"][name] for name in names]
    return [f"not here: {method['title']}, {method['not_here']}" for method in methods if "not_here" in method]
