"""Measures Tables 1 to 4 of the ReDiPrune paper, and prints them with the paper's figures beside the measured ones.

Prints the plan with an estimate of its hours, does the runs that are not finished, with lmms-eval or benchmark.py, and
writes OUTPUT/tables.md and tables.json. A finished run has its OUTPUT/BACKBONE/METHOD/BENCHMARK/run.json and is not
repeated; one that was stopped begins again. What it needs: docs/reproduce.md.

Exit status: 0 if every chosen run is finished, 1 if one failed or something is missing, 2 for wrong arguments, 130 or
143 if it was stopped.

Examples:
    python scripts/reproduce.py --dry-run
    python scripts/reproduce.py --tables 1 --backbones llava-next-video-7b --benchmarks egoschema
    python scripts/reproduce.py --gpus 0,1,2,3
    python scripts/reproduce.py --tables 2 --limit 20 --output runs/trial
    python scripts/reproduce.py --local --limit 20 --output runs/reproduce-local
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import paper_tables as paper
import torch
from make_lmms_task import write_task
from repository import ROOT, at_least_one, environment, fail
from writing import output_folder, write_results, write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Runs that differ in one of these do not go into one folder.
SETTINGS = ("local", "limit", "video_pooling", "judge", "text_tower")
CHOICES = {"tables": "1 2", "backbones": "llava-1.5-7b", "methods": "original rediprune", "benchmarks": "gqa"}
LOCAL_SCENES = 20


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/reproduce"), help="folder (default: %(default)s)")
    add("--local", action="store_true", help="the small checkpoint on generated videos, on the CPU and offline")
    add("--dry-run", action="store_true", help="print plan, estimate and commands, and run nothing")
    add("--report", action="store_true", help="make the tables of what is finished, and run nothing")
    for kind, example in CHOICES.items():
        add(f"--{kind}", nargs="+", metavar="NAME", help=f"only these, such as {example}")
    add("--limit", type=at_least_one, help="only the first samples of each task, to try things out")
    add("--gpus", type=lambda text: text.split(","), default=[None], metavar="0,1", help="one process on each of these")
    pooling = "of LLaVA-NeXT-Video: the paper's 576 tokens a frame (false), or the 144 that it was trained with (true)"
    add("--video-pooling", choices=["false", "true"], default="false", help=pooling)
    add(
        "--judge",
        default="gpt-3.5-turbo-0125",
        help="model that judges answers (default, as in the paper: %(default)s)",
    )
    tower = "openai/clip-vit-large-patch14-336"
    add("--text-tower", default=tower, help="CLIP checkpoint of CDPruner and TRIM (default: %(default)s)")
    add("--seconds-per-sample", type=float, help="for the estimate (default: as it says itself)")
    args = parser.parse_args(argv)
    if args.seconds_per_sample is not None and not 0 < args.seconds_per_sample < float("inf"):
        parser.error(f"--seconds-per-sample {args.seconds_per_sample:g}: must be a positive number")
    return args


# -- the plan ----------------------------------------------------------------------------------------------------------


class Plan:
    """The chosen runs, what is finished of them, and the commands that do the rest."""

    def __init__(self, args):
        self.args, self.data = args, paper.read_data(args.local)
        chosen = {kind: getattr(args, kind) for kind in CHOICES}
        for kind, names in chosen.items():
            for name in set(names or ()) - set(self.data[kind]):
                fail(f"--{kind} {name}: choose of {', '.join(self.data[kind])}")
        self.runs = paper.runs_of(self.data, chosen)
        if not self.runs:
            fail(f"the tables have no run of all that was chosen ({'; '.join(paper.absent(self.data))})")
        self.records = self.read_records()
        self.todo = [run for run in self.runs if run not in self.records]

    def read_records(self) -> dict:
        """The records of all finished runs in the output folder, of the chosen ones and of others."""
        output, records = self.args.output, {}
        for path in output.glob(f"*/*/*/{paper.RECORD}"):
            if not path.parent.name.endswith(".part"):
                records[paper.Run(*path.parent.relative_to(output).parts)] = paper.read_json(path)
        return records

    def benchmark(self, run) -> dict:
        return self.data["benchmarks"][run.benchmark]

    def variant(self, backbone: str) -> Path:
        return ROOT if self.args.local else self.args.output / "variants" / backbone

    def export(self, backbone: str) -> list:
        """The command that makes the variant of a backbone."""
        command = [sys.executable, ROOT / "scripts" / "export.py", self.data["backbones"][backbone]["base"], "--link"]
        return [*map(str, command), "--output", str(self.variant(backbone))]

    def working_folder(self, run) -> Path:
        """Where a run writes until it is finished."""
        return self.args.output / run.backbone / run.method / f"{run.benchmark}.part"

    def options(self, run) -> dict:
        """The changes to the pruning block, and the frames."""
        backbone, method = self.data["backbones"][run.backbone], self.data["methods"][run.method]
        options = {**backbone["options"], "keep_ratio": self.benchmark(run)["keep_ratio"], **method["options"]}
        if "video_pooling" in options:
            options["video_pooling"] = self.args.video_pooling
        if method.get("reads_clip") and backbone.get("clip_vision_tower"):
            options["text_tower"] = self.args.text_tower
        return options

    def command(self, run) -> list:
        """What measures a run, and leaves its files in its working folder."""
        options, folder, variant = self.options(run), self.working_folder(run), self.variant(run.backbone)
        device, dtype = ("cpu", "float32") if self.args.local else ("cuda", "float16")
        if run.benchmark == paper.SPEED:  # the unpruned model always runs beside
            command = [ROOT / "scripts" / "benchmark.py", "--model", variant, "--dtype", dtype, "--new-tokens", 5]
            command += [*self.data["backbones"][run.backbone]["speed"], "--methods", options.get("method", "rediprune")]
            command += ["--ratios", self.benchmark(run)["keep_ratio"], "--output", folder / "speed"]
            command += ["--video-pooling", options["video_pooling"]] if "video_pooling" in options else []
        else:
            model = {"pretrained": variant, "dtype": dtype, **options, "times": folder / "times.json"}
            model = ",".join(f"{key}={value}" for key, value in model.items())
            command = ["-m", "lmms_eval", "eval", "--model", "rediprune", "--model_args", model, "--log_samples"]
            command += ["--tasks", self.benchmark(run)["tasks"], "--batch_size", 1, "--output_path", folder]
            command += ["--include_path", self.args.output / "task"] if self.args.local else []
            command += ["--limit", self.args.limit] if self.args.limit else []
        return list(map(str, [sys.executable, *command, "--device", device]))

    def variables(self, run, gpu=None) -> dict:
        judge = {"MODEL_VERSION": self.args.judge} if self.benchmark(run).get("judge") else {}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if self.args.local else {}
        return {**judge, **offline, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}

    def describe(self) -> str:
        """Every run with its estimate; in a dry run with its command, too."""
        args, lines, total = self.args, [], 0
        if args.dry_run and not args.local:
            lines += [
                shlex.join(self.export(backbone)) for backbone in dict.fromkeys(run.backbone for run in self.todo)
            ]
        for run in self.runs:
            hours = paper.hours_of(self.data, run, args.limit, args.seconds_per_sample)
            lines.append(f"{hours:7.2f} h  {run}{'' if run in self.todo else '  (finished)'}")
            if run in self.todo:
                total += hours
                variables = [f"{key}={value}" for key, value in self.variables(run).items()]
                lines += ["    " + shlex.join([*variables, *self.command(run)])] if args.dry_run else []
        own, workers = args.seconds_per_sample, len(args.gpus)
        lines += paper.absent(self.data, args.tables)
        number = f"{len(self.todo)} of {len(self.runs)} runs to do"
        lines.append(f"{number}: {total:.1f} h, shared by {workers} process(es) {total / workers:.1f} h")
        return "\n".join([*lines, f"estimate: {own:g} s a sample, as you say" if own else paper.ESTIMATE])


# -- before anything runs ----------------------------------------------------------------------------------------------


def check_settings(args) -> None:
    """Refuses to put runs of other settings beside those of the folder; the first run writes them down."""
    path, settings = args.output / "settings.json", {name: getattr(args, name) for name in SETTINGS}
    before = paper.read_json(path) if path.exists() else settings
    for name in SETTINGS:
        if before.get(name) != settings[name]:
            option = f"--{name.replace('_', '-')} {settings[name]}"
            fail(f"{option}: {args.output} was begun with {before.get(name)}; give another --output")
    if not (args.dry_run or args.report):
        write_whole(path, json.dumps(settings, indent=1) + "\n")


def check_tools(plan: Plan) -> None:
    """Refuses, before hours of work, what would end it or make its figures wrong."""
    benchmarks = [plan.benchmark(run) for run in plan.todo if run.benchmark != paper.SPEED]
    if benchmarks and set(",=") & set(str(plan.args.output)):
        fail(f"--output {plan.args.output}: lmms-eval takes no path with ',' or '='")
    if benchmarks and importlib.util.find_spec("lmms_eval") is None:
        fail('lmms-eval is not installed: pip install "lmms-eval>=0.7.3,<0.8"')
    if benchmarks and "rediprune" not in importlib.metadata.entry_points(group="lmms_eval.models").names:
        fail("the plug-in of lmms-eval is not installed: pip install ./scripts/lmms_plugin")
    for module in {benchmark["module"] for benchmark in benchmarks if "module" in benchmark}:
        if importlib.util.find_spec(module) is None:
            fail(f"NExT-QA needs {module}: pip install {module}, or leave it out with --benchmarks")
    if any(benchmark.get("judge") for benchmark in benchmarks) and not os.environ.get("OPENAI_API_KEY"):
        names = ", ".join(name for name, benchmark in plan.data["benchmarks"].items() if benchmark.get("judge"))
        fail(f"without a judge lmms-eval gives 0 for {names}: set OPENAI_API_KEY, or leave them out with --benchmarks")
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if plan.todo and not plan.args.local and not number:
        fail("torch sees no GPU here; --dry-run shows what would run, --local runs the small checkpoint on the CPU")
    for gpu in plan.args.gpus:
        if gpu is not None and not (gpu.isdecimal() and (plan.args.local or int(gpu) < number)):
            fail(f"--gpus {gpu}: torch sees {number} GPU(s) here, numbered from 0")


def claim(folder: Path):
    """Holds a folder as long as the result is open: a second command would remove what this one works on."""
    lock = open(folder / "lock", "w", encoding="utf-8")
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--output {folder}: another reproduce.py is at work in it; give one command all --gpus")
    return lock


def prepare(plan: Plan) -> None:
    """Writes the local task, or the variants that are missing."""
    if plan.args.local and plan.todo:
        write_task(plan.args.output / "task", min(plan.args.limit or LOCAL_SCENES, LOCAL_SCENES))
    for backbone in dict.fromkeys(run.backbone for run in plan.todo):
        if not plan.variant(backbone).exists() and subprocess.run(plan.export(backbone)).returncode:
            fail(f"no variant of {plan.data['backbones'][backbone]['base']} could be made; see above")


# -- the runs ----------------------------------------------------------------------------------------------------------


def start(plan: Plan, run, gpu) -> subprocess.Popen:
    folder = plan.working_folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    variables = {**os.environ, **plan.variables(run, gpu)}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        return subprocess.Popen(plan.command(run), stdout=log, stderr=subprocess.STDOUT, env=variables)


def finish(plan: Plan, run, code: int) -> None:
    """Puts the folder of a run in its place, whole; raises Incomplete where it has not what it was for."""
    folder = plan.working_folder(run)
    if code:
        raise paper.Incomplete(f"exit status {code}")
    figures, measured_on = paper.figures_of(plan.data, run, folder)
    record = {"command": shlex.join(plan.command(run)), "figures": figures, "measured_on": measured_on}
    write_whole(folder / paper.RECORD, json.dumps({**record, "environment": environment()}, indent=1) + "\n")
    folder.replace(folder.with_suffix(""))
    plan.records[run] = record


def execute(plan: Plan) -> list:
    """Shares the runs out, one process at a time on each GPU. Returns those that failed."""
    waiting, working, failed = list(plan.todo), {}, []
    try:
        while waiting or working:
            for gpu in plan.args.gpus:
                if waiting and gpu not in working:
                    run = waiting.pop(0)
                    working[gpu] = run, start(plan, run, gpu)
                    print(f"started {run}{f' on GPU {gpu}' if gpu else ''}", flush=True)
            time.sleep(0.2)
            for gpu, (run, process) in list(working.items()):
                if process.poll() is not None:
                    del working[gpu]
                    try:
                        finish(plan, run, process.returncode)
                        print(f"finished {run}", flush=True)
                    except paper.Incomplete as error:
                        failed.append(run)
                        log = plan.working_folder(run) / "log.txt"
                        print(f"failed {run}: {error}; see {log}", file=sys.stderr, flush=True)
    finally:
        for _, process in working.values():
            process.terminate()
            process.wait()
    return failed


def report(plan: Plan) -> None:
    args, remarks = plan.args, []
    if args.limit:
        remarks.append(f"Measured on the first {args.limit} samples of each task alone: not the benchmarks' figures.")
    if args.video_pooling == "true":
        remarks.append("Measured with pooling: LLaVA-NeXT-Video has 144 tokens a frame, in the paper 576.")
    if any(plan.benchmark(run).get("judge") for run in plan.records):
        remarks.append(f"Judge of the measured figures: {args.judge}.")
    devices = sorted({record["measured_on"] for record in plan.records.values()})
    remarks.append(f"Measured on: {'; '.join(devices) or 'nothing yet'}.")
    rows = paper.rows_of(plan.data, plan.records, args.tables)
    content = {"settings": {name: getattr(args, name) for name in SETTINGS}, "measured_on": devices, "rows": rows}
    text = paper.markdown(plan.data, rows, remarks)
    write_results(args.output / "tables", {".json": json.dumps(content, indent=1) + "\n", ".md": text})
    print(text)


def stop(number, frame):
    """Ends the program as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    args = parse_arguments(argv)
    if not args.dry_run:
        output_folder(args.output)
    check_settings(args)
    plan, failed = Plan(args), []
    if not args.report:
        print(plan.describe(), flush=True)
        if args.dry_run:
            return
        check_tools(plan)
        signal.signal(signal.SIGTERM, stop)
        try:
            with claim(args.output):
                prepare(plan)
                failed = execute(plan)
        except KeyboardInterrupt as interrupt:
            number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
            print(
                f"reproduce.py: stopped by {number.name}; the same command does what is not finished", file=sys.stderr
            )
            sys.exit(128 + number)
    report(plan)
    if failed:
        fail(f"failed: {', '.join(map(str, failed))}; the same command tries again")


if __name__ == "__main__":
    main()
