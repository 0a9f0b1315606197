"""Random prompts on small random models, each checked against a plain second implementation.

A case draws a method that prunes before the language model, its settings, a batch of prompts with images and videos in any
order, padding, and what is done with a cache. What is checked:

- as many placeholders and kept tokens as the definition says; kept indices in range, ascending and none twice;
- a row keeps the same tokens alone and in its batch;
- the logits of every row are those of one plain pass over what was kept, and those of the stock class where nothing is
  pruned;
- so are the logits of generated tokens and of whatever follows over a cache: without one, dynamic, static, offloaded, under
  beams, cropped, in a second turn, copied, with rows selected, repeated or reordered, and reset.

A case follows from --seed and its number. A failing one is printed with the command that repeats it, and the exit code is
1.

Examples:
    python scripts/fuzz.py --runs 2000 --seed 0 --output runs/fuzz
    python scripts/fuzz.py --runs 500 --first 2000          # more cases of the same seed, as in another process
    python scripts/fuzz.py --only 137                       # one case, in full
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from typing import Optional
from unittest import mock

import numpy as np
import torch
import transformers
from fuzzing.cases import TEXT_TOWER, Case, draw_case
from fuzzing.reference import Layout, Row
from repository import ROOT, at_least_one, code_module, environment, recorded_command
from tqdm import tqdm
from transformers import DynamicCache
from writing import output_prefix, write_results

sys.path.append(str(ROOT / "tests" / "support"))  # the builders of small models are those of the tests
code_module("configuration_rediprune")
from tiny import random_image, random_video, save_clip, stock_twin, tiny_model, tiny_processor  # noqa: E402

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
TOLERANCE = 2e-5  # of logits, relative to the largest; rounding makes a tenth of it


class Deviation(Exception):
    """Something is not as it should be; the message says what."""


def check(holds, message: str) -> None:
    if not holds:
        raise Deviation(message)


def check_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    check(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    check(found.isfinite().all(), f"{what}: not finite")
    distance = float((found - expected).abs().max()) if found.numel() else 0.0
    limit = TOLERANCE * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    check(distance <= limit, f"{what}: logits differ by {distance:.3g}, more than {limit:.3g}")


class Models:
    """The small models by their weights and attention, and the processor."""

    def __init__(self, text_tower: str):
        self.text_tower, self.known = text_tower, {}
        self.processor = tiny_processor()

    def of(self, case: Case) -> tuple:
        """Model, stock model with the same weights, and processor, set as the case says."""
        key = case.weights, case.attention
        if key not in self.known:
            model = tiny_model(case.weights)
            model.set_attn_implementation(case.attention)
            stock = stock_twin(model)
            stock.set_attn_implementation(case.attention)
            self.known[key] = model, stock
        model, stock = self.known[key]
        block = {key: self.text_tower if value == TEXT_TOWER else value for key, value in case.pruning.items()}
        model.config.pruning = block
        processor = copy.copy(self.processor)
        processor.pruning = model.config.pruning
        return model, stock, processor


class Run:
    """One case: its models, inputs and checks."""

    def __init__(self, case: Case, models: Models):
        self.case = case
        self.model, self.stock, self.processor = models.of(case)
        self.pruning = self.model.config.pruning.with_budget(case.keep_ratio)
        self.config = self.model.config

    # -- inputs

    def inputs(self, rows: list):
        """What the processor makes of prompts."""
        parts = [part for row in rows for part in row]
        media = {
            "images": [random_image(part.seed, part.size) for part in parts if part.kind == "image"],
            "videos": [random_video(part.seed, self.case.frames, part.size) for part in parts if part.kind == "video"],
        }
        texts = [" ".join(part.text or f"<{part.kind}>" for part in row) for row in rows]
        return self.processor(
            text=texts,
            padding=True,
            padding_side=self.case.padding_side,
            keep_ratio=self.case.keep_ratio,
            **{kind: items for kind, items in media.items() if items},
        )

    def select(self, inputs) -> list:
        if not ({"pixel_values", "pixel_values_videos"} & set(inputs)):
            return []
        return self.model.select_tokens(**inputs)

    def layout(self, part) -> Layout:
        return Layout(part.kind, part.size, self.case.frames, self.config, self.pruning.video_pooling)

    # -- the reference

    def reference(self, parts: list, before: Row = None) -> Row:
        """The row of a prompt alone, behind another one where that is given; checks what is kept of its media."""
        inputs = self.inputs([parts])
        media = self.in_order(parts, self.select(inputs))
        row = Row(self.model) if before is None else before.cut(len(before), before.next_position)
        ids = inputs["input_ids"][0]
        ids = ids if before is None else ids[1:]  # without the token that begins a prompt
        start = 0
        for part, medium in zip([part for part in parts if part.kind != "text"], media):
            token = self.config.video_token_id if part.kind == "video" else self.config.image_token_id
            first = start + int((ids[start:] == token).nonzero()[0])
            layout = self.layout(part)
            number = (
                sum(layout.counts(self.pruning, part.kind))
                if self.pruning.prunes
                else self.unpruned_length(part, layout)
            )
            end = first + number
            check(
                bool((ids[first:end] == token).all()) and end <= len(ids),
                f"{part.kind}: fewer than {number} placeholders",
            )
            self.check_kept(part, medium, layout)
            row.add_text(ids[start:first]).add_medium(medium, layout, self.pruning)
            start = end
        rest = ids[start:]
        placeholders = (rest == self.config.video_token_id) | (rest == self.config.image_token_id)
        check(not placeholders.any(), f"{int(placeholders.sum())} placeholders too many")
        return row.add_text(rest)

    @staticmethod
    def unpruned_length(part, layout) -> int:
        return layout.length if part.kind == "image" else layout.num_tokens

    @staticmethod
    def in_order(parts: list, media: list) -> list:
        """Media of one row, images first, in the order of its parts."""
        queues = {kind: iter([medium for medium in media if medium.kind == kind]) for kind in ("image", "video")}
        return [next(queues[part.kind]) for part in parts if part.kind != "text"]

    def check_kept(self, part, medium, layout) -> None:
        name, merges = (
            f"{part.kind} {part.size}",
            code_module("methods_registry").METHODS[self.pruning.method].merges_in_encoder,
        )
        if not self.pruning.prunes:
            check(len(medium.kept) == layout.num_tokens, f"{name}: not all tokens stay")
            return
        counts = layout.counts(self.pruning, part.kind)
        rows = medium.layout.split(medium.kept) if len(counts) == len(layout.sets) else [medium.kept]
        check([len(row) for row in rows] == counts, f"{name}: keeps {[len(row) for row in rows]} instead of {counts}")
        sizes = layout.sets if len(rows) == len(layout.sets) else [layout.num_tokens]
        for row, size in zip(rows, sizes):
            check(
                len(row) == 0 or 0 <= int(row.min()) <= int(row.max()) < size, f"{name}: kept {row.tolist()} of {size}"
            )
            # Tokens that were merged in the encoder may fall into one cell of a pooled grid.
            steps = row.diff()
            check(bool((steps >= 0 if merges else steps > 0).all()), f"{name}: kept {row.tolist()} is not ascending")
        if medium.token_sizes is not None and self.pruning.resolved("proportional_attention") and not merges:
            total = [float(row.sum()) for row in medium.token_sizes.split(counts)]
            check(np.allclose(total, sizes), f"{name}: sizes add up to {total} instead of {sizes}")

    # -- what is checked

    def all(self) -> None:
        rows = [self.reference(parts) for parts in self.case.rows]
        inputs = self.inputs(self.case.rows)
        self.check_batch(inputs)
        self.check_forward(inputs, rows)
        padded = inputs["attention_mask"].min() == 0
        if not (padded and self.case.padding_side == "right"):  # nothing can follow padding
            getattr(self, "cache_" + self.case.cache.replace(" ", "_"))(inputs, rows)

    def check_batch(self, inputs) -> None:
        """A row keeps in the batch what it keeps alone."""
        media = self.select(inputs)
        for number, parts in enumerate(self.case.rows):
            alone = self.select(self.inputs([parts]))
            together = [medium for medium in media if medium.row == number]
            same = len(alone) == len(together) and all(torch.equal(a.kept, b.kept) for a, b in zip(alone, together))
            check(same, f"row {number} keeps other tokens in the batch than alone")

    def check_forward(self, inputs, rows) -> None:
        output = self.model(**self.placed(inputs))
        for number, row in enumerate(rows):
            check_close(
                output.logits[number][inputs["attention_mask"][number].bool()], row.logits(), f"row {number}, one pass"
            )
        if not self.pruning.prunes and self.pruning.video_pooling:
            own = {"keep_ratio", "clip_input_ids", "clip_attention_mask", "word_input_ids"}
            stock = self.stock(**{key: value for key, value in self.placed(inputs).items() if key not in own})
            check(
                torch.equal(output.logits, stock.logits),
                "nothing is pruned, but the logits are not those of the stock class",
            )
        kept = [*(output.image_kept_indices or ()), *(output.video_kept_indices or ())]
        if self.pruning.prunes or not self.pruning.video_pooling:
            check(len(kept) == len(self.select(inputs)), "the output does not tell what was kept of every medium")

    def placed(self, inputs) -> dict:
        """With the positions that `generate` gives to padded rows."""
        mask = inputs["attention_mask"]
        return {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    def generate(self, inputs, rows, what: str, **options):
        """Greedy tokens, each checked against one pass over the row and the tokens before it."""
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.case.new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **self.no_placeholders(),
            **options,
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        check(new.shape[1] == self.case.new_tokens, f"{what}: {new.shape[1]} tokens instead of {self.case.new_tokens}")
        for number, row in enumerate(rows):
            found = torch.stack([step[number] for step in output.logits])
            whole = row.cut(len(row), row.next_position).add_text(new[number])
            check_close(found, whole.logits()[len(row) - 1 : -1], f"row {number}, {what}")
        return output

    def no_placeholders(self) -> dict:
        """A random model would write placeholders, too."""
        return {"suppress_tokens": [self.config.image_token_id, self.config.video_token_id]}

    def cache_none(self, inputs, rows):
        self.generate(inputs, rows, "generated without a cache", use_cache=False)

    def cache_dynamic(self, inputs, rows):
        self.generate(inputs, rows, "generated over a dynamic cache")

    def cache_static(self, inputs, rows):
        self.generate(
            inputs, rows, "generated over a static cache", cache_implementation="static", disable_compile=True
        )

    def cache_offloaded(self, inputs, rows):
        with ExitStack() as stack:
            if not torch.cuda.is_available():  # then streams are make-believe, and no layer leaves
                for name in ("torch.Stream", "torch.cuda.default_stream"):
                    stack.enter_context(mock.patch(name, mock.MagicMock()))
            cache = DynamicCache(config=self.config.text_config, offloading=True)
            self.generate(inputs, rows, "generated over an offloaded cache", past_key_values=cache)

    def cache_beams(self, inputs, rows):
        """The score of a beam is the mean log probability of its tokens in one pass."""
        number = self.case.new_tokens
        output = self.model.generate(
            **inputs, do_sample=False, num_beams=2, max_new_tokens=number, return_dict_in_generate=True, output_scores=True,
            **self.no_placeholders(),
        )  # fmt: skip
        for index, row in enumerate(rows):
            new = output.sequences[index, inputs["input_ids"].shape[1] :]
            logits = row.cut(len(row), row.next_position).add_text(new).logits()[len(row) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, new[:, None]).mean()
            found = output.sequences_scores[index]
            check(
                math.isclose(found, expected, abs_tol=1e-4, rel_tol=1e-4),
                f"row {index}, beams: score {found} for {expected}",
            )

    # -- a cache that is used again

    def filled(self, inputs):
        cache = DynamicCache(config=self.config.text_config)
        self.model(**self.placed(inputs), past_key_values=cache)
        return cache

    def follow(self, cache, before: Row, what: str) -> None:
        """The rest of the case over a cache that holds one row, checked against one pass over both."""
        inputs = self.inputs([self.case.rest])
        ids = inputs["input_ids"][:, 1:]
        mask = torch.ones(1, len(before) + ids.shape[1], dtype=torch.long)
        new = {**inputs, "input_ids": ids, "attention_mask": mask}
        found = self.model(**self.placed_behind(new), past_key_values=cache).logits[0]
        check_close(found, self.reference(self.case.rest, before).logits()[len(before) :], what)

    def placed_behind(self, inputs) -> dict:
        number = inputs["input_ids"].shape[1]
        return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1)[:, -number:]}

    def follow_with_words(self, cache, mask, rows: list, what: str) -> None:
        """The same words after every row of a cache."""
        ids = self.processor.tokenizer("how many red star", return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = ids.expand(len(rows), -1)
        inputs = {"input_ids": ids, "attention_mask": torch.cat([mask, torch.ones_like(ids)], dim=1)}
        found = self.model(**self.placed_behind(inputs), past_key_values=cache).logits
        for number, row in enumerate(rows):
            whole = row.cut(len(row), row.next_position).add_text(ids[number])
            check_close(found[number], whole.logits()[len(row) :], f"row {number}, {what}")

    def cache_crop(self, inputs, rows):
        """Cropped between two parts of the prompt, and followed by others."""
        cache, (parts,) = self.filled(inputs), self.case.rows
        check(
            cache.get_seq_length() == len(rows[0]), f"the cache holds {cache.get_seq_length()} tokens of {len(rows[0])}"
        )
        before = self.beginning(rows[0], parts[: int(self.case.cut * (len(parts) + 1))])
        if len(before) < len(rows[0]):
            cache.crop(len(before) - len(rows[0]))
        self.follow(cache, before, "after a crop")

    def beginning(self, row: Row, parts: list) -> Row:
        """The row up to the end of some of its parts."""
        length, position = 1, 1
        for part in parts:
            if part.kind == "text":
                number = len(self.processor.tokenizer(part.text, add_special_tokens=False)["input_ids"])
                length, position = length + number, position + number
                continue
            layout = self.layout(part)
            number = (
                sum(layout.counts(self.pruning, part.kind))
                if self.pruning.prunes
                else self.unpruned_length(part, layout)
            )
            original = self.pruning.prunes and self.pruning.resolved("positions") == "original"
            length, position = length + number, position + (layout.length if original else number)
        return row.cut(length, position)

    def cache_second_turn(self, inputs, rows):
        output = self.generate(inputs, rows, "generated in the first turn")
        ids, cache = output.sequences, output.past_key_values
        seen = ids[0, inputs["input_ids"].shape[1] : cache.get_seq_length()]  # the last token is not in the cache yet
        before = rows[0].cut(len(rows[0]), rows[0].next_position).add_text(seen)
        self.follow(cache, before, "in a second turn")

    def cache_copy(self, inputs, rows):
        cache, mask = self.filled(inputs), inputs["attention_mask"]
        copied = copy.deepcopy(cache)
        self.follow_with_words(cache, mask, rows, "over a cache")
        self.follow_with_words(copied, mask, rows, "over a copy of a cache")

    def change_rows(self, inputs, rows, order: list, change, what: str):
        cache = self.filled(inputs)
        change(cache, torch.tensor(order))
        self.follow_with_words(cache, inputs["attention_mask"][order], [rows[number] for number in order], what)

    def cache_select(self, inputs, rows):
        order = list(range(len(rows)))[::-1][: max(1, len(rows) - 1)]
        self.change_rows(
            inputs, rows, order, lambda cache, order: cache.batch_select_indices(order), "of selected rows"
        )

    def cache_repeat(self, inputs, rows):
        order = [number for number in range(len(rows)) for _ in range(2)]
        self.change_rows(inputs, rows, order, lambda cache, order: cache.batch_repeat_interleave(2), "of repeated rows")

    def cache_reorder(self, inputs, rows):
        order = [len(rows) - 1, *range(len(rows) - 1)]
        self.change_rows(inputs, rows, order, lambda cache, order: cache.reorder_cache(order), "of reordered rows")

    def cache_reset(self, inputs, rows):
        cache = self.filled(inputs)
        cache.reset()
        if cache.get_seq_length():  # some versions of transformers keep the length
            return
        logits = self.model(**self.placed(inputs), past_key_values=cache).logits
        check_close(logits[0], rows[0].logits(), "over a cache that was reset")


@torch.no_grad()
def run_case(case: Case, models: Models) -> Optional[str]:
    """What is wrong with a case, or `None`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Run(case, models).all()
    except Deviation as deviation:
        return str(deviation)
    except Exception:
        return traceback.format_exc(limit=-4)
    return None


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=at_least_one, default=2000, help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--first", type=int, default=0, metavar="CASE", help="number of the first case (default: %(default)s)"
    )
    parser.add_argument("--only", type=int, metavar="CASE", help="one case, in full")
    parser.add_argument("--output", help="where results go: OUTPUT.json (default: the terminal alone)")
    args = parser.parse_args(argv)
    for name in ("seed", "first", "only"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 0")
    if args.output:
        args.output = output_prefix(args.output)
    return args


def repeat(args, number: int) -> str:
    return f"python scripts/fuzz.py --seed {args.seed} --only {number}"


def run_all(args, models: Models) -> tuple:
    """The failures, and how often each choice was drawn."""
    failures, drawn = [], {"method": Counter(), "cache": Counter(), "rows": Counter(), "media of a row": Counter()}
    with tqdm(range(args.first, args.first + args.runs), unit="case", disable=None) as progress:
        for number in progress:
            case = draw_case(args.seed, number)
            drawn["method"][case.pruning["method"]] += 1
            drawn["cache"][case.cache] += 1
            drawn["rows"][len(case.rows)] += 1
            for row in case.rows:
                drawn["media of a row"][sum(part.kind != "text" for part in row)] += 1
            wrong = run_case(case, models)
            if wrong is not None:
                failures.append({"command": repeat(args, number), "wrong": wrong, "case": case.as_record()})
                tqdm.write(f"{repeat(args, number)}\n    {wrong.strip().splitlines()[-1]}")
                progress.set_postfix(failed=len(failures))
    return failures, {name: dict(sorted(counter.items())) for name, counter in drawn.items()}


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="text_tower_") as folder:
        models = Models(save_clip(folder))
        if args.only is not None:
            case = draw_case(args.seed, args.only)
            print(json.dumps(case.as_record(), indent=1))
            wrong = run_case(case, models)
            print("passes" if wrong is None else wrong)
            sys.exit(wrong is not None)
        failures, drawn = run_all(args, models)
    report = {
        "command": recorded_command(__file__, argv),
        "environment": environment(),
        "seed": args.seed,
        "first": args.first,
        "runs": args.runs,
        "failed": len(failures),
        "drawn": drawn,
        "failures": failures,
    }
    if args.output:
        write_results(args.output, {".json": json.dumps(report, indent=1) + "\n"})
    for name, counter in drawn.items():
        print(f"{name}: " + ", ".join(f"{value} {number}" for value, number in counter.items()))
    print(f"{args.runs} cases of seed {args.seed} from {args.first} on, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
