"""The folder that an export writes: whole or not at all, however the run ends.

The work is done in a hidden folder `.export-*.part` beside the output, which holds

- `owner.json`, locked as long as the run lives, with the name of the output,
- `new`, what is being written,
- `old`, the variant that `new` replaces, whole, and `superseded`, what is left of it once `new` is in its place.

A run that is killed leaves it. The next one removes it, and puts `old` back where nothing has taken its place.
"""

import contextlib
import json
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from exporter.base import ExportError
from repository import ROOT, code_module

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked and no leftover is touched
    fcntl = None

configuration = code_module("configuration_rediprune")
untrusted = code_module("hub_untrusted")

PREFIX, SUFFIX, OWNER = ".export-", ".part", "owner.json"


def parent_of(output) -> Path:
    """The folder in which an export to `output`, or to nowhere but the Hub (`None`), does its work."""
    return Path(tempfile.gettempdir()) if output is None else Path(os.path.realpath(output)).parent


@contextlib.contextmanager
def whole_folder(output, force: bool = False):
    """
    A new folder that takes the place of `output` (`None`: of nothing) when the block ends well, and else goes away.

    Raises:
        ExportError: `output` is there at the end, and may not be replaced.
    """
    output, parent = None if output is None else Path(os.path.realpath(output)), parent_of(output)
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with workplace(parent, output) as work:
            yield work / "new"
            if output is not None:
                if os.path.lexists(output):
                    check_replaceable(output, force)
                    os.replace(output, work / "old")
                os.replace(work / "new", output)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: it holds the output
                folder.rmdir()


def check_replaceable(output: Path, force: bool) -> None:
    """Raises ExportError where what is at `output` is not for an export to replace."""
    if not force:
        raise ExportError(f"{output} exists already; choose another --output, or pass --force to replace it")
    try:
        model_type = untrusted.read_object(output / "config.json").get("model_type")
        is_variant = model_type in {cls.model_type for cls in configuration.CONFIGS.values()}
    except (OSError, ValueError):
        is_variant = output.is_dir() and not any(output.iterdir())
    if not is_variant or os.path.lexists(output / ".git") or output.resolve() == ROOT or output.is_mount():
        raise ExportError(
            f"{output} is not an exported variant and nothing else, so --force does not replace it; choose another "
            "--output"
        )


@contextlib.contextmanager
def workplace(parent: Path, output):
    """A hidden folder of this run alone in `parent`, with a folder `new`."""
    owner = None
    while owner is None:
        work = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent))
        owner = lock_new(work)
    with owner:
        json.dump({"output": output and output.name, "pid": os.getpid(), "host": socket.gethostname()}, owner)
        owner.flush()
        try:
            (work / "new").mkdir()
            yield work
        finally:
            if fcntl is None:
                owner.close()  # Windows removes no file that is open
            settle(work, output)


def lock_new(work: Path):
    """`owner.json` of a new folder, open and locked; `None` where another run took the folder for a leftover."""
    try:
        owner = open(work / OWNER, "x", encoding="utf-8")
    except FileNotFoundError:
        return None
    if fcntl is not None:
        with contextlib.suppress(OSError):  # this file system has no locks: nobody will take the folder for a leftover
            fcntl.flock(owner, fcntl.LOCK_EX)
    if (work / OWNER).exists():
        return owner
    owner.close()
    return None


def tidy(parent: Path) -> None:
    """Ends what killed runs of this user left in `parent`, and says so. What may be of a run that lives is left alone."""
    if fcntl is None:
        return
    for work in sorted(parent.glob(f"{PREFIX}*{SUFFIX}")):
        found = os.lstat(work)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            try:
                work.rmdir()  # empty, of a run that was killed before it wrote anything
            except OSError:
                end_leftover(work)


def end_leftover(work: Path) -> None:
    """Ends what a killed run left in `work`, if its `owner.json` says that one did, and nobody else is at it."""
    unknown = f"{work} may be what a killed export left, but nothing in it says so; remove it if no export is running"
    try:
        owner = open(work / OWNER, "r+", encoding="utf-8")  # for writing, without which NFS gives no lock
    except FileNotFoundError:
        return print(unknown)
    with owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its run lives
            return None
        try:
            output = json.loads(owner.read() or '{"output": null}')["output"]  # empty: killed before it wrote more
        except (ValueError, KeyError, TypeError):
            return print(unknown)
        if output is not None and not untrusted.is_plain(output):
            return print(unknown)
        if (work / OWNER).exists():  # else another run has just ended it
            print(settle(work, None if output is None else work.parent / output))


def settle(work: Path, output) -> str:
    """Ends what was begun in `work`: one variant is whole in its place, and nothing is left. Returns what was done."""
    new, old, superseded = (work / name for name in ("new", "old", "superseded"))
    done = f"removed {work}, which an export{f' to {output}' if output else ''} left when it was killed"
    if old.exists():
        if not os.path.lexists(output):
            os.replace(old, output)
            done = f"put {output} back, which an export was about to replace when it was killed, and removed {work}"
        elif new.exists():
            return (
                f"{old} was at {output}, which something else has taken meanwhile; move it to where you want it, and remove "
                f"{work}"
            )
        else:
            os.replace(old, superseded)  # at once, so that `old` is always whole
    for part in (new, superseded):
        shutil.rmtree(part, ignore_errors=True)
    if not new.exists() and not superseded.exists():
        (work / OWNER).unlink()
        work.rmdir()
    return done
