"""Puts small faults into a copy of the code, one at a time, and counts which of them the tests notice.

A fault is a swapped comparison, a constant that is off by one, a negated condition, a forgotten argument or statement,
+ for -, max for min, True for False and the like. For each, the tests that matter for its file (`TESTS`) run until one
fails. A fault that no test notices shows what is not tested, or a line that does nothing. The tree that the faults are
drawn from is never touched.

Writes OUTPUT.json and OUTPUT.md. Results are kept as they come (OUTPUT.faults.jsonl): a run that was killed goes on where
it stopped, and one with a larger --number adds to it.

Examples:
    python scripts/mutate.py --output runs/faults --number 100
    python scripts/mutate.py --output runs/faults-selection --files ops_selection.py --number 40 --seed 1
    python scripts/mutate.py --output runs/faults-again --again runs/faults.json  # its survivors
    python scripts/mutate.py --only ops_selection.py:430:1f0c2a  # one fault, in full
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

from evaluation.log import JsonLines, claimed
from mutate_faults import faults_of, parses
from repository import ROOT, at_least_one, environment, fail, recorded_command
from tqdm import tqdm
from writing import output_prefix, table, write_results

METHOD_TESTS = ("test_methods.py", "test_reference.py", "test_methods_in_model.py")
MODEL_TESTS = (
    "test_modeling.py",
    "test_cache.py",
    "test_generation.py",
    "test_threads.py",
    "test_context.py",
    "test_refusals.py",
)
PROCESSOR_TESTS = ("test_processing.py", "test_media.py", "test_videos.py", "test_chat.py", "test_processor_threads.py")
# For each file the tests that are to notice its faults, likely ones first, in whatever folder of tests/. A file that is not named has all tests.
TESTS = {
    "core_encoded.py": ("test_encoded.py",),
    "core_attention.py": ("test_modeling.py", "test_cache.py", "test_generation.py"),
    "core_cache.py": ("test_cache.py", "test_generation.py", "test_prefill_chunks.py"),
    "inputs_chat.py": ("test_chat.py", "test_processing.py", "test_pipelines.py"),
    "vision_clip.py": ("test_evoprune.py", "test_modeling.py", *METHOD_TESTS, "test_threads.py"),
    "configuration_rediprune.py": ("test_configuration.py", "test_settings.py", "test_loading.py", "test_rediprune_plus.py", "test_joint_space.py"),
    "inputs_download.py": ("test_download.py",),
    "core_layout.py": ("test_processing.py", "test_modeling.py", "test_true_size.py", "test_refusals.py"),
    "vision_joint_space.py": ("test_joint_space.py", "test_untrusted.py"),
    "hub_linking.py": ("test_loading.py", "test_linked.py", "test_export.py", "test_untrusted.py", "test_hub.py"),
    "inputs_media.py": ("test_media.py", "test_processing.py"),
    "methods_base.py": METHOD_TESTS,
    "methods_relevance.py": METHOD_TESTS,
    "methods_baselines.py": ("test_downsample.py", *METHOD_TESTS),
    "methods_coverage.py": METHOD_TESTS,
    "methods_encoder.py": ("test_evoprune.py", *METHOD_TESTS, "test_tflops.py"),
    "methods_attention.py": METHOD_TESTS,
    "methods_distance.py": ("test_rediprune_plus.py", *METHOD_TESTS),
    "methods_registry.py": METHOD_TESTS,
    "methods_block.py": ("test_configuration.py", "test_settings.py", "test_rediprune_plus.py", "test_joint_space.py"),
    "methods_still.py": ("test_video_methods.py", *METHOD_TESTS),
    "methods_video.py": ("test_video_methods.py", *METHOD_TESTS),
    "methods_settings.py": ("test_settings.py", "test_configuration.py"),
    "modeling_rediprune_llava.py": (
        *MODEL_TESTS, "test_evoprune.py", "test_methods_in_model.py", "test_rediprune_plus.py", "test_prefill_chunks.py",
        "test_joint_space.py", "test_words.py", "test_relevance.py", "test_loading.py", "test_linked.py", "test_export.py",
        "test_tensor_parallel.py", "test_pipelines.py",
    ),
    "hub_files.py": ("test_processing.py", "test_loading.py", "test_remote_code.py", "test_export.py"),
    "core_positions.py": ("test_modeling.py", "test_cache.py", "test_context.py"),
    "processing_rediprune.py": (*PROCESSOR_TESTS, "test_joint_space.py", "test_words.py", "test_pipelines.py", "test_refusals.py"),
    "ops_relevance.py": ("test_relevance.py", "test_modeling.py", "test_rediprune_plus.py", *METHOD_TESTS),
    "ops_query.py": ("test_selection.py", *METHOD_TESTS),
    "ops_tokens.py": ("test_selection.py", *METHOD_TESTS, "test_rediprune_plus.py"),
    "ops_video.py": ("test_video_methods.py", *METHOD_TESTS),
    "ops_selection.py": ("test_selection.py", *METHOD_TESTS, "test_rediprune_plus.py"),
    "inputs_tokenizing.py": PROCESSOR_TESTS,
    "hub_untrusted.py": ("test_untrusted.py", "test_loading.py"),
    "hub_versions.py": ("test_versions.py", "test_loading.py", "test_evoprune.py", "test_cache.py"),
    "inputs_video.py": ("test_videos.py", "test_processing.py", "test_download.py"),
    "inputs_words.py": ("test_words.py",),
    "scripts/benchmark.py": ("test_benchmark.py",),
    "scripts/benchmarking/tables.py": ("test_benchmark.py",),
    "scripts/check_variant.py": ("test_check_variant.py", "test_export.py"),
    "scripts/evaluate.py": ("test_evaluate.py",),
    "scripts/evaluation/log.py": ("test_evaluate.py",),
    "scripts/evaluate_frames.py": ("test_evaluate_frames.py",),
    "scripts/evaluation/settings.py": ("test_evaluate.py",),
    "scripts/evaluation/questions.py": ("test_evaluate.py",),
    "scripts/evaluation/report.py": ("test_evaluate.py",),
    "scripts/export.py": ("test_export_files.py", "test_export.py", "test_hub.py"),
    "scripts/exporter/base.py": ("test_export_files.py", "test_export.py", "test_hub.py"),
    "scripts/exporter/folder.py": ("test_export_files.py", "test_export.py"),
    "scripts/fuzzing/cases.py": ("test_fuzz.py",),
    "scripts/mutate_faults.py": ("test_mutate.py",),
    "scripts/relevance_study.py": ("test_relevance_study.py",),
    "scripts/repository.py": ("test_benchmark.py", "test_evaluate.py", "test_tools.py", "test_visualize.py"),
    "scripts/tflops.py": ("test_tflops.py",),
    "scripts/toy_world.py": ("test_toy_world.py",),
    "scripts/drawing/pictures.py": ("test_families_in_tools.py", "test_visualize.py"),
    "scripts/drawing/trace.py": ("test_visualize.py", "test_families_in_tools.py"),
}  # fmt: skip
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.part"
)
SLOWER = 3  # times as long as without a fault is a hang
NOTICED, SURVIVED, HUNG = "noticed", "SURVIVED", "noticed: ran too long"


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where results go: OUTPUT.json, OUTPUT.md (not needed with --only or --list)")
    parser.add_argument(
        "--number", type=at_least_one, default=100, help="faults, drawn from all (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--files", nargs="+", metavar="FILE", help="draw from these files (default: the code files in the root)"
    )
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="run these tests instead of those of `TESTS`")
    parser.add_argument(
        "--timeout", type=at_least_one, metavar="SECONDS", help=f"for one fault (default: {SLOWER} times the usual)"
    )
    parser.add_argument("--again", type=Path, metavar="REPORT.json", help="put in the survivors of an earlier run")
    parser.add_argument("--only", metavar="FAULT", help="put in the one fault of this name, with what the tests print")
    parser.add_argument("--list", action="store_true", help="print the faults that would be put in, and run nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree (default: this repository)")
    args = parser.parse_args(argv)
    args.root = args.root.resolve()
    args.files = args.files or sorted(path.name for path in args.root.glob("*.py"))
    for file in args.files:
        if not (args.root / file).is_file():
            fail(f"--files {file}: there is no such file in {args.root}")
    for test in args.tests or ():
        if not (args.root / test).is_file():
            fail(f"--tests {test}: there is no such file in {args.root}")
    if not (args.output or args.only or args.list):
        fail("--output says where results go; give it, or --only FAULT, or --list")
    if args.output:
        args.output = output_prefix(args.output)
    return args


def draw(root: Path, files: list, number: int, seed: int) -> list:
    """The first `number` faults of all in random order, so that a larger number has the same ones first."""
    faults = [fault for file in files for fault in faults_of(root, file)]
    random.Random(seed).shuffle(faults)
    sources = {file: (root / file).read_bytes() for file in files}
    drawn = []
    for fault in faults:
        if len(drawn) == number:
            break
        if parses(fault.put_into(sources[fault.file])):
            drawn.append(fault)
    return drawn


def find(root: Path, name: str):
    """The fault of a name."""
    file = name.partition(":")[0]
    if (root / file).is_file():
        for fault in faults_of(root, file):
            if fault.id == name:
                return fault
    fail(f"{root} has no fault {name}; faults get other names where the lines before them change, see --list")


def survivors_of(root: Path, path: Path) -> list:
    try:
        names = [result["fault"] for result in json.loads(path.read_text(encoding="utf-8"))["survivors"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--again {path} cannot be read ({error!r}); give the OUTPUT.json of an earlier run")
    return [find(root, name) for name in names]


class Bench:
    """A copy of the tree in a folder of its own, in which tests run."""

    def __init__(self, root: Path, folder: Path, tests, timeout):
        self.root, self.given, self.timeout = root, tests, timeout
        # Transformers 4.57 names the modules of a local folder after the folder.
        self.tree, self.home = folder / f"tree_{os.getpid()}", folder / "modules"
        shutil.copytree(root, self.tree, ignore=LEFT_BEHIND)
        self.usual = {}

    def tests_of(self, file: str) -> tuple:
        """The test files for a file, in the order in which they run."""
        if self.given:
            return tuple(self.given)
        places = {path.name: str(path.relative_to(self.tree)) for path in (self.tree / "tests").rglob("test_*.py")}
        named = [places[name] for name in TESTS.get(file, ()) if name in places]
        return tuple(named or ["tests"])

    def run(self, tests: tuple, timeout=None) -> tuple:
        """Whether the tests pass, what they print, and the seconds that they take; `None` where the time is up."""
        # The modules that Transformers makes of the tree, and bytecode, would outlive a fault.
        shutil.rmtree(self.home, ignore_errors=True)
        own = {"HF_MODULES_CACHE": str(self.home), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.tree, env={**os.environ, **own}, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=timeout)
            passed = process.returncode == 0
        except subprocess.TimeoutExpired:
            passed, printed = None, ""
        finally:
            _end(process)
        return passed, printed, time.monotonic() - start

    def seconds_without_fault(self, tests: tuple) -> float:
        if tests not in self.usual:
            passed, printed, seconds = self.run(tests)
            if not passed:
                fail(f"without any fault {' '.join(tests)} does not pass, so nothing can be said:\n{printed[-3000:]}")
            self.usual[tests] = seconds
        return self.usual[tests]

    def try_fault(self, fault, loud: bool = False) -> dict:
        """Puts a fault in, runs the tests, and takes it out again."""
        tests, path = self.tests_of(fault.file), self.tree / fault.file
        limit = self.timeout or max(30.0, SLOWER * self.seconds_without_fault(tests))
        source = path.read_bytes()
        path.write_bytes(fault.put_into(source))
        try:
            passed, printed, seconds = self.run(tests, limit)
        finally:
            path.write_bytes(source)
        if loud:
            print(printed)
        outcome = {True: SURVIVED, False: NOTICED, None: HUNG}[passed]
        failed = [line.split(" ")[1] for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return {
            "fault": fault.id,
            "file": fault.file,
            "line": fault.line,
            "kind": fault.kind,
            "diff": fault.diff(source),
            "outcome": outcome,
            "noticed_by": failed[0] if outcome == NOTICED and failed else None,
            "seconds": round(seconds, 1),
        }


def _end(process) -> None:
    """Ends a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@contextmanager
def bench(args):
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        yield Bench(args.root, Path(folder), args.tests, args.timeout)


def code_of(root: Path) -> str:
    """A hash of all code of a tree, its tests included."""
    files = sorted([*root.glob("*.py"), *(root / "scripts").rglob("*.py"), *(root / "tests").rglob("*.py")])
    return hashlib.sha256(
        b"\n".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    ).hexdigest()[:16]


def run_all(args, faults: list) -> list:
    """The results of all faults, from the log where they are there."""
    fingerprint = {
        "code": code_of(args.root),
        "tests": args.tests,
        "timeout": args.timeout,
        "python": sys.version.split()[0],
    }
    log = JsonLines(args.output.with_name(args.output.name + ".faults.jsonl"), fingerprint)
    with claimed(log.path):
        known = {record["fault"]: record for record in log.read()}
        missing = [fault for fault in faults if fault.id not in known]
        if missing:
            with bench(args) as place, tqdm(missing, unit="fault") as progress:
                for fault in progress:
                    progress.set_description(f"{fault.file}:{fault.line}")
                    known[fault.id] = place.try_fault(fault)
                    log.append(known[fault.id])
                    survivors = sum(known[other.id]["outcome"] == SURVIVED for other in faults if other.id in known)
                    progress.set_postfix(survived=survivors)
    return [known[fault.id] for fault in faults]


def shares(results: list, key: str) -> list:
    """Rows of a table: for each value of a key how many faults there are, how many were noticed, and the share."""
    groups = defaultdict(list)
    for result in results:
        groups[result[key]].append(result["outcome"] != SURVIVED)
    return [
        [name, str(len(group)), str(sum(group)), f"{sum(group) / len(group):.0%}"]
        for name, group in sorted(groups.items())
    ]


def markdown(report: dict) -> str:
    results, survivors = report["faults"], report["survivors"]
    noticed = len(results) - len(survivors)
    lines = [
        "# Faults that the tests notice",
        "",
        f"Command: `{report['command']}`  ",
        f"Python {report['environment']['python']}, torch {report['environment']['torch']}, transformers "
        f"{report['environment']['transformers']}, {report['environment']['date']}.",
        "",
        f"**{noticed} of {len(results)} noticed ({noticed / len(results):.1%})**, {report['hung']} of them because the tests "
        f"ran too long. {len(survivors)} survived; some of those may be no faults but other ways to write the same.",
        "",
        *table(["file", "faults", "noticed", "share"], shares(results, "file")),
        "",
        *table(["kind", "faults", "noticed", "share"], shares(results, "kind")),
    ]
    if survivors:
        lines += ["", "## Survivors"]
    for result in survivors:
        lines += ["", f"`{result['fault']}`, {result['kind']}:", "", "```diff", result["diff"], "```"]
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy of the tree is removed
    if args.only:
        fault = find(args.root, args.only)
        with bench(args) as place:
            result = place.try_fault(fault, loud=True)
        print(f"{result['diff']}\n\n{fault.id}: {result['outcome']}")
        return
    if args.again:
        faults = survivors_of(args.root, args.again)
    else:
        faults = draw(args.root, args.files, args.number, args.seed)
    if not faults:
        fail(
            "there is nothing that a fault can be made of"
            if args.again is None
            else f"no fault survived in {args.again}"
        )
    if args.list:
        for fault in faults:
            print(f"{fault.id}, {fault.kind}:\n{fault.diff((args.root / fault.file).read_bytes())}\n")
        return
    results = run_all(args, faults)
    report = {
        "command": recorded_command(__file__, argv),
        "environment": environment(),
        "seed": args.seed,
        "noticed": sum(result["outcome"] != SURVIVED for result in results),
        "hung": sum(result["outcome"] == HUNG for result in results),
        "faults": results,
        "survivors": [result for result in results if result["outcome"] == SURVIVED],
    }
    write_results(args.output, {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)})
    print(markdown(report))


if __name__ == "__main__":
    main()
