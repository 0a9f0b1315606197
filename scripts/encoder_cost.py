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
from repository import environment
from tflops import code, encoder
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


def seconds(function, repeats: int, device: str) -> tuple:
    """Median and range over `repeats` calls, after two to warm up."""
    times = []
    for repeat in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


@torch.inference_mode()
def main():
    args = parse_arguments()
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    torch.manual_seed(0)
    tower = CLIPVisionModel(config).to(args.device, getattr(torch, args.dtype)).eval()
    pixels = torch.randn(args.frames, 3, 336, 336, device=args.device, dtype=tower.dtype)
    clip = code("clip_rediprune")
    layers = clip.transformer(tower).encoder.layers
    stock = lambda: tower(pixels)  # noqa: E731
    print({**environment(), "device": args.device, "dtype": args.dtype, "frames": args.frames})
    print("| patches left | operations (10^12) | of the full encoder | by formula | seconds (median, range) | of the full encoder |")
    print("|---" * 6 + "|")
    del layers[23:]  # the tapped features are the output of layer 23 of 24
    full_flops, full_time = count_flops(stock), seconds(stock, args.repeats, args.device)
    for kept in [576, *args.kept]:
        run = stock if kept == 576 else lambda: clip.encode_and_merge(tower, pixels, 23, kept)  # noqa: B023
        flops, (median, low, high) = count_flops(run), seconds(run, args.repeats, args.device)
        share = encoder(kept) / encoder()
        print(
            f"| {kept} | {flops / 1e12:.3f} | {flops / full_flops:.1%} | {share:.1%} | {median:.4f} ({low:.4f} to {high:.4f}) "
            f"| {median / full_time[0]:.1%} |"
        )


if __name__ == "__main__":
    main()
