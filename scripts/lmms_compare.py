"""Sets lmms-eval's answers on the task of generated videos or images beside those of evaluate.py to the same questions.

Example:
    python scripts/lmms_compare.py --output runs/local --questions runs/lmms-task/questions.jsonl \\
        --pair runs/lmms runs/accuracy.answers.jsonl rediprune 0.15
    python scripts/lmms_compare.py --kind image --output runs/images --questions runs/lmms-images/questions.jsonl \\
        --pair runs/lmms-llava runs/accuracy.answers.jsonl rediprune 0.15
"""

import argparse
import json
from pathlib import Path

from evaluation.report import percent
from make_lmms_task import TASKS
from repository import environment, fail, keep_ratio
from writing import output_prefix, table, write_results


def read_lines(path: Path) -> list:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    except ValueError as error:
        fail(f"{path} has an incomplete line ({error}): was its run killed? Run it again")


def answers_of_lmms_eval(folder: Path, task: str) -> list:
    files = sorted(folder.rglob(f"*_samples_{task}.jsonl"))
    if not files:
        fail(f"{folder} holds no *_samples_{task}.jsonl; run lmms-eval with --log_samples and --output_path {folder}")
    samples = sorted(read_lines(files[-1]), key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"].strip() for sample in samples]


def results_of_lmms_eval(folder: Path, task: str) -> dict:
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        fail(f"{folder} holds no *_results.json; was its run killed? Run lmms-eval again")
    try:
        result = json.loads(files[-1].read_text(encoding="utf-8"))
        result["config"]["model_args"], result["results"][task]["accuracy,none"]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{files[-1]} is not the whole result of {task} ({error!r}); run lmms-eval again")
    return result


def answers_of_evaluate(path: Path, kind: str, setting: str, keep_ratio: float) -> list:
    cells = [cell for cell in read_lines(path)[1:] if cell["kind"] == kind]
    for cell in cells:
        if (cell["setting"], cell["keep_ratio"]) == (setting, keep_ratio):
            return cell["answers"]
    known = ", ".join(f"{cell['setting']} {cell['keep_ratio']:g}" for cell in cells)
    fail(f"{path} has no {kind}s with {setting} {keep_ratio:g}; it has: {known or 'none'}")


def compare(kind: str, expected: list, folder: Path, path: Path, setting: str, keep_ratio: float) -> dict:
    """Accuracy of both on the task of a kind of media, and how many answers are the same."""
    given = {
        "lmms-eval": answers_of_lmms_eval(folder, TASKS[kind]),
        "evaluate.py": answers_of_evaluate(path, kind, setting, keep_ratio),
    }
    for name, answers in given.items():
        if len(answers) != len(expected):
            fail(
                f"{name} has {len(answers)} answers to {len(expected)} questions; use the same number of scenes for all"
            )
    result = results_of_lmms_eval(folder, TASKS[kind])
    return {
        "model": result["config"]["model"],
        "model_args": result["config"]["model_args"],
        "setting": setting,
        "keep_ratio": keep_ratio,
        "lmms_eval_reports": result["results"][TASKS[kind]]["accuracy,none"],
        "accuracy": {name: sum(map(str.__eq__, answers, expected)) / len(expected) for name, answers in given.items()},
        "same_answers": sum(map(str.__eq__, *given.values())),
        "questions": len(expected),
    }


def _ratio(text: str) -> float:
    try:
        return keep_ratio(text)
    except argparse.ArgumentTypeError as error:
        fail(f"--pair: {error}")


def markdown(rows: list) -> str:
    header = ["model of lmms-eval", "its arguments", "lmms-eval: right (%)", "evaluate.py: right (%)", "same answers"]
    cells = [
        [
            row["model"],
            f"`{row['model_args']}`",
            percent(row["lmms_eval_reports"]),
            percent(row["accuracy"]["evaluate.py"]),
            f"{row['same_answers']} of {row['questions']}",
        ]
        for row in rows
    ]
    return "\n".join(table(header, cells)) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the table goes: OUTPUT.md, OUTPUT.json")
    parser.add_argument(
        "--kind", choices=TASKS, default="video", help="what the task asks about (default: %(default)s)"
    )
    parser.add_argument("--questions", type=Path, required=True, help="questions.jsonl of the task's folder")
    parser.add_argument(
        "--pair", nargs=4, action="append", required=True, metavar=("FOLDER", "ANSWERS", "SETTING", "RATIO")
    )
    args = parser.parse_args(argv)
    output = output_prefix(args.output)
    expected = [question["answer"] for question in read_lines(args.questions)]
    rows = [
        compare(args.kind, expected, Path(folder), Path(answers), setting, _ratio(ratio))
        for folder, answers, setting, ratio in args.pair
    ]
    content = {"environment": environment(), "rows": rows}
    write_results(output, {".json": json.dumps(content, indent=1) + "\n", ".md": markdown(rows)})
    print(markdown(rows))


if __name__ == "__main__":
    main()
