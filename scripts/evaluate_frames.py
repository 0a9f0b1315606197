"""Accuracy on longer and longer generated videos, also ones whose unpruned prompt leaves the context of the language model.

The held-out scenes have eight frames; a longer video shows each of them as many times in a row, so that the answers stay the same.
Every video is encoded once, and all questions about it are asked with every setting. Where the unpruned prompt does not fit, the
unpruned model has no row.

Examples:
    python scripts/evaluate_frames.py --output runs/frames
    python scripts/evaluate_frames.py --output runs/frames --frames 8 128 --settings divprune,keep_tokens=200,positions=scaled
"""

import argparse
import json
from collections import defaultdict

import numpy as np
import torch
from evaluation.questions import Questions, add_scene_arguments, answer, check_scenes
from evaluation.report import interval, percent, with_interval
from evaluation.settings import UNPRUNED, as_setting
from repository import add_model_arguments, at_least_one, environment, fail, load, recorded_command
from toy_world import NUM_FRAMES, TABLES_START
from tqdm import tqdm
from writing import output_prefix, table, write_results

FIRST_SCENE = TABLES_START + 20_000  # no table begins there
BUDGET, TRAINED = (
    "rediprune_plus,keep_ratio=0.11",
    336,
)  # the tiny checkpoint's prompts have 288 visual tokens and some words
DEFAULT_SETTINGS = (
    *(f"{BUDGET},positions={name}" for name in ("compact", "original", "scaled")),
    f"{BUDGET},positions=scaled,max_positions={TRAINED}",
    "rediprune_plus,keep_tokens=64,positions=compact",
    f"rediprune_plus,keep_tokens=64,positions=scaled,max_positions={TRAINED}",
)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where results go: OUTPUT.json, OUTPUT.md")
    parser.add_argument("--settings", nargs="+", type=as_setting, default=None, metavar="METHOD[,KEY=VALUE...]")
    parser.add_argument(
        "--frames", nargs="+", type=at_least_one, default=[8, 16, 32, 64, 128], help="default: %(default)s"
    )
    add_scene_arguments(parser, 100, FIRST_SCENE)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.settings = args.settings or [as_setting(text) for text in DEFAULT_SETTINGS]
    check_scenes(parser, args)
    for frames in args.frames:
        if frames % NUM_FRAMES:
            parser.error(f"--frames {frames}: must be a multiple of {NUM_FRAMES}, the frames of a scene")
    args.output = output_prefix(args.output)
    return args


class LongVideos:
    """The videos of a number of frames, and what a model answers about them."""

    def __init__(self, model, processor, questions: Questions, frames: int):
        self.model, self.processor, self.questions, self.frames = model, processor, questions, frames
        self.of_scene = defaultdict(list)
        for index, scene in enumerate(questions.scene_of):
            self.of_scene[int(scene)].append(index)

    def encode(self, scene: int, methods: list):
        video = np.repeat(self.questions.scenes[scene].frames, self.frames // NUM_FRAMES, axis=0)
        inputs = self.processor(text="<video>", videos=[video], num_frames=self.frames)
        return self.model.encode_media(**inputs.to(self.model.device, self.model.dtype), methods=methods)

    def ask(self, encoded, scene: int, block) -> tuple:
        """The answers to the questions about a scene, and the visual tokens of each prompt."""
        self.model.config.pruning = self.processor.pruning = block
        indices = self.of_scene[scene]
        prompts = [self.questions.prompt(self.processor, self.questions.texts[index]) for index in indices]
        media = encoded.take(videos=[0] * len(prompts))
        inputs = self.processor(text=prompts, encoded_media=media, padding=True).to(self.model.device)
        visual_tokens = encoded.layouts[0].num_placeholders(block)
        return answer(self.model, self.processor, {**inputs, "encoded_media": media}), visual_tokens


def measure(model, processor, args, frames: int, questions: Questions) -> list:
    """The rows of one number of frames."""
    base = model.config.pruning
    blocks = {UNPRUNED: base.with_changes(method="none")}
    blocks |= {chosen.text: base.with_changes(**chosen.changes) for chosen in args.settings}
    videos = LongVideos(model, processor, questions, frames)
    right, visual_tokens, refused = defaultdict(dict), {}, {}
    for scene, indices in tqdm(videos.of_scene.items(), desc=f"{frames} frames", unit="scene"):
        model.config.pruning = processor.pruning = base
        encoded = videos.encode(scene, [block.method for block in blocks.values()])
        for name, block in blocks.items():
            if name in refused:
                continue
            try:
                answers, visual_tokens[name] = videos.ask(encoded, scene, block)
            except ValueError as error:  # longer than the context
                refused[name] = str(error)
                continue
            right[name].update({index: text == questions.answers[index] for index, text in zip(indices, answers)})
    model.config.pruning = processor.pruning = base
    rows = []
    for name in blocks:
        row = {"frames": frames, "setting": name, "visual_tokens": visual_tokens.get(name), "error": refused.get(name)}
        if name not in refused:
            hits = np.array([right[name][index] for index in range(len(questions))], dtype=float)
            of_type = {
                kind: interval(hits[questions.types == kind], questions.scene_of[questions.types == kind])
                for kind in sorted(set(questions.types.tolist()))
            }
            row |= {**interval(hits, questions.scene_of), "by_type": of_type}
        rows.append(row)
    return rows


def markdown(report: dict) -> str:
    run, rows = report["environment"], report["rows"]
    types = next(sorted(row["by_type"]) for row in rows if row["error"] is None)
    lines = [
        "# Accuracy against the number of frames",
        "",
        f"Command: `{report['command']}`  ",
        f"{run.get('gpu', run['cpu'])}, {run['threads']} threads, {run['device']}, {run['dtype']}, torch {run['torch']}, "
        f"transformers {run['transformers']}, Python {run['python']}, {run['date']}; {report['questions']} questions about "
        f"{report['scenes']} scenes from number {report['first_scene']} on, one greedy answer to each.  ",
        f"The scenes have {NUM_FRAMES} frames; a longer video shows each of them as many times in a row. The context of the language "
        f"model has {report['context']} positions. Right answers in percent, with 95 % intervals (bootstrap over scenes).",
        "",
    ]
    cells = []
    for row in rows:
        start = [str(row["frames"]), row["setting"]]
        if row["error"] is not None:
            cells.append([*start, "-", "longer than the context", *["-"] * len(types)])
            continue
        of_type = [percent(row["by_type"][name]["accuracy"]) for name in types]
        cells.append([*start, str(row["visual_tokens"]), with_interval(row), *of_type])
    return "\n".join(lines + table(["frames", "setting", "visual tokens", "right", *types], cells)) + "\n"


@torch.inference_mode()
def main(argv=None):
    args = parse_arguments(argv)
    try:
        model, processor = load(args)
        questions = Questions("video", args.scenes, args.first_scene)
        rows = [row for frames in args.frames for row in measure(model, processor, args, frames, questions)]
    except (ValueError, OSError) as error:
        fail(str(error))
    report = {
        "command": recorded_command(__file__, argv),
        "first_scene": args.first_scene,
        "scenes": args.scenes,
        "questions": len(questions),
        "context": model.config.text_config.max_position_embeddings,
        "environment": environment(model),
        "rows": rows,
    }
    write_results(args.output, {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)})
    print(markdown(report))


if __name__ == "__main__":
    main()
