"""Accuracy on held-out generated videos and images: pruning settings x keep ratios x seeds, with 95 % intervals.

A setting is a method and, after commas, changes to the pruning block: `rediprune`, `rediprune,positions=original`,
`rediprune,alpha=2,query_weighting=average`, `random,seed=1`. One with a budget in tokens (`rediprune,keep_tokens=64`) runs once, and
its ratio in the tables is what that comes to; so does one that needs no budget (`vtw`). The unpruned model always runs first, and every
other row is also compared with its answers.

Three names stand for many settings: `methods` (every method whose budget is the ratio, with the controls), `ablation` (the choices of
`rediprune_plus` one by one) and `stages` (before the language model, inside it and both, for `--operations`). Those of them that the
model refuses, as a tower without CLS does, are left out, and the report says why.

Controls: the methods `random` and `uniform`; and `query=other` (select for the question of another sample) or
`query=constant` (for one and the same text), after a method that looks at the question. The answer is still to the question
itself. What is drawn at random, `random` and `query=other`, runs for each of `--seeds`.

Answers are written down as they come (OUTPUT.answers.jsonl, OUTPUT.batches.*.jsonl); a run that was killed goes on where it
stopped. Under `accelerate launch` the processes share the batches, with the same answers; on a machine without GPUs it needs
`--multi_gpu` all the same, since its `--cpu` starts one process.

Examples:
    python scripts/evaluate.py --output docs/results/accuracy --plots
    python scripts/evaluate.py --output runs/quick --scenes 40 --ratios 0.25 0.1 --settings rediprune random uniform
    python scripts/evaluate.py --output runs/query --settings rediprune rediprune,query=other rediprune,query=constant
    python scripts/evaluate.py --output runs/seeds --settings rediprune random --seeds 5 --kinds video
    python scripts/evaluate.py --output runs/all --settings methods --ratios 0.25 4/36 --subfolder checkpoints/qwen2_5_vl
    python scripts/evaluate.py --output runs/equal --settings stages --operations 0.5 0.25
    accelerate launch --multi_gpu --num_processes 2 scripts/evaluate.py --output runs/shared --threads 1
    python scripts/evaluate.py --output runs/shared --threads 1 --time 15 --plots   # adds times to the answers
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import evaluation.questions as evaluate_questions
import torch
import toy_world
from evaluation.costs import Costs
from evaluation.groups import as_settings
from evaluation.log import AnswerLog, JsonLines, answers_path, claimed, code_fingerprint
from evaluation.questions import OtherQuery, Questions, add_scene_arguments, answer, check_scenes
from evaluation.report import mark_fronts, markdown, score
from evaluation.settings import UNPRUNED, Setting
from repository import (
    FeatureMemory,
    add_model_arguments,
    at_least_one,
    environment,
    fail,
    keep_ratio,
    load,
    recorded_command,
)
from tqdm import tqdm
from writing import output_prefix, write_results

DEFAULT_SETTINGS = ("rediprune", "rediprune,positions=original", "random", "random,positions=original", "uniform")
DEFAULT_RATIOS = (0.5, 0.25, 0.15, 0.1)
BATCH = 48
TIMED_BATCH = 8
WARM_UP = 2  # batches that are not counted: the first runs of a process are slower than all others


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", required=True, help="where results go: OUTPUT.json, OUTPUT.md, OUTPUT.answers.jsonl"
    )
    parser.add_argument("--settings", nargs="+", type=as_settings, default=None, metavar="METHOD[,KEY=VALUE...]")
    parser.add_argument("--ratios", nargs="+", type=keep_ratio, default=DEFAULT_RATIOS, help="default: %(default)s")
    parser.add_argument(
        "--operations",
        nargs="+",
        type=keep_ratio,
        metavar="SHARE",
        help="in place of --ratios: each setting at the ratio where its prefill takes this share of the unpruned one's operations",
    )
    parser.add_argument("--seeds", type=at_least_one, default=1, help="seeds of what is drawn at random (default: 1)")
    add_scene_arguments(parser, 300)
    parser.add_argument("--kinds", nargs="+", default=["video", "image"], choices=["video", "image"])
    parser.add_argument("--batch", type=at_least_one, default=BATCH, help="questions in a batch (default: %(default)s)")
    parser.add_argument(
        "--time", type=at_least_one, metavar="BATCHES", help=f"also time every row, on so many batches of {TIMED_BATCH}"
    )
    parser.add_argument("--plots", action="store_true", help="also draw OUTPUT.*.png (needs matplotlib)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.settings = [setting for asked in args.settings or map(as_settings, DEFAULT_SETTINGS) for setting in asked]
    for chosen in args.settings:
        if "keep_ratio" in chosen.changes:
            parser.error(f"--settings {chosen.text}: give the keep ratio as --ratios {chosen.changes['keep_ratio']}")
    args.settings = list({setting.text: setting for setting in args.settings}.values())
    args.ratios, args.kinds = list(dict.fromkeys(args.ratios)), list(dict.fromkeys(args.kinds))
    check_scenes(parser, args)
    args.output = output_prefix(args.output)
    if args.scenes == 1 and any(setting.query == "other" for setting in args.settings):
        parser.error("--scenes 1 has no question of another sample for query=other; give at least --scenes 2")
    args.command = recorded_command(__file__, argv)
    if "--first-scene" not in args.command:
        args.command += f" --first-scene {args.first_scene}"  # whatever the default will be
    return args


class Processes:
    """The processes that share the batches: one, or those of `accelerate launch`."""

    def __init__(self, args):
        self.rank, self.number = 0, int(os.environ.get("WORLD_SIZE", 1))
        if self.number == 1:
            if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ:
                print(
                    "accelerate launch --cpu started one process, although several were asked for; --multi_gpu in its place "
                    "starts them, without GPUs too",
                    file=sys.stderr,
                )
            return
        try:
            from accelerate import PartialState
        except ImportError:
            fail(
                f"WORLD_SIZE={self.number}: several processes need accelerate; install it with `pip install accelerate`"
            )
        self.state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))
        self.rank, self.number = self.state.process_index, self.state.num_processes
        if args.device == "cuda":
            args.device = str(self.state.device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.number > 1:
            self.state.wait_for_everyone()

    def share(self, items: list) -> list:
        return items[self.rank :: self.number]


class Evaluation:
    """Loaded model and processor, what they have answered, and how settings are put into force."""

    def __init__(self, args, processes: Processes):
        self.args, self.processes = args, processes
        self.model, self.processor = load(args)
        self.base = self.model.config.pruning
        self.memory, self.other_query = FeatureMemory(self.model), OtherQuery(self.model)
        self.left_out = self._refusals()
        args.settings = [setting for setting in args.settings if setting.text not in self.left_out]
        fingerprint = {
            "first_scene": args.first_scene,
            "scenes": args.scenes,
            "dtype": str(self.model.dtype),
            "pruning": dict(args.pruning),
            "code": code_fingerprint(self.model, self.processor, evaluate_questions, toy_world),
            "weights": float(sum(parameter.detach().double().abs().sum() for parameter in self.model.parameters())),
        }
        self.output = args.output
        self.log = AnswerLog(self.output, fingerprint, processes.rank)
        machine = environment(self.model)
        machine.pop("date")
        self.times = JsonLines(self.output.with_name(self.output.name + ".times.jsonl"), {**fingerprint, **machine})
        processes.wait()  # nobody writes before everybody has read

    def _refusals(self) -> dict:
        """What the model says against settings that it may refuse, by their text; against any other it raises, too."""
        questions, reasons = Questions(self.args.kinds[0], 2, self.args.first_scene), {}
        for setting in self.args.settings:
            if not setting.may_be_refused:
                self._block(setting)  # before anything is computed
                continue
            try:
                self.use(setting)
                answer(self.model, self.processor, self.inputs(questions, setting, (0, 1), 0.5))
            except ValueError as error:
                reasons[setting.text] = str(error)
        if self.processes.main:
            for text, reason in reasons.items():
                print(f"{text} is left out: {reason}", file=sys.stderr)
        return reasons

    def _block(self, setting: Setting):
        """The pruning block of a setting."""
        return self.base.with_changes(**setting.changes)

    def variants(self, setting: Setting) -> list:
        """A seeded setting once for each seed; the first has the seed of the model's pruning block."""
        if not setting.seeded or self.args.seeds == 1:
            return [setting]
        start = self.base.seed
        return [setting, *(setting.with_seed(seed) for seed in range(start + 1, start + self.args.seeds))]

    def use(self, setting: Setting) -> None:
        self.model.config.pruning = self.processor.pruning = self._block(setting)

    def inputs(self, questions: Questions, setting: Setting, batch: tuple, ratio: float):
        """A batch on the model's device; with a control of the query, the text that it selects for is set, too."""
        seed, first = self.model.config.pruning.seed, batch[0]
        self.other_query.tokens = None
        ratio = setting.ratio_of_call(ratio)
        inputs = questions.inputs(self.processor, *batch, ratio)
        if setting.query != "own":
            queries = [(self.processor, setting.query, index, seed) for index in range(first, first + batch[1])]
            self.other_query.tokens = [questions.query(*query) for query in queries]
            caller = copy.copy(self.processor)
            caller.pruning = caller.pruning.with_budget(ratio)
            inputs.update(caller.question_inputs([questions.query_prompt(*query) for query in queries]))
        return inputs.to(self.model.device, self.model.dtype)

    def answers(self, questions: Questions, setting: Setting, ratio: float) -> list:
        """The answers to all questions, from the log where they are there."""
        cell, batches = (questions.kind, setting.text, ratio), questions.batches(self.args.batch)
        if not self.log.finished(cell, len(questions)):
            self.use(setting)
            mine = self.processes.share(batches)
            title = f"{setting.text} {ratio:g}"
            for batch in tqdm(mine, desc=title, unit="batch", leave=False, disable=not self.processes.main):
                if not self.log.has(cell, *batch):
                    inputs = self.inputs(questions, setting, batch, ratio)
                    self.log.add(cell, batch[0], answer(self.model, self.processor, inputs))
            self.processes.wait()
            self.log.collect(cell, batches, write=self.processes.main)
        return self.log.done[cell]

    def time_rows(self, questions: Questions, cells: list) -> dict:
        """
        {cell: seconds a question}, from pixels to the answer with the vision tower: on each batch all cells in turn, so that
        a disturbance of the machine falls on all of them.
        """
        kind, batches = questions.kind, questions.batches(TIMED_BATCH)
        known = {tuple(record["cell"]): record["seconds"] for record in self.times.read() if record["cell"][0] == kind}
        rounds = range(-WARM_UP, self.args.time)
        with self.memory.switched_off():
            for number in tqdm(rounds, desc=f"times of {kind}s", unit="batch"):
                for setting, ratio in cells:
                    cell = (kind, setting.text, ratio, number)
                    if cell not in known:
                        known[cell] = self._seconds(questions, setting, batches[number % len(batches)], ratio)
                        self.times.append({"cell": cell, "seconds": known[cell]})
        return {
            (setting.text, ratio): [known[kind, setting.text, ratio, number] for number in range(self.args.time)]
            for setting, ratio in cells
        }

    def _seconds(self, questions, setting, batch, ratio) -> float:
        self.use(setting)
        inputs = self.inputs(questions, setting, batch, ratio)
        self._synchronize()
        start = time.perf_counter()
        answer(self.model, self.processor, inputs)
        self._synchronize()
        return (time.perf_counter() - start) / batch[1]

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def summary(seconds: list) -> dict:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return {"seconds_per_question": middle, "low": low, "high": high, "rounds": len(seconds), "batch": TIMED_BATCH}


def cells_of(run: Evaluation, costs: Costs) -> list:
    """(setting, keep ratio, share of the operations that was asked for, if any) of every row but the unpruned one."""
    args, cells = run.args, []
    with_ratio = [setting for setting in args.settings if setting.takes_ratio]
    if args.operations:
        for share, setting in itertools.product(args.operations, with_ratio):
            run.use(setting)
            ratio = costs.ratio_at(share)
            if ratio is None:
                print(f"{setting.text} cannot take {share:g} of the unpruned operations: left out", file=sys.stderr)
            else:
                cells.append((setting, ratio, share))
    else:
        cells += [(setting, ratio, None) for ratio in args.ratios for setting in with_ratio]
    for setting in args.settings:
        if not setting.takes_ratio:
            run.use(setting)
            cells.append((setting, costs.share_of_budget(), None))
    return cells


def evaluate_kind(run: Evaluation, kind: str) -> list:
    """The rows of one kind of medium."""
    args, rows = run.args, []
    questions = Questions(kind, args.scenes, args.first_scene)
    unpruned, costs = Setting(UNPRUNED, {}), Costs(run, questions)
    cells = [(unpruned, 1.0, None), *cells_of(run, costs)]
    for setting, ratio, asked in tqdm(cells, desc=f"{kind}s", unit="cell", disable=not run.processes.main):
        by_seed = [run.answers(questions, variant, ratio) for variant in run.variants(setting)]
        before = run.answers(questions, unpruned, 1.0)
        scores = score(questions.answers, questions.types, questions.scene_of, by_seed, before)
        run.use(setting)
        row = {"kind": kind, "setting": setting.text, "keep_ratio": ratio, **costs.of_row(setting, ratio), **scores}
        if asked:
            row["asked_operations"] = asked
        row["share_of_operations"] = row["prefill_operations"] / (rows[0] if rows else row)["prefill_operations"]
        rows.append(row)
        if run.processes.main:
            tqdm.write(f"{kind} {setting.text:40} {ratio:<5g} {100 * row['accuracy']:5.1f} %")
    if args.time:
        times = run.time_rows(questions, [(setting, ratio) for setting, ratio, _ in cells])
        for row in rows:
            row["time"] = summary(times[row["setting"], row["keep_ratio"]])
    return rows


def main(argv=None):
    args = parse_arguments(argv)
    processes = Processes(args)
    if args.time and processes.number > 1:
        fail(
            f"--time with {processes.number} processes would time how they share the machine; first run without --time, "
            "then once more in one process with --time: the answers are kept"
        )
    if args.plots:
        from evaluate_plots import import_matplotlib

        import_matplotlib()  # before hours of work rather than after
    with claimed(answers_path(args.output)) if processes.main else nullcontext():
        evaluate(args, processes)


def evaluate(args, processes: Processes) -> None:
    """Answers all questions and writes the report."""
    try:
        run = Evaluation(args, processes)
        rows = [row for kind in args.kinds for row in evaluate_kind(run, kind)]
    except (ValueError, OSError) as error:
        fail(str(error))
    processes.wait()
    if not processes.main:
        return
    mark_fronts(rows)
    report = {
        "command": args.command,
        "first_scene": args.first_scene,
        "scenes": args.scenes,
        "kinds": args.kinds,
        "environment": {**environment(run.model), "processes": processes.number},
        "left_out": run.left_out,
        "rows": rows,
    }
    write_results(run.output, {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)})
    run.log.remove_batches()
    print(markdown(report))
    if args.plots:
        from evaluate_plots import draw_plots

        try:
            draw_plots(report, run.output)
        except OSError as error:
            fail(f"a plot cannot be written: {error}; scripts/evaluate_plots.py draws it from {run.output}.json")


if __name__ == "__main__":
    main()
