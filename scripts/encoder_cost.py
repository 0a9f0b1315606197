"""What merging inside the vision encoder saves (EvoPrune, reconstruction): operations as torch counts them, and seconds.

The encoder has the shape of CLIP ViT-L/14 at 336 pixels and random weights: neither its operations nor its time depend on them.
Both sides run the layers up to the tapped one and no further.

Examples:
    python scripts/encoder_cost.py --output runs/encoder
    python scripts/encoder_cost.py --frames 32 --kept 144 58 --device cuda --dtype float16
"""

import argparse
import json
import os
import time

import torch
from benchmarking.tables import heading, milliseconds, spread
from repository import DTYPES, at_least_one, code_module, environment, fail, flop_counter, recorded_command, use_device
from tflops import CLIP_L_PATCHES, encoder
from transformers import CLIPVisionConfig, CLIPVisionModel
from writing import output_prefix, table, write_results

GPU = torch.cuda.is_available()


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where results go: OUTPUT.json, OUTPUT.md (default: the terminal alone)")
    parser.add_argument("--frames", type=at_least_one, default=8, help="default: %(default)s")
    parser.add_argument(
        "--kept",
        type=at_least_one,
        nargs="+",
        default=[144, 86, 58, 22, 14],
        help="patches left of 576 in each frame (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=at_least_one, default=10, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if GPU else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float16" if GPU else "float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument("--threads", type=at_least_one, help="CPU threads (default: as torch decides)")
    args = parser.parse_args(argv)
    for kept in args.kept:
        if kept >= CLIP_L_PATCHES:
            fail(f"--kept {kept}: the encoder has {CLIP_L_PATCHES} patches, and all of them are always measured beside")
    args.kept = list(dict.fromkeys(args.kept))
    if args.output:
        args.output = output_prefix(args.output)
    return args


def count_flops(function) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in one call."""
    with flop_counter() as counter:
        function()
    return counter.get_total_flops()


def time_in_turns(runs: dict, repeats: int, device: str) -> dict:
    """For each of `runs` the seconds of `repeats` calls, after one to warm up; in turns, so that all see the same machine."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


@torch.inference_mode()
def measure(args) -> list:
    """One row for the full encoder and one for each number of patches to merge to."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    tower = CLIPVisionModel(config).to(args.device, getattr(torch, args.dtype)).eval()
    pixels = torch.randn(args.frames, 3, 336, 336, device=args.device, dtype=tower.dtype)
    clip = code_module("vision_clip")
    layers = code_module("hub_versions").clip_transformer(tower).encoder.layers
    del layers[23:]  # the tapped features are the output of layer 23 of 24
    runs = {CLIP_L_PATCHES: lambda: tower(pixels)}
    for kept in args.kept:
        runs[kept] = lambda kept=kept: clip.encode_and_merge(tower, pixels, 23, kept)
    times = time_in_turns(runs, args.repeats, args.device)
    return [
        {
            "patches_left": kept,
            "operations": count_flops(run),
            "formula_share": encoder(kept) / encoder(),
            "samples": [round(seconds, 7) for seconds in times[kept]],
        }
        for kept, run in runs.items()
    ]


def markdown(report: dict) -> str:
    full = report["rows"][0]
    lines = heading(report, f"Merging inside the vision encoder (EvoPrune, reconstruction), {report['frames']} frames")
    lines[-1] += (
        " The encoder of CLIP ViT-L/14 at 336 pixels up to the tapped layer, random weights. The share of time is that of "
        "each turn; operations are two for a multiply-add."
    )
    rows = []
    for row in report["rows"]:
        share = spread([after / before for before, after in zip(full["samples"], row["samples"])])
        cells = [
            str(row["patches_left"]),
            f"{row['operations'] / 1e9:.0f}",
            f"{row['operations'] / full['operations']:.1%}",
        ]
        cells += [f"{row['formula_share']:.1%}", milliseconds(spread(row["samples"]))]
        rows.append([*cells, "{median:.1%} ({low:.1%} to {high:.1%})".format(**share)])
    header = ["patches left of 576", "operations (GFLOP)", "of all", "by formula", "time (ms)", "of that of all"]
    return "\n".join([*lines, "", *table(header, rows)]) + "\n"


def main(argv=None):
    args = parse_arguments(argv)
    use_device(args)
    start, load_before = time.time(), os.getloadavg()[0]
    rows = measure(args)
    machine = {**environment(), "device": args.device, "dtype": args.dtype}
    if args.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(args.device)
    report = {
        "command": recorded_command(__file__, argv),
        "frames": args.frames,
        "repeats": args.repeats,
        "warmup": 1,
        "environment": machine,
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "minutes": round((time.time() - start) / 60, 1),
        "rows": rows,
    }
    if args.output:
        write_results(args.output, {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)})
    print(markdown(report))


if __name__ == "__main__":
    main()
