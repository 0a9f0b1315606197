"""What the project does, written down: kept tokens, logits and answers of every method on the sample media.

Before something is moved in the code, the reference says what has to stay the same; `--check` compares the code with it and
names what differs. Kept tokens and answers have to be equal everywhere. Logits are equal to the bit on one machine and one
version of torch; elsewhere they are compared with a tolerance.

Examples:
    python scripts/reference.py                       # writes tests/golden/reference.json and .safetensors
    python scripts/reference.py --check               # compares, exit code 1 where something differs
    python scripts/reference.py --check --exact       # logits to the bit, too
"""

import argparse
import json
import sys

import torch
from repository import ROOT, environment, fail, load, parse_setting
from safetensors.torch import load_file, save
from tqdm import tqdm
from writing import write_whole

REFERENCE = ROOT / "tests" / "golden" / "reference"
# Every method as its paper has it, and the keys that change what a set is, how tokens are compared and where they stand.
VARIANTS = (
    "rediprune_plus,inner_method=fastv,inner_keep_ratio=0.05",
    "rediprune,positions=original",
    "rediprune,scope=video,time_weight=0.25",
    "rediprune,scope=item",
    "rediprune,video_pooling=false",
    "rediprune,keep_ratio=0.5",
    "rediprune,candidate_pool=algorithm1,max_candidates=20",
    "rediprune,candidate_pool=released,threshold=0.1",
    "rediprune,query_weighting=none",
    "rediprune,relevance=projected,distance=projected",
    "rediprune_plus,scope=frame,merge_weight=0",
    "rediprune_plus,video_pooling=false",
    "rediprune_plus,scope=item",
    "divprune,scope=frame",
    "mmtok,scope=video,relevance=attention",
    "visionzip,proportional_attention=true,positions=original",
)
QUESTIONS = 2  # of each sample
TOLERANCE = 1e-4


def settings() -> list:
    from repository import code_module

    return [*code_module("methods_registry").METHODS, *VARIANTS]


def samples() -> list:
    """(file, question) pairs."""
    questions = json.loads((ROOT / "samples" / "questions.json").read_text())
    return [(file, entry["question"]) for file, entries in questions.items() for entry in entries[:QUESTIONS]]


@torch.inference_mode()
def observe(setting: str) -> tuple:
    """Kept tokens and answer for each sample as JSON, and the logits of the first answer token (samples, vocabulary)."""
    args = argparse.Namespace(
        model=str(ROOT),
        revision="main",
        subfolder="",
        device="cpu",
        dtype="float32",
        attention="sdpa",
        threads=1,
        pruning=[],
    )
    model, processor = load(args, parse_setting(setting))
    records, logits = [], []
    for file, question in samples():
        kind = "video" if file.endswith(".mp4") else "image"
        chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=prompt, **{f"{kind}s": [str(ROOT / "samples" / file)]})
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        (item,) = model.select_tokens(**inputs)
        records.append(
            {
                "sample": file,
                "question": question,
                "kept": item.kept.tolist(),
                "answer": processor.decode(answer, skip_special_tokens=True).strip(),
            }
        )
        logits.append(model(**inputs, logits_to_keep=1).logits[0, -1])
    return records, torch.stack(logits)


def differences(setting, records, logits, reference, tensors, exact) -> list:
    """What differs from the reference, a line each."""
    if setting not in reference:
        return [f"{setting}: not in the reference"]
    lines = []
    for number, (now, then) in enumerate(zip(records, reference[setting], strict=True)):
        where = f"{setting}, {now['sample']}, {now['question']!r}"
        for key in ("kept", "answer"):
            if now[key] != then[key]:
                lines.append(f"{where}: {key} {now[key]}, was {then[key]}")
        error = (logits[number] - tensors[setting][number]).abs().max().item()
        if error > (0 if exact else TOLERANCE):
            lines.append(f"{where}: logits differ by up to {error:.2g}")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the reference instead of writing it")
    parser.add_argument("--exact", action="store_true", help="with --check: logits have to be equal to the bit")
    parser.add_argument("--settings", nargs="+", help="of these alone (default: every method, and variants)")
    args = parser.parse_args(argv)
    if args.settings and not args.check:
        parser.error("--settings belongs to --check: the reference is written whole")
    if args.check and not REFERENCE.with_suffix(".json").exists():
        fail(f"there is no {REFERENCE}.json; write it first, without --check")
    found = {setting: observe(setting) for setting in tqdm(args.settings or settings(), "settings", mininterval=2)}
    if args.check:
        reference = json.loads(REFERENCE.with_suffix(".json").read_text())["settings"]
        tensors = load_file(REFERENCE.with_suffix(".safetensors"))
        lines = [
            line
            for setting, (records, logits) in found.items()
            for line in differences(setting, records, logits, reference, tensors, args.exact)
        ]
        if not args.settings:
            lines += [
                f"{setting}: in the reference, but no longer there" for setting in reference if setting not in found
            ]
        print("\n".join(lines) or f"{len(found)} settings x {len(samples())} samples: nothing differs")
        return int(bool(lines))
    write_whole(REFERENCE.with_suffix(".safetensors"), save({name: logits for name, (_, logits) in found.items()}))
    content = {"made with": environment(), "settings": {name: records for name, (records, _) in found.items()}}
    write_whole(REFERENCE.with_suffix(".json"), json.dumps(content).replace('{"sample"', '\n{"sample"') + "\n")
    print(f"written to {REFERENCE}.json and .safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
