"""Shows what pruning keeps of a video or of images: several methods, keep ratios and questions side by side.

Writes OUTPUT.png (a contact sheet), OUTPUT.html (one self-contained page with a slider over the keep ratios) and OUTPUT.json
(the indices and scores). A method may carry changes to the pruning block after commas: rediprune,alpha=2.

Examples:
    python scripts/visualize.py --video samples/video-1.mp4 --questions "what colour is the square?" --output runs/a
    python scripts/visualize.py --video samples/video-1.mp4 --output runs/b --methods rediprune,relevance=attention \\
        --questions "what colour is the square?" "where is the green star?" --ratios 0.1 0.25
    python scripts/visualize.py --image samples/image-1.png --questions "how many?" --methods rediprune divprune visionzip \\
        --output runs/c --pruning positions=original
"""

import argparse
import json
from pathlib import Path

from drawing.page import page
from drawing.sheet import WIDTH, sheet
from drawing.trace import PreparedMedia, ratio_grid, trace
from media import add_media_arguments, read_media
from repository import (
    FeatureMemory,
    add_model_arguments,
    environment,
    fail,
    keep_ratio,
    load,
    parse_setting,
    recorded_command,
)
from tqdm import tqdm
from writing import output_prefix, write_results

DEFAULT_METHODS = ("rediprune", "divprune", "random")
DEFAULT_RATIOS = (0.1, 0.25, 0.5)
MAX_STEPS = 288  # enough for the order of the picks among all tokens of a video of the tiny checkpoint
ENDINGS = (".png", ".html", ".json")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_media_arguments(parser)
    parser.add_argument("--questions", nargs="+", required=True, help="one or more; of two the difference is shown too")
    parser.add_argument("--output", required=True, help="where results go: OUTPUT.png, OUTPUT.html, OUTPUT.json")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=DEFAULT_METHODS,
        metavar="METHOD[,KEY=VALUE...]",
        help=f"default: {' '.join(DEFAULT_METHODS)}",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=keep_ratio,
        default=DEFAULT_RATIOS,
        help="ratios of the sheet (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=MAX_STEPS,
        help="most stops of the slider; it has one for each token of the largest set, be it a frame or, of a method that "
        "takes all frames jointly, a video, if there are no more (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=WIDTH, help="about how wide the contact sheet is, in pixels (default: %(default)s)"
    )
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    if args.width < 1:
        parser.error(f"--width {args.width} must be at least 1")
    for name in ("questions", "methods", "ratios"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


def trace_all(args, model, prepared, blocks: dict) -> list:
    """For each question a list of traces, one for each method."""
    FeatureMemory(model)
    cells = tqdm(total=len(args.questions) * len(blocks), desc="selecting", unit="trace", disable=None, leave=False)
    # One grid for all, the finest: methods may differ in their pooling.
    grids = [ratio_grid(model, prepared, block, args.ratios, args.steps) for block in blocks.values()]
    ratios = max(grids, key=len)
    traces = []
    for question in args.questions:
        traces.append([])
        for setting, block in blocks.items():
            traces[-1].append(trace(model, prepared, question, setting, block, ratios))
            cells.update()
    cells.close()
    return traces


def media_name(args) -> str:
    names = [args.video] if args.video else args.image or [args.frames]
    return ", ".join(Path(name).name or name for name in names)


def as_record(item, ratios) -> dict:
    """A trace for the JSON file."""
    return {
        "question": item.question,
        "method": item.setting,
        "pruning": item.pruning,
        "grids": item.grids,
        "joint": item.joint,
        "tokens": item.num_tokens,
        "nested": item.nested,
        "order_is_exact": item.exact,
        "kept": {
            f"{ratio:g}": {
                "tokens": int(item.counts[item.step(ratio)]),
                "indices": [item.masks[item.step(ratio)][part].nonzero()[0].tolist() for part in item.panel_slices],
            }
            for ratio in ratios
        },
        "rank": [item.rank[part].tolist() for part in item.panel_slices],
        "first_ratio": [[round(item.ratios[step], 5) for step in item.entry[part]] for part in item.panel_slices],
        "looked_at": item.look_name,
        "scores": None
        if item.look is None
        else [[float(f"{value:.6g}") for value in item.look[part]] for part in item.panel_slices],
    }


def main(argv=None):
    args = parse_arguments(argv)
    output = output_prefix(args.output)
    media = read_media(args)
    try:
        model, processor = load(args)
        base = model.config.pruning.to_dict()
        make = type(model.config.pruning).from_value
        blocks = {setting: make({**base, **parse_setting(setting)}) for setting in args.methods}
        prepared = PreparedMedia(args, model, processor, media)
        traces = trace_all(args, model, prepared, blocks)
    except argparse.ArgumentTypeError as error:
        fail(f"--methods: {error}")
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    panels, run = prepared.panels(), environment(model)
    title = (
        f"{media_name(args)}, {traces[0][0].num_tokens} tokens in {len(panels)} {'panels' if args.image else 'frames'}"
    )
    record = {
        "command": recorded_command(__file__, argv),
        "environment": run,
        "panels": [panel.label for panel in panels],
        "traces": [as_record(item, args.ratios) for group in traces for item in group],
    }
    files = {
        ".png": sheet(panels, traces, title, args.ratios, args.width),
        ".html": page(panels, traces, title, args.ratios),
        ".json": json.dumps(record) + "\n",
    }
    write_results(output, files)
    for ending in files:
        print(output.with_name(output.name + ending))


if __name__ == "__main__":
    main()
