"""What merging inside the vision encoder saves (EvoPrune, reconstruction): operations as torch counts them, and seconds.

The encoder has the shape of CLIP ViT-L/14 at 336 pixels and random weights: neither its operations nor its time depend on them.
Both sides run the layers up to the tapped one and no further.

Example:
    python scripts/encoder_cost.py --frames 8 --kept 144 86 58 22 14
"""

import argparse
import statistics
import time

import torch
from repository import code_module, environment
from tflops import encoder
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--kept", type=int, nargs="+", default=[144, 86, 58, 22, 14], help="patches left of 576 in each frame")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16" if torch.cuda.is_available() else "float32")
    return parser.parse_args()


def count_flops(function) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False) as counter:
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
def main():
    args = parse_arguments()
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    torch.manual_seed(0)
    tower = CLIPVisionModel(config).to(args.device, getattr(torch, args.dtype)).eval()
    pixels = torch.randn(args.frames, 3, 336, 336, device=args.device, dtype=tower.dtype)
    clip = code_module("clip_rediprune")
    layers = clip.transformer(tower).encoder.layers
    del layers[23:]  # the tapped features are the output of layer 23 of 24
    runs = {576: lambda: tower(pixels)}
    for kept in args.kept:
        runs[kept] = lambda kept=kept: clip.encode_and_merge(tower, pixels, 23, kept)
    times = time_in_turns(runs, args.repeats, args.device)
    full_flops, full_time = count_flops(runs[576]), statistics.median(times[576])

    print({**environment(), "device": args.device, "dtype": args.dtype, "frames": args.frames})
    header = "patches left, operations (10^12), of the full encoder, by formula, seconds (median and range), of the full"
    print("| " + header.replace(", ", " | ") + " |\n" + "|---" * 6 + "|")
    for kept, run in runs.items():
        flops, median = count_flops(run), statistics.median(times[kept])
        print(
            f"| {kept} | {flops / 1e12:.3f} | {flops / full_flops:.1%} | {encoder(kept) / encoder():.1%} "
            f"| {median:.4f} ({min(times[kept]):.4f} to {max(times[kept]):.4f}) | {median / full_time:.1%} |"
        )


if __name__ == "__main__":
    main()
