"""Trains a tiny checkpoint that answers questions about the toy world: a small model of one of several families.

Everything starts from random weights and runs on a CPU in about an hour. Two stages, each resumable:

1. vision    the vision tower learns what covers each patch (dense labels at the layer that the projector reads), and where the
             family has them, where the patch is and, from the class token, which objects are there
2. language  the tower is frozen and its features are cached; projector and language model learn to answer. Many questions
             share one visual prefix: each attends to the prefix and to itself only

The model always sees all visual tokens: pruning is training-free, so the checkpoint must not have met it.

Families: llava_next_video, llava_onevision, qwen2_5_vl.

Examples:
    python scripts/train_tiny.py --work-dir runs/tiny --output runs/tiny/export
    python scripts/train_tiny.py --family qwen2_5_vl --work-dir runs/qwen --output runs/qwen/export --threads 1
    python scripts/train_tiny.py --work-dir runs/quick --output runs/quick/export \\
        --vision-steps 200 --language-steps 600 --frame-steps 200

A killed run goes on where it stopped when it is started again with the same arguments.
"""

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from toy_world import TABLES_START
from training.answers import evaluate_generation
from training.exporting import export
from training.language import train_language
from training.llava_next_video import LlavaNextVideo
from training.llava_onevision import LlavaOnevision
from training.qwen2_5_vl import Qwen2_5VL
from training.recipe import FOLLOWED_SCENES, SHARD, Recipe
from training.runs import Run
from training.vision import train_vision
from writing import output_folder

FAMILIES = {family.name: family for family in (LlavaNextVideo, LlavaOnevision, Qwen2_5VL)}
GIVEN = {  # what of a recipe can be given
    "vision_steps": "steps of the vision stage",
    "language_steps": "steps of the language stage",
    "frame_steps": "language steps on single frames",
    "video_shards": f"{SHARD} training videos each",
    "image_shards": f"{SHARD} training images each",
    "shard_steps": "steps before the next shard is added",
}
AT_LEAST_ONE = ("threads", "video_shards", "image_shards", "shard_steps")


def parse_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--family", choices=FAMILIES, default="llava_next_video", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="folder for stage checkpoints, cached features and log"
    )
    parser.add_argument("--seed", **number, default=0, help="seed of weights and batches (default: %(default)s)")
    parser.add_argument("--threads", **number, default=os.cpu_count(), help="CPU threads (default: one for each core)")
    for name, text in GIVEN.items():
        default = getattr(Recipe, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", **number, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--evaluate", **number, default=200, help="held-out scenes of the final evaluation (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (name in AT_LEAST_ONE):
            parser.error(f"--{name.replace('_', '-')} {value}: too small")
    if args.evaluate > TABLES_START - FOLLOWED_SCENES.stop:
        parser.error(
            f"--evaluate {args.evaluate}: at most {TABLES_START - FOLLOWED_SCENES.stop}, then come the scenes of the tables"
        )
    output_folder(args.output)
    output_folder(args.work_dir, "--work-dir")
    family = FAMILIES[args.family]
    args.family = family(replace(family.recipe, **{name: getattr(args, name) for name in GIVEN}))
    return args


def main(argv=None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    family = args.family
    tokenizer = family.build_tokenizer()
    model = family.build_model(tokenizer, args.seed)
    run = Run(args.work_dir, args.seed)
    train_vision(run, family, model)
    train_language(run, family, model, tokenizer)
    export(family, model, tokenizer, args.output)
    run.log(stage="final", scenes=args.evaluate, held_out=evaluate_generation(family, args.output, args.evaluate))
    shutil.copy(run.log_path, args.output / "training_log.jsonl")


if __name__ == "__main__":
    main()
