"""How the tools write: where results may go, files that are whole or not there at all, and the tables of their reports."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from repository import fail

ENDINGS = (".json", ".md", ".png", ".html")  # of result files
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def output_prefix(text: str) -> Path:
    """The path that the endings of results are put after. Ends the program, before any work, if nothing can be written there."""
    path = Path(text)
    if text.endswith(("/", "\\")) or path.is_dir():
        fail(f"--output {text} is a folder; name the files in it, for example {path / 'results'}")
    if path.suffix in ENDINGS:
        path = path.with_suffix("")
    _check_writable(path.parent, f"--output {text}")
    return path


def output_picture(text: str, option: str) -> Path:
    """The path of a picture to write. Ends the program, before any work, if no picture can be written there."""
    path = Path(text)
    if path.is_dir() or path.suffix.lower() not in PICTURES:
        fail(f"{option} {text}: name a file that ends in {', '.join(PICTURES)}")
    _check_writable(path.parent, f"{option} {text}")
    return path


def output_folder(folder: Path, option: str = "--output") -> Path:
    """A folder to write into, made where it is missing. Ends the program, before any work, if that cannot be done."""
    _check_writable(folder, f"{option} {folder}")
    return folder


def _check_writable(folder: Path, given: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"{given}: cannot write to {folder}: {error.strerror or error}")


def write_results(output: Path, contents: dict) -> None:
    """Writes result files, text or bytes by the ending that their names add to `output`."""
    for ending, content in contents.items():
        path = output.with_name(output.name + ending)
        try:
            write_whole(path, content)
        except OSError as error:
            fail(f"{path} cannot be written: {error.strerror or error}")


def write_whole(path, content) -> None:
    """Writes a file, of text or of bytes, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def replacing(path):
    """A path to write to inside the block. What was written becomes `path` at the end, and goes away where the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=f".part{path.suffix}")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def table(header: list, rows: list) -> list:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
