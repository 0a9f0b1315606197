"""What pruning costs and saves: time of every stage, peak memory, KV cache, operations and throughput.

Every setting (method x keep ratio) is measured beside the unpruned model with the same frames, pooling and batch, in
turns: a round runs each of them once, so that all see the same machine. The video and the question are random; neither
their content nor that of the weights changes what is measured. In fp32 on two CPU cores, two language layers and the whole vision
tower of a 7B model took 12 minutes (two methods, one ratio, three rounds) and 5.5 GB. Nothing is written but OUTPUT.json, OUTPUT.md and
OUTPUT-*.png.

Examples:
    python scripts/benchmark.py --output runs/tiny --plots
    python scripts/benchmark.py --model llava-hf/LLaVA-NeXT-Video-7B-hf --batch 1 2 4 8 --output runs/7b
    python scripts/benchmark.py --shape llava-next-video-7b --layers 2 --vision-layers 6 --ratios 0.15 0.1 --repeats 3
    python scripts/benchmark.py --shape llava-next-video-7b --device cuda --frames 8 16 --video-pooling true false
    python scripts/benchmark.py --shape llava-1.5-7b --device cuda
    python scripts/benchmark.py --shape llava-onevision-7b --device cuda --frames 32
    python scripts/benchmark.py --shape qwen2.5-vl-7b --device cuda --frames 32
    python scripts/benchmark.py --shape llava-next-video-7b --device cuda --methods fastv dart rediprune
    python scripts/benchmark.py --selection --threads 2 --output docs/results/selection
    python scripts/benchmark.py --from runs/tiny.json --output runs/tiny --plots
"""

import argparse
import itertools
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from benchmarking.operations import count_operations, formula
from benchmarking.shapes import SHAPES, random_model, shape_config, shape_of
from benchmarking.tables import STAGES, markdown, summarise
from repository import (
    DTYPES,
    StageTimer,
    add_model_arguments,
    code_module,
    environment,
    fail,
    json_or_string,
    load,
    recorded_command,
    use_device,
)
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from writing import output_prefix, write_results

UNPRUNED = "unpruned"
PATCHES_OF_SIDE = (
    24  # of the frames of a model that takes any size: as many tokens as LLaVA-NeXT-Video's after its pooling
)
FIRST_WORD = 10  # random words come after the special tokens of the vocabularies
TEXT_BEFORE = 20  # of the words of a prompt, so many stand before the video; the rest is the question


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where results go: OUTPUT.json, OUTPUT.md, with --plots OUTPUT-*.png")
    parser.add_argument("--shape", help=f"random weights in a true size instead of --model: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="layers of the language model of a shape (default: all)")
    parser.add_argument("--vision-layers", type=int, help="layers of its vision tower (default: all)")
    parser.add_argument("--methods", nargs="+", default=["rediprune"], help="pruning methods (default: %(default)s)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.15, 0.1], help="default: %(default)s")
    parser.add_argument("--frames", nargs="+", type=int, help="frames of a video (default: 8, or as the shape says)")
    parser.add_argument(
        "--video-pooling",
        nargs="+",
        type=json_or_string,
        help="true and/or false (default: true)",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="batch sizes (default: %(default)s)")
    parser.add_argument("--text", type=int, default=60, help="text tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=9, help="tokens generated in each run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random video and question (default: %(default)s)")
    parser.add_argument("--selection", action="store_true", help="measure the selection alone, beside a plain loop")
    parser.add_argument("--from", dest="source", metavar="RESULTS.json", help="tables and plots of an earlier run")
    parser.add_argument("--plots", action="store_true", help="also draw plots (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(args)
    args.command = recorded_command(__file__, argv)
    return args


def check_arguments(args) -> None:
    """Refuses what cannot be measured, and fills in what the shape says."""
    if args.shape and args.model != parser_default("model"):
        fail(f"--shape {args.shape} has random weights and does not go with --model {args.model}; pass one of them")
    shape = shape_of(args.shape) if args.shape else None
    if (args.layers or args.vision_layers) and not shape:
        fail("--layers and --vision-layers cut a --shape; a checkpoint has the layers that it has")
    defaults = (shape.frames if shape else (8,), (True,))
    given = (args.frames, args.video_pooling)
    args.frames, args.video_pooling = (list(value or default) for default, value in zip(defaults, given))
    if shape and shape.fixed and (tuple(args.frames), tuple(args.video_pooling)) != defaults:
        fail(f"--shape {args.shape} is one image: it goes with --frames {shape.frames[0]} --video-pooling true")
    known = [name for name in code_module("methods_registry").METHODS if name != "none"]
    for method in args.methods:
        if method not in known:
            fail(f"--methods {method}: no such pruning method; choose of {', '.join(known)}")
    for ratio in args.ratios:
        if not 0 < ratio < 1:
            fail(
                f"--ratios {ratio}: a keep ratio lies between 0 and 1, such as 0.15; the unpruned model always runs beside"
            )
    for pooling in args.video_pooling:
        if not isinstance(pooling, bool):
            fail(f"--video-pooling {pooling}: must be true or false")
    least = {"frames": 1, "batch": 1, "text": TEXT_BEFORE + 1, "new_tokens": 1, "repeats": 1, "warmup": 0}
    least |= {"layers": 1, "vision_layers": 2}  # the tapped layer is the last but one
    for name, minimum in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < minimum:
                fail(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")
    if args.output:
        args.output = output_prefix(args.output)
    if args.plots:
        if not args.output:
            fail("--plots needs --output, which says where they go")
        import benchmarking.plots  # noqa: F401  says what is missing before anything is measured


def parser_default(name: str):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.get_default(name)


def open_model(args):
    """The model to measure, and what it is in words."""
    if not args.shape:
        return load(args)[0], "the tiny checkpoint" if args.model == parser_default("model") else args.model
    use_device(args)
    shape = shape_of(args.shape)
    config = shape_config(shape, args.layers, args.vision_layers)
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    model = random_model(config, dtype, args.device, args.attention)
    model.config.pruning = dict(args.pruning)
    return model, shape.title


def cells_of(args) -> list:
    """What is measured: for every frames, pooling and batch the unpruned model, and every method at every ratio."""
    block = code_module("configuration_rediprune").PruningConfig
    settings = [(UNPRUNED, 1.0)]
    for method in args.methods:
        settings += [(method, ratio) for ratio in args.ratios[: None if block(method=method).takes_ratio else 1]]
    cells = []
    for frames, pooling, batch in itertools.product(args.frames, args.video_pooling, args.batch):
        group = {"frames": frames, "video_pooling": pooling, "batch": batch}
        cells += [{"method": method, "keep_ratio": ratio, **group} for method, ratio in settings]
    return cells


def pruning_of(model, cell: dict):
    block = model.config.pruning
    changes = {"keep_ratio": cell["keep_ratio"], "video_pooling": cell["video_pooling"]}
    if cell["method"] != UNPRUNED:
        changes["method"] = cell["method"]
    return block.with_changes(**changes)


def medium_of(model, pruning, frames: int) -> tuple:
    """
    Of a video, or of an image where the model takes no videos: layout, placeholder, name and shape of the pixels, and the grid of
    patches where that is what the model takes.
    """
    config = model.config
    size = getattr(config.vision_config, "image_size", None)
    if size is None:
        vision = config.vision_config
        steps, rest = divmod(frames, vision.temporal_patch_size)
        if rest:
            raise ValueError(
                f"{config.model_type} sees {vision.temporal_patch_size} frames at once, which {frames} are not a multiple of"
            )
        grid = (steps, PATCHES_OF_SIDE, PATCHES_OF_SIDE)
        layout = model.layout_class.video(model.frame_size, grid)
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return layout, config.video_token_id, "pixel_values_videos", (math.prod(grid), channels), grid
    if config.takes_videos:
        layout = model.layout_class.video(model.frame_size, frames, pruning)
        return layout, config.video_token_id, "pixel_values_videos", (frames, 3, size, size), None
    if hasattr(config, "image_grid_pinpoints"):
        raise ValueError(f"{config.model_type} cuts its images into tiles, which no random medium here has")
    layout = model.layout_class.image(model.frame_size, (size, size))
    return layout, config.image_token_id, "pixel_values", (3, size, size), None


def random_inputs(model, pruning, frames: int, batch: int, text: int, seed: int) -> dict:
    """A prompt of random words around one random video or image in every row."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    layout, token, name, shape, grid = medium_of(model, pruning, frames)
    placeholders = {config.image_token_id, token}
    words = torch.tensor(
        [word for word in range(FIRST_WORD, config.text_config.vocab_size) if word not in placeholders]
    )
    words = words[torch.randint(len(words), (batch, text), generator=generator)]
    medium = torch.full((batch, layout.num_placeholders(pruning)), token)
    ids = torch.cat([words[:, :TEXT_BEFORE], medium, words[:, TEXT_BEFORE:]], dim=1).to(model.device)
    pixels = torch.randn((batch, *shape), generator=generator).to(model.device, model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), name: pixels}
    if grid is not None:
        inputs |= {name: pixels.flatten(0, 1), "video_grid_thw": torch.tensor([grid] * batch, device=model.device)}
    return inputs


@torch.inference_mode()
def generate(model, inputs: dict, new_tokens: int):
    """Exactly `new_tokens` tokens, greedily; the output has the cache."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


def measure_once(model, inputs: dict, new_tokens: int) -> dict:
    """Seconds of each stage and of the whole of one run; those of `decode` are of one token."""
    timer = StageTimer(model)
    with timer:
        start = timer.clock()
        generate(model, inputs, new_tokens)
        total = timer.clock() - start
    seconds = {stage: timer.seconds.get(stage, 0.0) for stage in STAGES}
    seconds["other"] = total - sum(timer.seconds.values())
    seconds["decode"] /= max(1, timer.passes - 1)
    return {**seconds, "end to end": total, "second question": second_question(model, inputs, new_tokens)}


def second_question(model, inputs: dict, new_tokens: int) -> float:
    """Seconds end to end where the media were encoded for an earlier question."""
    encoded = model.encode_media(**inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    timer = StageTimer(model)
    start = timer.clock()
    generate(model, {**text, "encoded_media": encoded}, new_tokens)
    return timer.clock() - start


def peak_bytes(model, inputs: dict) -> int:
    """The most memory that tensors take at once while two tokens are made, beyond what was there before."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        generate(model, inputs, 2)
        return torch.cuda.max_memory_allocated(model.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        generate(model, inputs, 2)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    running = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(running, default=0)


def describe(model, cell: dict, inputs: dict, text: int) -> dict:
    """What needs no repetition: numbers of tokens, operations, bytes."""
    prompt, pruning = inputs["input_ids"].shape[1], model.config.pruning
    layout = medium_of(model, pruning, cell["frames"])[0]
    unpruned = layout.num_placeholders(pruning.with_changes(keep_ratio=1.0, keep_tokens=None))
    operations, cache = count_operations(model, inputs)
    multiply_adds = cell["batch"] * formula(model.config, pruning, prompt - text, unpruned, text)
    return {
        "visual_tokens": prompt - text,
        "prompt_tokens": prompt,
        "operations": operations,
        "inner_tokens": None if pruning.inner is None else min(prompt - text, pruning.inner_count(unpruned)),
        "paper_prefill_multiply_adds": round(multiply_adds),
        "kv_cache_bytes": sum(
            layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized
        ),
        "peak_bytes": peak_bytes(model, inputs),
    }


def out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def attempt(row: dict, work):
    """The result of `work()`; None, with the reason in the row, where memory does not suffice or the model refuses."""
    try:
        return work()
    except (RuntimeError, MemoryError, ValueError) as error:
        if out_of_memory(error):
            row["error"] = "out of memory"
        elif isinstance(error, ValueError):
            row["error"] = str(error)
        else:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def measure(model, cells: list, args) -> list:
    """One row for every cell, the cells of one frames, pooling and batch in turns."""
    progress = tqdm(total=len(cells) * (1 + args.warmup + args.repeats), unit="run", disable=None, mininterval=1)
    rows = []
    for _, group in itertools.groupby(cells, key=lambda cell: (cell["frames"], cell["video_pooling"], cell["batch"])):
        rows += measure_group(model, list(group), args, progress)
    progress.close()
    return rows


def measure_group(model, cells: list, args, progress) -> list:
    base, rows, prepared = model.config.pruning, [], []

    def run(row, pruning, inputs, work):
        progress.set_description("{method} {keep_ratio:g}, {frames} frames, batch {batch}".format(**row))
        model.config.pruning = pruning
        result = attempt(row, lambda: work(inputs)) if row["error"] is None else None
        progress.update()
        return result

    for cell in cells:
        row = {**cell, "error": None}
        rows.append(row)
        pruning = pruning_of(model, cell)
        inputs = attempt(
            row, lambda: random_inputs(model, pruning, cell["frames"], cell["batch"], args.text, args.seed)
        )
        prepared.append((row, pruning, inputs))
        row |= run(*prepared[-1], lambda inputs: describe(model, cell, inputs, args.text)) or {}
    samples = [defaultdict(list) for _ in rows]
    for turn in range(args.warmup + args.repeats):
        for kept, job in zip(samples, prepared):
            seconds = run(*job, lambda inputs: measure_once(model, inputs, args.new_tokens))
            if seconds is not None and turn >= args.warmup:
                for stage, value in seconds.items():
                    kept[stage].append(round(value, 7))
    model.config.pruning = base
    for row, kept in zip(rows, samples):
        row["samples"] = dict(kept) if row["error"] is None else {}
    return rows


def benchmark_model(args) -> dict:
    try:
        model, title = open_model(args)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    load_before = os.getloadavg()[0]
    rows = measure(model, cells_of(args), args)
    shape = SHAPES.get(args.shape)
    vision = model.config.vision_config
    vision_layers = getattr(vision, "num_hidden_layers", None) or vision.depth  # Qwen's name, the only one on 4.57
    layers = model.config.text_config.num_hidden_layers, vision_layers
    report = {
        "kind": "model",
        "command": args.command,
        "model": title,
        "medium": "video" if model.config.takes_videos else "image",
        "layers": {
            "language": layers[0],
            "language_of": shape.layers if shape else layers[0],
            "vision": layers[1],
            "vision_of": shape.vision_layers if shape else layers[1],
        },
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "attention": args.attention,
        "text_tokens": args.text,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "seed": args.seed,
        "environment": environment(model),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "rows": rows,
    }
    return {**report, "summary": summarise(report)}


def read_results(path) -> dict:
    """A report of an earlier run."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        report["environment"], report["rows"]
        return report if report["kind"] == "selection" else {**report, "summary": summarise(report)}
    except OSError as error:
        fail(f"--from {path}: cannot be read ({error.strerror}); pass the OUTPUT.json of a benchmark")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"--from {path}: not the whole result of a benchmark ({error!r}); measure again with --output")


def write_report(report: dict, args) -> None:
    write_results(args.output, {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)})
    if args.plots:
        from benchmarking.plots import draw

        write_results(args.output, {f"-{name}.png": picture for name, picture in draw(report).items()})


def main(argv=None):
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # torch's profiler tells of itself, and of GPUs that are not there, else
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    start = time.time()
    if args.source:
        report = read_results(args.source)
    elif args.selection:
        from benchmarking.selection import benchmark_selection

        use_device(args)
        report = {"kind": "selection", "command": args.command, **benchmark_selection(args)}
    else:
        report = benchmark_model(args)
    if not args.source:
        report["minutes"] = round((time.time() - start) / 60, 1)
    if args.output:
        write_report(report, args)
    print(json.dumps(report, indent=1) if args.json else markdown(report))


if __name__ == "__main__":
    main()
