"""What the tests of scripts/export.py share: running it in this process, and bases with other files."""

import shutil

import export
import pytest


def run(base, *arguments):
    args = export.parse_arguments([str(base), "--no-check", *map(str, arguments)])
    export.export(args)


def refused(base, *arguments):
    """The message of an export that is refused."""
    with pytest.raises((export.ExportError, ValueError, OSError)) as error:
        run(base, *arguments)
    return str(error.value)


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    """What every file of a folder holds, by its path within it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def broken(base, folder, **files):
    """The base with other contents in some files; `None` removes one."""
    shutil.copytree(base, folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content)
    return folder
