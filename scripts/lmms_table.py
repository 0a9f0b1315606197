"""Tables of lmms-eval runs: the nine benchmarks of the ReDiPrune paper, baseline and pruned runs side by side.

Each run is NAME=PATH, where PATH is a `*_results.json` of lmms-eval or a folder that holds some, and times files of the
`rediprune` plug-in. The first run is the baseline: in brackets, the others' share of its figure.

Examples:
    python scripts/lmms_table.py --output runs/table "unpruned=runs/lmms-full" "ReDiPrune 0.15=runs/lmms-0.15"
    python scripts/lmms_table.py --output runs/local "pruned=runs/lmms/20260101_120000_results.json"
"""

import argparse
import json
import statistics
from pathlib import Path

from repository import fail
from writing import output_prefix, table, write_results

# Task, metric, column, and what makes the figure a percentage where lmms-eval gives a share.
COLUMNS = (
    ("activitynetqa", "gpt_eval_accuracy", "ActivityNet-QA", 1),
    ("activitynetqa", "gpt_eval_score", "ActivityNet-QA score", 1),
    ("nextqa_oe_test", "WUPS", "NExT-QA WUPS", 1),
    ("egoschema_subset", "score", "EgoSchema", 100),
    ("videochatgpt_gen", "gpt_eval_score_correctness", "Video-ChatGPT correctness", 1),
    ("videochatgpt_gen", "gpt_eval_score_detailed_orientation", "Video-ChatGPT detail", 1),
    ("videochatgpt_gen", "gpt_eval_score_context", "Video-ChatGPT context", 1),
    ("videochatgpt_temporal", "gpt_eval_score_temporal", "Video-ChatGPT temporal", 1),
    ("videochatgpt_consistency", "gpt_eval_score_consistency", "Video-ChatGPT consistency", 1),
    ("gqa", "exact_match", "GQA", 100),
    ("mme", "mme_perception_score", "MME perception", 1),
    ("mme", "mme_cognition_score", "MME cognition", 1),
    ("pope", "pope_accuracy", "POPE", 100),
    ("pope", "pope_f1_score", "POPE F1", 100),
    ("mmbench_en_dev", "gpt_eval_score", "MMBench-EN", 1),
    ("scienceqa_img", "exact_match", "ScienceQA-IMG", 100),
    ("rediprune_world", "accuracy", "generated videos", 100),
    ("rediprune_world_image", "accuracy", "generated images", 100),
)
TASKS = tuple(dict.fromkeys(task for task, *_ in COLUMNS))
REMEDY = "give a *_results.json of lmms-eval (its --output_path), or a folder that holds some"


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}); {REMEDY}")
    except ValueError as error:
        fail(f"{path} is not a whole JSON file ({error}): was its run killed? Run it again, or {REMEDY}")
    if not isinstance(content, dict):
        fail(f"{path} holds a {type(content).__name__}, but must hold an object; {REMEDY}")
    return content


def read_run(text: str) -> dict:
    """`NAME=PATH` -> the run's name, the figures of its tasks, its model arguments, and its times where there are any."""
    name, separator, place = text.partition("=")
    path = Path(place)
    if not separator or not name:
        fail(f"{text!r} is not NAME=PATH, such as pruned=runs/lmms")
    if not path.exists():
        fail(f"{name}: there is no {path}; {REMEDY}")
    files = sorted(path.rglob("*_results.json")) if path.is_dir() else [path]
    if not files:
        fail(f"{name}: {path} holds no *_results.json; {REMEDY}")
    reports = [(file, read_json(file)) for file in files]
    tasks, model_args = {}, []
    for file, report in sorted(
        reports, key=lambda item: str(item[1].get("date"))
    ):  # of one task, the latest run counts
        if not isinstance(report.get("results"), dict):
            fail(f"{file} has no results; {REMEDY}")
        tasks |= {task: metrics(result) for task, result in report["results"].items()}
        model_args.append(report.get("config", {}).get("model_args"))
    run = {"name": name, "tasks": tasks, "model_args": list(dict.fromkeys(model_args))}
    times = [read_json(file) for file in sorted(path.rglob("times*.json"))] if path.is_dir() else []
    return {**run, **({"times": merge_times(times)} if times else {})}


def metrics(result: dict) -> dict:
    """`{"accuracy,none": 0.5, "accuracy_stderr,none": 0.1, ...}` -> `{"accuracy": {"value": 0.5, "stderr": 0.1}}`."""
    figures = {key.partition(",")[0]: value for key, value in result.items() if isinstance(value, (int, float))}
    return {
        name: {"value": value, "stderr": figures.get(f"{name}_stderr")}
        for name, value in figures.items()
        if "_stderr" not in name
    }


def merge_times(files: list) -> dict:
    batches = [batch for file in files for batch in file["batches"]]
    requests = sum(batch["requests"] for batch in batches)
    return {
        "requests": requests,
        "seconds_per_request": statistics.median(batch["seconds"] / batch["requests"] for batch in batches),
        "visual_tokens_per_request": sum(batch["visual_tokens"] for batch in batches) / requests,
        "device": files[0]["device"],
        "dtype": files[0]["dtype"],
        "pruning": files[0]["pruning"],
    }


def columns_of(runs: list) -> list:
    """The columns that some run has a figure for; of tasks that are not in `COLUMNS`, every metric as it is."""
    found = {(task, metric) for run in runs for task, figures in run["tasks"].items() for metric in figures}
    columns = [column for column in COLUMNS if column[:2] in found]
    others = sorted((task, metric) for task, metric in found if task not in TASKS)
    return columns + [(task, metric, f"{task} {metric}", 1) for task, metric in others]


def cell(run: dict, baseline: dict, column: tuple) -> str:
    task, metric, _, scale = column
    figure = run["tasks"].get(task, {}).get(metric)
    if figure is None:
        return "not run"
    text = f"{scale * figure['value']:.2f}"
    if figure["stderr"] is not None:
        text += f" ± {scale * figure['stderr']:.2f}"
    reference = baseline["tasks"].get(task, {}).get(metric)
    if run is not baseline and reference and reference["value"]:
        text += f" ({figure['value'] / reference['value']:.1%})"
    return text


def time_cells(times) -> list:
    if times is None:
        return ["", ""]
    return [f"{times['visual_tokens_per_request']:.1f}", f"{1000 * times['seconds_per_request']:.1f}"]


def markdown(runs: list) -> str:
    columns, timed = columns_of(runs), any("times" in run for run in runs)
    header = ["run", *(title for _, _, title, _ in columns)] + (["visual tokens", "ms a request"] if timed else [])
    rows = []
    for run in runs:
        row = [run["name"], *(cell(run, runs[0], column) for column in columns)]
        if timed:
            row += time_cells(run.get("times"))
        rows.append(row)
    lines = table(header, rows)
    lines += [
        "",
        f"± standard error as lmms-eval gives it; in brackets the share of the figure of {runs[0]['name']!r}.",
    ]
    if timed:
        devices = {f"{run['times']['device']}, {run['times']['dtype']}" for run in runs if "times" in run}
        lines.append(
            "Time: median over requests, from pixels to the answer, the vision tower included, reading the media not; on "
            + "; ".join(sorted(devices))
            + "."
        )
    lines += [""] + [f"- {run['name']}: `{'`, `'.join(map(str, run['model_args']))}`" for run in runs]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the tables go: OUTPUT.md, OUTPUT.json")
    parser.add_argument("runs", nargs="+", metavar="NAME=PATH")
    args = parser.parse_args(argv)
    output = output_prefix(args.output)
    runs = [read_run(text) for text in args.runs]
    write_results(output, {".json": json.dumps(runs, indent=1) + "\n", ".md": markdown(runs)})
    print(markdown(runs))


if __name__ == "__main__":
    main()
