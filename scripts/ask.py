"""Asks a question about a video or about images, and says what it cost.

Examples:
    python scripts/ask.py --video samples/video-1.mp4 --question "what colour is the square?"
    python scripts/ask.py --video clip.mp4 --question "what happens?" --model me/LLaVA-NeXT-Video-7B-ReDiPrune --compare
    python scripts/ask.py --image a.png b.png --question "what is the same in both?" --keep-ratio 0.25
    python scripts/ask.py --frames folder/ --question "how many circles are there?" --overlay kept.png --json
    python scripts/ask.py --video clip.mp4 --chat
"""

import argparse
import json
import statistics
import sys
import time

import torch
from media import add_media_arguments, chat_parts, process, read_media
from repository import ROOT, StageTimer, add_model_arguments, at_least_one, environment, fail, load
from writing import output_picture

STAGES = ("reading the media", "vision encoder", "selection", "projector", "prefill", "decode")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_media_arguments(parser)
    parser.add_argument("--question")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="go on with questions from the standard input, one a line; the vision encoder runs once",
    )
    parser.add_argument(
        "--keep-ratio", type=float, help="share of the visual tokens that stay (default: as config.json says)"
    )
    parser.add_argument("--keep-tokens", type=at_least_one, help="instead, how many tokens of each frame or item stay")
    parser.add_argument("--method", help="pruning method (default: as config.json says)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--compare", action="store_true", help="also answer with all visual tokens, side by side")
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=5,
        help="runs of each with --compare, after one that warms up; times are their medians (default: %(default)s)",
    )
    parser.add_argument("--overlay", help="picture of the frames, kept patches bright and the rest dimmed (.png, .jpg)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.question is None and not args.chat:
        fail("--question is missing; --chat alone reads questions from the standard input")
    if args.chat and (args.compare or args.overlay):
        fail("--chat does not go with --compare or --overlay, which are of one answer; leave them out")
    if args.overlay:
        args.overlay = output_picture(args.overlay, "--overlay")
    return args


def prepare(args, processor, keep_ratio) -> tuple:
    """The model's inputs, and the seconds that reading and preprocessing the media took."""
    start = time.perf_counter()
    inputs = process(args, processor, read_media(args), args.question, keep_ratio)
    return inputs, time.perf_counter() - start


@torch.inference_mode()
def answer(args, model, processor, keep_ratio) -> dict:
    """One answer with what it took."""
    inputs, reading = prepare(args, processor, keep_ratio)
    inputs = inputs.to(model.device, model.dtype)
    with StageTimer(model) as timer:
        result = generate(args, model, processor, inputs)
    return {**result, **times({"reading the media": reading, **timer.seconds}), "inputs": inputs}


def generate(args, model, processor, inputs, **media) -> dict:
    output = model.generate(**inputs, **media, max_new_tokens=args.max_new_tokens, do_sample=False)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return {
        "answer": processor.decode(new_tokens, skip_special_tokens=True).strip(),
        "visual_tokens": visual_tokens(processor, inputs),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(new_tokens),
    }


def times(seconds: dict) -> dict:
    return {
        "seconds": {stage: round(seconds.get(stage, 0.0), 5) for stage in STAGES},
        "total_seconds": round(sum(seconds.values()), 5),
    }


def answers(args, model, processor) -> dict:
    """The answer, and with `--compare` the unpruned model's beside it: run in turns, with the median of each stage."""
    ratios = {"pruned": None, "unpruned": 1.0} if args.compare else {"pruned": None}
    rounds = [
        {name: answer(args, model, processor, ratio) for name, ratio in ratios.items()}
        for _ in range(1 + args.rounds if args.compare else 1)
    ]
    timed = rounds[1:] or rounds  # the first run of a process is slower than all others
    results = rounds[-1]
    for name, result in results.items():
        for stage in STAGES:
            result["seconds"][stage] = statistics.median(once[name]["seconds"][stage] for once in timed)
        result["total_seconds"] = statistics.median(once[name]["total_seconds"] for once in timed)
        result["runs"] = len(timed)
    return results


@torch.inference_mode()
def chat(args, model, processor) -> None:
    """A conversation about the media, whose every question selects tokens anew of what was encoded once."""
    start = time.perf_counter()
    media = read_media(args)
    inputs = process(args, processor, media, "").to(model.device, model.dtype)
    seconds = {"reading the media": time.perf_counter() - start}
    with StageTimer(model) as timer:
        encoded = model.encode_media(**inputs)
    seconds |= timer.seconds
    messages, parts = [], chat_parts(media)
    for question in questions(args):
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        text_inputs = processor(text=prompt, encoded_media=encoded, return_tensors="pt").to(model.device)
        with StageTimer(model) as timer:
            result = generate(args, model, processor, text_inputs, encoded_media=encoded)
        result |= times({**seconds, **timer.seconds})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": result["answer"]}]})
        if args.json:
            print(json.dumps({"question": question, **result}), flush=True)
        else:
            print(
                f"{as_said(args, result['answer'])}  [{result['visual_tokens']} visual tokens, {1000 * result['total_seconds']:.0f} ms]",
                flush=True,
            )
        parts, seconds = [], {}  # the media stand before the first question


def questions(args):
    """`--question`, then the lines of the standard input that are not blank."""
    if args.question is not None:
        yield args.question
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def as_said(args, answer: str) -> str:
    """An answer as it is printed: one without words says so."""
    if answer:
        return answer
    known = "; the checkpoint of this repository knows coloured shapes on a plain ground, and nothing else"
    return f"(nothing but the end token{known if args.model == str(ROOT) else ''})"


def print_report(args, results: dict) -> None:
    print(f"question: {args.question}")
    for name, result in results.items():
        label = f"answer ({name})" if len(results) > 1 else "answer"
        print(f"{label}: {as_said(args, result['answer'])}")
    print()
    print(f"{'':22}" + "".join(f"{name:>14}" for name in results))
    for key in ("visual_tokens", "prompt_tokens", "new_tokens"):
        print(f"{key.replace('_', ' '):22}" + "".join(f"{result[key]:>14}" for result in results.values()))
    for stage in STAGES:
        print(f"{stage:22}" + "".join(f"{1000 * result['seconds'][stage]:>11.1f} ms" for result in results.values()))
    print(f"{'total':22}" + "".join(f"{1000 * result['total_seconds']:>11.1f} ms" for result in results.values()))
    runs = results["pruned"]["runs"]
    print(
        f"(medians of {runs} runs in turns)" if args.compare else "(one run, the first of its process: no measurement)"
    )


def main(argv=None):
    args = parse_arguments(argv)
    pruning = {
        key: getattr(args, key) for key in ("keep_ratio", "keep_tokens", "method") if getattr(args, key) is not None
    }
    try:
        model, processor = load(args, pruning)
        if args.chat:
            return chat(args, model, processor)
        results = answers(args, model, processor)
        inputs = [result.pop("inputs") for result in results.values()][0]
        unpruned_tokens = count_unpruned(args, processor)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    if args.json:
        settings = model.config.pruning.to_dict()
        record = {"question": args.question, **results, "visual_tokens_unpruned": unpruned_tokens, "pruning": settings}
        print(json.dumps({**record, "environment": environment(model)}, indent=2))
    else:
        print_report(args, results)
        kept = results["pruned"]["visual_tokens"]
        print(f"\n{kept} of {unpruned_tokens} visual tokens kept ({kept / unpruned_tokens:.1%})")
    if args.overlay:
        write_overlay(args, model, processor, inputs, f"{args.question}  {results['pruned']['answer']}")


def write_overlay(args, model, processor, inputs, caption: str) -> None:
    from drawing.overlay import draw_overlay

    try:
        draw_overlay(model, processor, inputs, caption, args.overlay)
    except OSError as error:
        fail(f"--overlay {args.overlay} cannot be written: {error.strerror or error}")
    if not args.json:
        print(f"overlay written to {args.overlay}")


def count_unpruned(args, processor) -> int:
    return visual_tokens(processor, prepare(args, processor, 1.0)[0])


def visual_tokens(processor, inputs) -> int:
    """How many placeholders a prompt has."""
    tokens = [getattr(processor, f"{kind}_token_id") for kind in processor.placeholders]
    return sum(int((inputs["input_ids"] == token).sum()) for token in tokens)


if __name__ == "__main__":
    main()
