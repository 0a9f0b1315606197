"""Counts the graphs that torch.compile makes of one forward pass, beside those of the stock class with the same weights.

For each class: graphs, and every place that breaks one, with torch's reason. Each break splits all functions that it is called
through, so that one place is counted once for each. With --compile also the seconds of compiling and of calls, with torch's own
compiler, and how far the logits move.

Examples:
    python scripts/graph_breaks.py --video samples/video-1.mp4
    python scripts/graph_breaks.py --image samples/image-1.png --pruning method=divprune --compile --output runs/graphs
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from check_variant import stock_classes
from media import add_media_arguments, process, read_media
from repository import ROOT, add_model_arguments, at_least_one, environment, fail, load, recorded_command
from writing import output_prefix, table, write_results


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_media_arguments(parser)
    parser.add_argument("--question", default="what colour is the square?", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="also compile, and take the time")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="timed calls (default: %(default)s)")
    parser.add_argument("--output", help="where results go: OUTPUT.json, OUTPUT.md (default: the terminal alone)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.output:
        args.output = output_prefix(args.output)
    return args


def stock_of(model):
    """The stock class with the weights of a model."""
    config_class, model_class = stock_classes(model.config.base_model_type)
    stock = model_class._from_config(config_class.from_dict(model.config.to_dict()), dtype=model.dtype)
    stock.load_state_dict(model.state_dict())
    return stock.to(model.device).eval()


def count(forward, inputs: dict) -> dict:
    """How many graphs a call makes, and its breaks: the place (file:line, of the project's own files or another's), and the reason."""
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # which tells of each break again
    found = torch._dynamo.explain(forward)(**inputs)
    breaks = Counter()
    for broken in found.break_reasons:
        frame = broken.user_stack[-1]
        breaks[Path(frame.filename).name, frame.lineno, broken.reason.splitlines()[0]] += 1
    places = [
        {"file": file, "line": line, "reason": reason, "own": (ROOT / file).exists(), "times": times}
        for (file, line, reason), times in breaks.items()
    ]
    return {"graphs": found.graph_count, "operations": found.op_count, "breaks": places}


def timed(forward, inputs: dict, repeats: int) -> dict:
    """Seconds of calls as they are, of the first compiled one, and of those after it; and how far the logits move."""
    expected = forward(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(forward)
    start = time.perf_counter()
    moved = (compiled(**inputs).logits - expected).abs().max().item()
    first = time.perf_counter() - start
    return {
        "eager": median_seconds(forward, inputs, repeats),
        "first": first,
        "compiled": median_seconds(compiled, inputs, repeats),
        "logits move by": moved,
    }


def median_seconds(forward, inputs: dict, repeats: int) -> float:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        forward(**inputs).logits.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@torch.no_grad()
def measure(args) -> dict:
    model, processor = load(args)
    media = read_media(args)
    cases = {
        "this model, pruned": (model, None),
        "this model, keep_ratio=1": (model, 1.0),
        "stock class": (stock_of(model), 1.0),
    }
    results = {}
    for name, (tried, ratio) in cases.items():
        inputs = dict(process(args, processor, media, args.question, ratio).to(model.device, model.dtype))
        if tried is model and ratio is not None:
            inputs["keep_ratio"] = ratio
        results[name] = count(tried.forward, inputs)
        if args.compile:
            results[name] |= timed(tried.forward, inputs, args.repeats)
    return {"results": results, "pruning": model.config.pruning.to_dict(), "environment": environment(model)}


def as_text(record: dict) -> str:
    results = record["results"]
    lines = table(
        ["", "graphs", "operations"],
        [[name, str(found["graphs"]), str(found["operations"])] for name, found in results.items()],
    )
    if any("first" in found for found in results.values()):
        rows = [
            [name, *(f"{found[key]:.3g}" for key in ("eager", "first", "compiled", "logits move by"))]
            for name, found in results.items()
        ]
        lines += ["", *table(["", "eager, s", "first compiled call, s", "later ones, s", "logits move by"], rows)]
    for name, found in results.items():
        rows = [
            [
                f"`{place['file']}:{place['line']}`",
                "ours" if place["own"] else "transformers'",
                str(place["times"]),
                place["reason"],
            ]
            for place in found["breaks"]
        ]
        lines += [
            "",
            f"**{name}**",
            "",
            *(table(["place", "whose", "breaks", "reason"], rows) if rows else ["no break"]),
        ]
    return "\n".join(lines)


def measured_with(record: dict) -> str:
    run = record["environment"]
    return (
        f"Command: `{record['command']}`  \n{run['cpu']}, {run['threads']} threads, {run['device']}, {run['dtype']}, torch "
        f"{run['torch']}, transformers {run['transformers']}, {run['date']}; times are medians of {record['repeats']} calls."
    )


def main(argv=None):
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", module="torch")
    try:
        record = {"command": recorded_command(__file__, argv), "repeats": args.repeats, **measure(args)}
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    text = as_text(record)
    print(text)
    if args.output:
        page = f"# Graphs of `torch.compile`\n\n{measured_with(record)}\n\n{text}\n"
        write_results(args.output, {".json": json.dumps(record, indent=2) + "\n", ".md": page})


if __name__ == "__main__":
    main()
