"""What pruning saves in multiply-adds, by the formula of the ReDiPrune paper.

The paper counts a layer on n tokens of width d, with an MLP of width m, as 4 n d^2 + 2 n^2 d + 2 n d m, and the language
model's prefill alone: no vision encoder, projector, selection, head or decoding; two of Llama's three MLP matrices; and multiply-adds,
of which each is two floating-point operations. Its LLaVA-NeXT-Video numbers are for 576 tokens a frame, without the pooling
to 144 that the checkpoint was trained with, so that the baseline is four times the native one: both are printed. The formula counts
keys and values as wide as queries, which those of Qwen's language models are not, and two MLP matrices, of which Qwen2.5-VL's tower
has three. Frames of the Qwen models are 24 x 24 patches here, two frames at once; their towers merge by themselves.
Methods inside the language model keep all tokens up to their layer: "fastv" and "vtw" at that of their paper.

Examples:
    python scripts/tflops.py
    python scripts/tflops.py --frames 16 --keep-ratio 0.05 0.1 --text 60
    python scripts/tflops.py --model llava-onevision-7b --frames 32
    python scripts/tflops.py --model qwen2.5-vl-7b --frames 16
"""

import argparse
import itertools
from typing import NamedTuple

from repository import at_least_one, code_module, fail, keep_ratio
from writing import table

CLIP_L_PATCHES = 576  # and 23 of its 24 layers run before the tapped features


def layer_macs(num_tokens: int, width: int, mlp_width: int) -> int:
    """Multiply-adds of one layer: its four projections, its two attention products, and two MLP matrices."""
    return 4 * num_tokens * width**2 + 2 * num_tokens**2 * width + 2 * num_tokens * width * mlp_width


def prefill(visual_tokens: int, text_tokens: int, layers: int = 32, width: int = 4096, mlp_width: int = 11008) -> float:
    """The paper's TFLOPs of a prefill (10^12 multiply-adds); by default of a 7B Llama."""
    return layers * layer_macs(visual_tokens + text_tokens, width, mlp_width) / 1e12


def encoder(
    num_kept: int = CLIP_L_PATCHES,
    num_patches: int = CLIP_L_PATCHES,
    layers=23,
    width=1024,
    mlp_width=4096,
    with_cls=True,
    full_layers=None,
    window=None,
) -> float:
    """
    The same of the vision encoder for one frame whose patches merge to `num_kept` (EvoPrune, reconstruction).

    Args:
        full_layers: so many layers see all patches, the others windows of `window` patches; `None` = all see all.
    """
    schedule = {}
    if num_kept < num_patches:
        schedule = code_module("ops_merging").merging_schedule(num_patches, num_kept, layers)
    total, tokens = 0, num_patches + with_cls
    for layer in range(layers):
        seen = tokens if full_layers is None or layer < full_layers else min(window, tokens)
        total += 4 * tokens * width**2 + 2 * tokens * seen * width
        tokens = schedule.get(layer, tokens - with_cls) + with_cls  # CLS stays; merging is between attention and MLP
        total += 2 * tokens * width * mlp_width
    return total / 1e12


def attention_relevance(
    visual_tokens: int,
    question_tokens: int,
    layers_read=1,
    compared=1,
    width=4096,
    mlp_width=11008,
    vision_width=1024,
    heads=32,
) -> float:
    """
    The same of relevance "attention": the layers that read the question by itself, the projector, and in each layer that is
    compared in the queries of the question, and their products with the keys of all visual tokens, or where the words of all heads are
    fewer than the features of a key, with the tokens themselves. "late_attention" reads through four layers and compares in four,
    and compares the tokens of a video with one another.
    """
    reading = layers_read * layer_macs(question_tokens, width, mlp_width)
    projector = visual_tokens * (vision_width * width + width**2)
    comparing = question_tokens * width**2
    if heads * question_tokens < width:
        comparing += question_tokens * width**2 + heads * question_tokens * visual_tokens * width
    else:
        comparing += visual_tokens * width**2 + question_tokens * visual_tokens * width
    spreading = visual_tokens**2 * width if compared > 1 else 0
    return (reading + projector + compared * comparing + spreading) / 1e12


def inside(visual_tokens: int, staying: int, text_tokens: int, first: int, layers=32, **sizes) -> float:
    """The same of a prefill where all visual tokens reach the layers before number `first`, and `staying` of them the others."""
    before = prefill(visual_tokens, text_tokens, first, **sizes)
    return before + prefill(staying, text_tokens, layers - first, **sizes)


class Sizes(NamedTuple):
    """
    What the table needs of a model.

    Attributes:
        pooled, unpooled: tokens of a frame with the checkpoint's own pooling, and without it; `None` where it has none.
        newlines: tokens of a video beside them when nothing is pruned.
        language: arguments of `prefill`.
        vision: arguments of `encoder`.
        merges: whether its tower can merge patches, as `evoprune` does.
        at_once: frames that the tower sees as one.
        prunes_inside: whether tokens can leave inside its language model.
    """

    title: str
    pooled: int
    unpooled: int
    newlines: int
    language: dict
    vision: dict
    merges: bool
    at_once: int = 1
    prunes_inside: bool = True


MODELS = {
    "llava-next-video-7b": Sizes("LLaVA-NeXT-Video-7B", 144, CLIP_L_PATCHES, 0, {}, {}, True),
    "llava-onevision-7b": Sizes(
        "LLaVA-OneVision-Qwen2-7B",
        196,
        729,
        1,
        {"layers": 28, "width": 3584, "mlp_width": 18944},
        {"num_kept": 729, "num_patches": 729, "layers": 26, "width": 1152, "mlp_width": 4304, "with_cls": False},
        False,
    ),
    "qwen2.5-vl-7b": Sizes(
        "Qwen2.5-VL-7B",
        144,
        None,
        0,
        {"layers": 28, "width": 3584, "mlp_width": 18944},
        {"layers": 32, "width": 1280, "mlp_width": 3420, "with_cls": False, "full_layers": 4, "window": 64},
        False,
        2,
        False,
    ),
    "qwen3-vl-8b": Sizes(
        "Qwen3-VL-8B",
        144,
        None,
        0,
        {"layers": 36, "width": 4096, "mlp_width": 12288},
        {"layers": 27, "width": 1152, "mlp_width": 4304, "with_cls": False},
        False,
        2,
        False,
    ),
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llava-next-video-7b", help="default: %(default)s")
    parser.add_argument("--frames", type=at_least_one, default=8)
    parser.add_argument("--keep-ratio", type=keep_ratio, nargs="+", default=[0.25, 0.15, 0.1, 0.05])
    parser.add_argument(
        "--text", type=at_least_one, default=60, help="text tokens of the prompt (default: %(default)s)"
    )
    return parser.parse_args(argv)


def rows_of(sizes: Sizes, frames: int, text: int, ratios: list) -> list:
    """The cells of the table."""
    cost = lambda visual_tokens: prefill(visual_tokens, text, **sizes.language)  # noqa: E731
    count_kept = code_module("ops_selection").count_kept
    late_layers = code_module("ops_relevance").LATE_LAYERS
    inner, layers = code_module("methods_registry").INNER_METHODS, sizes.language.get("layers", 32)
    native, whole = frames * sizes.pooled + sizes.newlines, encoder(**sizes.vision)
    poolings = {"true": sizes.pooled, "false": sizes.unpooled}
    rows = []
    for pooling, ratio in itertools.product([name for name in poolings if poolings[name]], ratios):
        size = poolings[pooling]
        kept = count_kept(size, ratio)
        row = [pooling, f"{ratio:g}", f"{frames} x {kept}", f"{cost(frames * kept):.3f}"]
        row.append(f"{cost(frames * kept) / cost(native):.1%}")
        if sizes.unpooled:
            row.append(f"{cost(frames * kept) / cost(frames * sizes.unpooled + sizes.newlines):.1%}")
        if sizes.prunes_inside:
            for name, staying in (("fastv", frames * kept), ("vtw", 0)):
                first = inner[name].first_layer(layers)
                row.append(f"{inside(frames * size, staying, text, first, **{'layers': layers, **sizes.language}):.3f}")
        if sizes.merges:
            late = attention_relevance(frames * size, text, layers_read=late_layers, compared=late_layers)
            row += [f"{encoder(kept) / whole:.1%}", f"{attention_relevance(frames * size, text):.3f}", f"{late:.3f}"]
        rows.append(row)
    return rows


def main(argv=None):
    args = parse_arguments(argv)
    sizes, text = MODELS[args.model], args.text
    frames, rest = divmod(args.frames, sizes.at_once)
    if rest:
        fail(f"--frames {args.frames}: {sizes.title} sees {sizes.at_once} frames at once; give a multiple of that")
    baselines = [f"native ({sizes.pooled} tokens a frame)", f"without pooling ({sizes.unpooled} a frame)"]
    costs = [
        f"{title}: {prefill(frames * size + sizes.newlines, text, **sizes.language):.3f}"
        for title, size in zip(baselines, (sizes.pooled, sizes.unpooled))
        if size
    ]
    print(f"{sizes.title}, {args.frames} frames, {text} text tokens, in 10^12 multiply-adds")
    print(f"prefill, {'; '.join(costs)}")
    print(f"vision encoder: {frames * encoder(**sizes.vision):.3f}\n")
    header = ["video_pooling", "keep ratio", "tokens", "prefill", "of native"]
    header += [f"of {sizes.unpooled} a frame"] if sizes.unpooled else []
    header += ["prefill with fastv", "with vtw"] if sizes.prunes_inside else []
    header += ["encoder with evoprune", "relevance attention", "late_attention"] if sizes.merges else []
    print("\n".join(table(header, rows_of(sizes, frames, text, args.keep_ratio))))


if __name__ == "__main__":
    main()
