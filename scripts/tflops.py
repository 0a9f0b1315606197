"""What pruning saves in multiply-adds, by the formula of the ReDiPrune paper.

The paper counts a layer on n tokens of width d, with an MLP of width m, as 4 n d^2 + 2 n^2 d + 2 n d m, and the language
model's prefill alone: no vision encoder, projector, selection, head or decoding; two of Llama's three MLP matrices; and multiply-adds,
of which each is two floating-point operations. Its LLaVA-NeXT-Video numbers are for 576 tokens a frame, without the pooling
to 144 that the checkpoint was trained with, so that the baseline is four times the native one: both are printed.

Examples:
    python scripts/tflops.py
    python scripts/tflops.py --frames 16 --keep-ratio 0.05 0.1 --text 60
"""

import argparse

from repository import at_least_one, code_module, keep_ratio

CLIP_L_PATCHES = 576  # and 23 of its 24 layers run before the tapped features


def layer_macs(num_tokens: int, width: int, mlp_width: int) -> int:
    """Multiply-adds of one layer: its four projections, its two attention products, and two MLP matrices."""
    return 4 * num_tokens * width**2 + 2 * num_tokens**2 * width + 2 * num_tokens * width * mlp_width


def prefill(visual_tokens: int, text_tokens: int, layers: int = 32, width: int = 4096, mlp_width: int = 11008) -> float:
    """The paper's TFLOPs of a prefill (10^12 multiply-adds); by default of a 7B Llama."""
    return layers * layer_macs(visual_tokens + text_tokens, width, mlp_width) / 1e12


def encoder(
    num_kept: int = CLIP_L_PATCHES, num_patches: int = CLIP_L_PATCHES, layers=23, width=1024, mlp_width=4096
) -> float:
    """The same of the vision encoder for one frame whose patches merge to `num_kept` (EvoPrune, reconstruction)."""
    schedule = {}
    if num_kept < num_patches:
        schedule = code_module("ops_merging").merging_schedule(num_patches, num_kept, layers)
    total, tokens = 0, num_patches + 1
    for layer in range(layers):
        total += 4 * tokens * width**2 + 2 * tokens**2 * width
        tokens = schedule.get(layer, tokens - 1) + 1  # CLS stays; merging is between attention and MLP
        total += 2 * tokens * width * mlp_width
    return total / 1e12


def attention_relevance(
    visual_tokens: int, question_tokens: int, layers_read=1, width=4096, mlp_width=11008, vision_width=1024
) -> float:
    """
    The same of relevance "attention": the layers that read the question by itself, the projector and one key projection over
    all visual tokens, the queries of the question, and their products.
    """
    reading = layers_read * layer_macs(question_tokens, width, mlp_width)
    projector = visual_tokens * (vision_width * width + width**2)
    comparing = (visual_tokens + question_tokens) * width**2 + question_tokens * visual_tokens * width
    return (reading + projector + comparing) / 1e12


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=at_least_one, default=8)
    parser.add_argument("--keep-ratio", type=keep_ratio, nargs="+", default=[0.25, 0.15, 0.1, 0.05])
    parser.add_argument(
        "--text", type=at_least_one, default=60, help="text tokens of the prompt (default: %(default)s)"
    )
    return parser.parse_args()


def main():
    args = parse_arguments()
    count_kept = code_module("ops_selection").count_kept
    frames, text = args.frames, args.text
    native, unpooled = prefill(144 * frames, text), prefill(576 * frames, text)
    print(f"LLaVA-NeXT-Video-7B, {frames} frames, {text} text tokens, in 10^12 multiply-adds")
    print(f"prefill, native (144 tokens a frame): {native:.3f}; without pooling (576 a frame): {unpooled:.3f}")
    print(f"vision encoder: {frames * encoder():.3f}\n")
    header = "video_pooling, keep ratio, tokens, prefill, of native, of 576 a frame, encoder with evoprune, relevance attention"
    print("| " + header.replace(", ", " | ") + " |\n" + "|---" * 8 + "|")
    for pooling, size in (("true", 144), ("false", 576)):
        for ratio in args.keep_ratio:
            kept = count_kept(size, ratio)
            cost = prefill(frames * kept, text)
            row = [
                pooling,
                f"{ratio:g}",
                f"{frames} x {kept}",
                f"{cost:.3f}",
                f"{cost / native:.1%}",
                f"{cost / unpooled:.1%}",
            ]
            row += [f"{encoder(kept) / encoder():.1%}", f"{attention_relevance(frames * size, text):.3f}"]
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
