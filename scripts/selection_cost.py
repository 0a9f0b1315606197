"""What the two ways to compare tokens in the selection cost on a CPU, side by side: kept tokens with the others one by one, or
all pairs at once. The selection chooses by `rows_are_cheaper`, whose constants were fitted to this.

Example:
    python scripts/selection_cost.py --threads 1 --output docs/results/selection-cost
"""

import argparse
import json
import os
import time
from unittest import mock

import torch
from benchmarking.tables import heading, milliseconds, spread
from encoder_cost import time_in_turns
from repository import at_least_one, code_module, environment, keep_ratio, recorded_command, use_device
from tqdm import tqdm
from writing import output_prefix, table, write_whole

# Tokens of a set x features: frames of the tiny checkpoint, and of the 7B models before and after the projector; then
# videos of 8 frames that share a budget, in the same order, and the last of 32 frames.
SIZES = ((36, 64), (144, 1024), (144, 4096), (576, 1024), (576, 4096))
JOINT_SIZES = ((288, 128), (1152, 1024), (1152, 4096), (4608, 1024), (4608, 4096))
RATIOS = (0.05, 0.1, 0.15, 0.25)
WAYS = {"row by row": True, "all pairs": False}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where results go: OUTPUT.json, OUTPUT.md (default: the terminal alone)")
    parser.add_argument("--ratios", type=keep_ratio, nargs="+", default=RATIOS, help="default: %(default)s")
    parser.add_argument("--repeats", type=at_least_one, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=at_least_one, help="CPU threads (default: as torch decides)")
    args = parser.parse_args(argv)
    args.device = "cpu"
    if args.output:
        args.output = output_prefix(args.output)
    return args


@torch.inference_mode()
def measure_size(num_tokens: int, width: int, ratio: float, repeats: int) -> dict:
    """One row of the table: the seconds of both ways on the same tokens, and the chosen one."""
    selection = code_module("ops_selection")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(width, generator=generator) + torch.randn(1, num_tokens, width, generator=generator)
    relevance = torch.rand(1, num_tokens, generator=generator)
    num_kept = selection.count_kept(num_tokens, ratio)

    def run(rows: bool):
        with mock.patch.object(selection, "rows_are_cheaper", lambda *sizes: rows):
            return selection.select_rediprune(features, None, num_kept, relevance=relevance)

    kept = {name: run(rows) for name, rows in WAYS.items()}
    chosen = "row by row" if selection.rows_are_cheaper(num_tokens, width, num_kept) else "all pairs"
    return {
        "tokens": num_tokens,
        "features": width,
        "kept": num_kept,
        "same_tokens": bool(torch.equal(*kept.values())),
        "chosen": chosen,
        "samples": time_in_turns({name: lambda rows=rows: run(rows) for name, rows in WAYS.items()}, repeats, "cpu"),
    }


def markdown(report: dict) -> str:
    lines = heading(report, "Row by row or all pairs: the two ways to compare tokens, one set")
    rows = []
    for row in report["rows"]:
        alone, pairs = (row["samples"][name] for name in WAYS)
        share = spread([before / after for before, after in zip(alone, pairs)])
        cells = [f"{row['tokens']} x {row['features']}", str(row["kept"])]
        cells += [milliseconds(spread(alone)), milliseconds(spread(pairs))]
        cells += ["{median:.2f} ({low:.2f} to {high:.2f})".format(**share), row["chosen"]]
        rows.append([*cells, "yes" if row["same_tokens"] else "no"])
    header = [
        "tokens x features",
        "kept",
        "row by row (ms)",
        "all pairs (ms)",
        "ratio of the two",
        "chosen",
        "same tokens",
    ]
    return "\n".join([*lines, "", *table(header, rows)]) + "\n"


def main(argv=None):
    args = parse_arguments(argv)
    use_device(args)
    start, load_before = time.time(), os.getloadavg()[0]
    cases = [(*size, ratio) for size in SIZES + JOINT_SIZES for ratio in args.ratios]
    rows = [measure_size(*case, args.repeats) for case in tqdm(cases, unit="size", disable=None)]
    report = {
        "command": recorded_command(__file__, argv),
        "repeats": args.repeats,
        "warmup": 1,
        "environment": {**environment(), "device": "cpu", "dtype": "float32"},
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "minutes": round((time.time() - start) / 60, 1),
        "rows": rows,
    }
    if args.output:
        write_whole(args.output.with_name(args.output.name + ".json"), json.dumps(report, indent=1) + "\n")
        write_whole(args.output.with_name(args.output.name + ".md"), markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
