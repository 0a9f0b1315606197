"""Accuracy on held-out generated videos and images: pruning settings x keep ratios, with 95 % intervals.

A setting is a method and, after commas, changes to the pruning block: `rediprune`, `rediprune,positions=original`,
`rediprune,alpha=2,query_weighting=average`, `random,seed=1`. The unpruned model always runs first, and every other row is
also compared with its answers.

Answers are written down as they come (OUTPUT.answers.jsonl); a run that was killed goes on where it stopped.

Examples:
    python scripts/evaluate.py --output docs/results/accuracy
    python scripts/evaluate.py --output runs/quick --scenes 40 --ratios 0.25 0.1 --settings rediprune random uniform
    python scripts/evaluate.py --output runs/alpha --settings rediprune,alpha=0 rediprune,alpha=2 --kinds video
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from repository import (
    FeatureMemory,
    add_model_arguments,
    environment,
    fail,
    load,
    parse_setting,
    write_whole,
)
from toy_world import HELD_OUT_START, sample_image, sample_video
from tqdm import tqdm

DEFAULT_SETTINGS = ("rediprune", "rediprune,positions=original", "random", "random,positions=original", "uniform")
DEFAULT_RATIOS = (0.5, 0.25, 0.15, 0.1)
UNPRUNED = "unpruned"
RESAMPLES = 2000
BATCH = 48


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where results go: OUTPUT.json, OUTPUT.md, OUTPUT.answers.jsonl")
    parser.add_argument("--settings", nargs="+", default=DEFAULT_SETTINGS, metavar="METHOD[,KEY=VALUE...]")
    parser.add_argument("--ratios", nargs="+", type=float, default=DEFAULT_RATIOS, help="keep ratios (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=["video", "image"], choices=["video", "image"])
    parser.add_argument("--batch", type=int, default=BATCH, help="questions in one batch (default: %(default)s)")
    add_model_arguments(parser)
    args = parser.parse_args()
    for ratio in args.ratios:
        if not 0 < ratio <= 1:
            parser.error(f"--ratios: {ratio} is not in (0, 1]")
    if args.scenes < 1 or args.batch < 1:
        parser.error(f"--scenes {args.scenes} and --batch {args.batch} must be at least 1")
    return args


class Questions:
    """The held-out questions of one kind, with the scenes that they are about."""

    def __init__(self, kind: str, num_scenes: int):
        self.kind = kind
        sample = sample_video if kind == "video" else sample_image
        scenes = [sample(seed) for seed in range(HELD_OUT_START, HELD_OUT_START + num_scenes)]
        self.items = [(index, scene, question) for index, scene in enumerate(scenes) for question in scene.questions]
        self.scene_of = np.array([index for index, _, _ in self.items])
        self.types = np.array([question.type for _, _, question in self.items])
        self.answers = [question.answer for _, _, question in self.items]

    def batches(self, processor, size: int, keep_ratio: float):
        for start in range(0, len(self.items), size):
            part = self.items[start : start + size]
            prompts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": self.kind}, {"type": "text", "text": question.question}]}],
                    add_generation_prompt=True,
                )
                for _, _, question in part
            ]
            scenes = [scene.frames if self.kind == "video" else scene.frames[0] for _, scene, _ in part]
            yield processor(text=prompts, **{f"{self.kind}s": scenes}, keep_ratio=keep_ratio, padding=True)


@torch.inference_mode()
def answer_all(model, processor, questions: Questions, batch: int, keep_ratio: float, title: str) -> list:
    """The model's greedy answer to every question."""
    answers = []
    progress = tqdm(total=len(questions.items), desc=title, unit="question", leave=False, mininterval=1)
    for inputs in questions.batches(processor, batch, keep_ratio):
        inputs = inputs.to(model.device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
        progress.update(len(new_tokens))
    progress.close()
    return answers


def interval(right: np.ndarray, scene_of: np.ndarray) -> tuple:
    """Share right and its 95 % interval: percentile bootstrap over scenes, whose questions are not independent."""
    scenes, numbers = np.unique(scene_of, return_inverse=True)
    hits = np.bincount(numbers, weights=right, minlength=len(scenes))
    sizes = np.bincount(numbers, minlength=len(scenes))
    draws = np.random.default_rng(0).integers(len(scenes), size=(RESAMPLES, len(scenes)))
    shares = hits[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(right.mean()), float(low), float(high)


def score(questions: Questions, answers: list, unpruned: list) -> dict:
    """Accuracy overall and per question type, and agreement with the unpruned model."""
    right = np.array([given == expected for given, expected in zip(answers, questions.answers)], dtype=float)
    same = np.array([given == before for given, before in zip(answers, unpruned)], dtype=float)
    by_type = {}
    for name in sorted(set(questions.types)):
        of_type = questions.types == name
        share, low, high = interval(right[of_type], questions.scene_of[of_type])
        by_type[name] = {"accuracy": share, "low": low, "high": high, "questions": int(of_type.sum())}
    share, low, high = interval(right, questions.scene_of)
    return {
        "accuracy": share,
        "low": low,
        "high": high,
        "questions": len(answers),
        "agreement_with_unpruned": float(same.mean()),
        "by_type": by_type,
    }


class AnswerLog:
    """Answers by (kind, setting, keep ratio), kept in a file that only grows, so that nothing is computed twice."""

    def __init__(self, path: Path, fingerprint: dict):
        self.path, self.done = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) != fingerprint:
            fail(
                f"{path} belongs to another run ({lines[0]}); this one is {json.dumps(fingerprint)}. Choose another "
                "--output, or remove that file."
            )
        if not lines:
            path.write_text(json.dumps(fingerprint) + "\n")
        for line in lines[1:]:
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote this line: that cell is computed again
                continue
            self.done[cell["kind"], cell["setting"], cell["keep_ratio"]] = cell["answers"]
        if lines and not path.read_text().endswith("\n"):
            with path.open("a") as file:
                file.write("\n")

    def get(self, kind: str, setting: str, keep_ratio: float, compute) -> list:
        key = (kind, setting, keep_ratio)
        if key not in self.done:
            self.done[key] = compute()
            cell = {"kind": kind, "setting": setting, "keep_ratio": keep_ratio, "answers": self.done[key]}
            with self.path.open("a") as file:
                file.write(json.dumps(cell) + "\n")
        return self.done[key]


def markdown(report: dict) -> str:
    """The tables of a report."""
    run = report["environment"]
    lines = [
        "# Accuracy on held-out generated scenes",
        "",
        f"Command: `{report['command']}`  ",
        f"{run['cpu']}, {run['threads']} threads, {run['device']}, {run['dtype']}, torch {run['torch']}, transformers "
        f"{run['transformers']}, Python {run['python']}, {run['date']}; one greedy answer to each question.  ",
        "Share of right answers in percent with its 95 % interval (bootstrap over scenes), and the share of answers equal to "
        "those of the unpruned model.",
    ]
    for kind in report["kinds"]:
        rows = [row for row in report["rows"] if row["kind"] == kind]
        types = list(rows[0]["by_type"])
        lines += ["", f"## {kind.capitalize()}s: {rows[0]['questions']} questions about {report['scenes']} scenes", ""]
        header = ["setting", "keep ratio", "right (%)", "95 % interval", "as unpruned (%)", *types]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in rows:
            cells = [row["setting"], f"{row['keep_ratio']:g}", f"{100 * row['accuracy']:.1f}"]
            cells += [f"{100 * row['low']:.1f} to {100 * row['high']:.1f}", f"{100 * row['agreement_with_unpruned']:.1f}"]
            cells += [f"{100 * row['by_type'][name]['accuracy']:.1f}" for name in types]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    args = parse_arguments()
    cells = [(UNPRUNED, 1.0)] + [(setting, ratio) for ratio in args.ratios for setting in args.settings]
    try:
        model, processor = load(args)
        base = model.config.pruning
        blocks = {setting: type(base).from_value({**base.to_dict(), **parse_setting(setting)}) for setting in args.settings}
    except (ValueError, OSError) as error:
        fail(str(error))
    blocks[UNPRUNED] = base
    output = Path(args.output)
    fingerprint = {
        "scenes": args.scenes,
        "dtype": str(model.dtype),
        "pruning": dict(args.pruning),
        "weights": float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters())),
    }
    log = AnswerLog(output.with_name(output.name + ".answers.jsonl"), fingerprint)
    FeatureMemory(model)

    rows = []
    for kind in args.kinds:
        questions = Questions(kind, args.scenes)
        for setting, ratio in tqdm(cells, desc=f"{kind}s", unit="cell"):
            model.config.pruning = processor.pruning = blocks[setting]
            title = f"{setting} {ratio:g}"
            answers = log.get(
                kind, setting, ratio, lambda: answer_all(model, processor, questions, args.batch, ratio, title)
            )
            unpruned = log.get(kind, UNPRUNED, 1.0, None)
            rows.append({"kind": kind, "setting": setting, "keep_ratio": ratio, **score(questions, answers, unpruned)})
            tqdm.write(f"{kind} {title:40} {100 * rows[-1]['accuracy']:5.1f} %")
    command = "python scripts/evaluate.py " + shlex.join(sys.argv[1:])
    report = {
        "command": command,
        "scenes": args.scenes,
        "kinds": args.kinds,
        "environment": environment(model),
        "rows": rows,
    }
    write_whole(output.with_name(output.name + ".json"), json.dumps(report, indent=1) + "\n")
    write_whole(output.with_name(output.name + ".md"), markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
