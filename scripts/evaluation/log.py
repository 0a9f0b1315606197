"""Answers on disk: files that only grow, so that a killed run goes on where it stopped and computes nothing twice.

OUTPUT.answers.jsonl has one line for each finished cell (kind, setting, keep ratio). While a cell is under way every process
writes the batches that it has answered to a file of its own, OUTPUT.batches.RANK.jsonl; they are taken over by whatever
number of processes comes next, and removed at the end. The first line of each file says what run it belongs to.
"""

import ast
import hashlib
import inspect
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

from repository import fail

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def claimed(path: Path):
    """Keeps every other run away from a file of results inside the block. A run that is killed claims nothing more."""
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"another run is writing to {path}; wait for it, or choose another --output")
        yield


def answers_path(output: Path) -> Path:
    return output.with_name(output.name + ".answers.jsonl")


class JsonLines:
    """A file of records that belong to one run, the first line being its fingerprint."""

    def __init__(self, path: Path, fingerprint: dict):
        self.path, self.fingerprint = path, fingerprint

    def read(self) -> list:
        """The records of the file, and none where there is no file. A line that a kill cut off is left out."""
        if not self.path.exists():
            return []
        first, *lines = self.path.read_text(encoding="utf-8").split("\n")
        if not lines:  # killed in its first line, which `append` writes again
            return []
        self._check(first)
        records = []
        for number, line in enumerate(lines, 2):
            try:
                records += [json.loads(line)] if line else []
            except json.JSONDecodeError:
                print(f"{self.path}: line {number} is incomplete and left out; it is computed again", file=sys.stderr)
        return records

    def _check(self, first: str) -> None:
        try:
            found = json.loads(first)
        except json.JSONDecodeError:
            fail(
                f"{self.path}: line 1 is {first[:80]!r}, but must be the JSON object that says what run the file belongs "
                "to. Choose another --output, or remove that file."
            )
        if not same_run(found, self.fingerprint):
            fail(
                f"{self.path} belongs to another run ({first}); this one is {json.dumps(self.fingerprint)}. Choose another "
                "--output, or remove that file; where `code` differs, the checkout that began the run can go on with it."
            )

    def append(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        present = self.path.read_bytes() if self.path.exists() else b""
        lines = json.dumps(record) + "\n"
        if b"\n" not in present:
            self.path.write_text(json.dumps(self.fingerprint) + "\n" + lines, encoding="utf-8")
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines if present.endswith(b"\n") else "\n" + lines)


def code_fingerprint(*objects) -> str:
    """
    A hash of all code files beside those of the classes of `objects`, or of modules themselves, without comments and
    docstrings: the answers of one version of a method are not those of another.
    """
    files = {}
    for each in objects:
        path = Path(inspect.getfile(each if inspect.ismodule(each) else type(each)))
        files |= {file.name: file for file in ([path] if inspect.ismodule(each) else path.parent.glob("*.py"))}
    code = "\n".join(_statements(files[name].read_text(encoding="utf-8")) for name in sorted(files))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _statements(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return ast.dump(tree)


def same_run(found, fingerprint: dict) -> bool:
    """Whether two fingerprints are of one run; a sum of weights differs in its last digits between numbers of threads."""
    if not isinstance(found, dict) or found.keys() != fingerprint.keys():
        return False
    same = lambda key: found[key] == fingerprint[key]  # noqa: E731
    close = lambda key: math.isclose(found[key], fingerprint[key], rel_tol=1e-9)  # noqa: E731
    return all(close(key) if key == "weights" else same(key) for key in fingerprint)


class AnswerLog:
    """
    The answers of a run: finished cells, and batches of unfinished ones.

    Args:
        output: the common beginning of the files' names.
        fingerprint: what the answers depend on beside their cell.
        rank: the number of this process; process 0 writes the cells.
    """

    def __init__(self, output: Path, fingerprint: dict, rank: int = 0):
        self.output, self.fingerprint = output, fingerprint
        self.cells = JsonLines(answers_path(output), fingerprint)
        self.batches = self._batch_file(rank)
        self.done = {}
        for record in self.cells.read():
            if {"kind", "setting", "keep_ratio", "answers"} <= record.keys():
                self.done[record["kind"], record["setting"], record["keep_ratio"]] = record["answers"]
        self.parts = self._read_parts()

    def _batch_file(self, rank) -> JsonLines:
        return JsonLines(self.output.with_name(f"{self.output.name}.batches.{rank}.jsonl"), self.fingerprint)

    def _batch_files(self) -> list:
        paths = self.output.parent.glob(f"{self.output.name}.batches.*.jsonl")
        return [self._batch_file(path.name.split(".")[-2]) for path in sorted(paths)]

    def _read_parts(self) -> dict:
        """{cell: {(first question, number of questions): answers}} of all processes."""
        parts = {}
        for file in self._batch_files():
            for record in file.read():
                answers, cell = record["answers"], tuple(record["cell"])
                parts.setdefault(cell, {})[record["start"], len(answers)] = answers
        return parts

    def finished(self, cell: tuple, number: int) -> bool:
        """Whether all `number` answers of a cell (kind, setting, keep ratio) are there."""
        return len(self.done.get(cell, [])) == number

    def has(self, cell: tuple, start: int, number: int) -> bool:
        return (start, number) in self.parts.get(cell, {})

    def add(self, cell: tuple, start: int, answers: list) -> None:
        self.parts.setdefault(cell, {})[start, len(answers)] = answers
        self.batches.append({"cell": cell, "start": start, "answers": answers})

    def collect(self, cell: tuple, batches: list, write: bool) -> None:
        """Makes a finished cell of the batches [(start, number)] that all processes have answered."""
        parts = self._read_parts()[cell]
        self.done[cell] = [answer for batch in batches for answer in parts[batch]]
        if write:
            kind, setting, keep_ratio = cell
            self.cells.append({"kind": kind, "setting": setting, "keep_ratio": keep_ratio, "answers": self.done[cell]})

    def remove_batches(self) -> None:
        for file in self._batch_files():
            file.path.unlink()
