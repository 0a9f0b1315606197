#!/usr/bin/env python3
"""Runs this repository's commands in virtual environments that it makes when they are missing.

    python3 scripts/bootstrap.py ask --video clip.mp4 "What happens?"
    python3 scripts/bootstrap.py test [pytest arguments]
    python3 scripts/bootstrap.py python scripts/evaluate.py [arguments]
    python3 scripts/bootstrap.py --with demo/requirements.txt python demo/app.py

The first call fetches about 3 GB of packages, 6 GB when installed, in one to five minutes; later ones start at once.
Options stand before the command. There are two layers: `base` holds torch and whatever else does not depend
on the version of transformers; a thin one per version of transformers sees the base through a .pth file, so
that a second version costs seconds; and another thin one on top for each file that is named with `--with`,
which the others do not see. An environment is made anew when the requirements change or it is
incomplete.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-test.txt")
# These depend on a version of huggingface-hub that differs between transformers 4 and 5.
THIN_LAYER = ("transformers", "accelerate", "huggingface-hub")
STAMP = "complete"
# One process on each core; the tests of a file stay together, since they share its models. They are begun in the order of their
# folders: by number of tests, as pytest-xdist would, the few slow ones of the Hub came last and had one process alone.
TEST = [
    "-m",
    "pytest",
    "--numprocesses",
    "auto",
    "--maxprocesses",
    "4",
    "--dist",
    "loadscope",
    "--no-loadscope-reorder",
]


class BootstrapError(Exception):
    pass


def read_requirements(files=REQUIREMENTS):
    """{package name: requirement} of all requirement files."""
    requirements = {}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            requirement = line.split("#")[0].strip()
            if requirement and not requirement.startswith("-"):
                name = re.match(r"[\w.-]+", requirement).group()
                requirements[name.lower().replace("_", "-")] = requirement
    return requirements


def interpreter(environment):
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_complete(environment, stamp):
    try:
        works = subprocess.run([interpreter(environment), "-c", ""], capture_output=True).returncode == 0
        return works and (environment / STAMP).read_text() == stamp
    except OSError:
        return False


def run(command, purpose):
    """Runs a step of the installation; its output goes to stderr, so that stdout is the command's alone."""
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        raise BootstrapError(f"{purpose} failed with exit code {code}; its own message is above")


def say(text):
    print(text, file=sys.stderr, flush=True)


def install(python, requirements):
    """pip install, with a line for every file that is fetched and one for the long step after that."""
    say(f"Installing {', '.join(requirements)}")
    start = time.monotonic()
    pip = [python, "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check", *requirements]
    with subprocess.Popen(pip, stdout=subprocess.PIPE, text=True) as process:
        for line in map(str.strip, process.stdout):
            found = re.match(r"(Downloading|Using cached) (?:\S*/)?([^/\s]+?)-(\d[^-\s]*)\S* (\(.+\))", line)
            if found and not line.endswith(".metadata"):
                action, name, version, size = found.groups()
                say(f"{time.monotonic() - start:5.0f} s  {action.lower()} {name} {version} {size}")
            elif line.startswith("Installing collected packages"):
                say(f"{time.monotonic() - start:5.0f} s  unpacking {line.count(',') + 1} packages")
    if process.returncode:
        raise BootstrapError(f"pip install failed with exit code {process.returncode}; its own message is above")
    say(f"{time.monotonic() - start:5.0f} s  done")


def make_environment(environment, requirements, layers=(), install=install):
    """
    Makes the virtual environment if it is missing, out of date or incomplete.

    `layers`: environments whose packages this one sees, the lowest last; `install(python, requirements)` fills it.
    """
    # Virtual environments know their own place, so a moved one counts as out of date.
    made_from = [sys.version, str(environment), *requirements]
    made_from += [(layer / STAMP).read_text() for layer in layers]
    stamp = hashlib.sha256("\n".join(made_from).encode()).hexdigest()
    if is_complete(environment, stamp):
        return
    size = "a thin layer" if layers else "torch and what goes with it, about 3 GB"
    say(f"Making {environment} ({size}; once)")
    if environment.exists():
        shutil.rmtree(environment)
    # A step that fails or is interrupted leaves no stamp: the next call starts over.
    run([sys.executable, "-m", "venv", environment], "Making a virtual environment (on Debian: python3-venv)")
    python = interpreter(environment)
    if layers:
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own, *shared = (
            subprocess.check_output([interpreter(layer), "-c", query], text=True).strip()
            for layer in (environment, *layers)
        )
        Path(own, "base.pth").write_text("\n".join(shared) + "\n")
    install(python, requirements)
    (environment / STAMP).write_text(stamp)


def prepare(directory, transformers_version=None, more=None):
    """Makes both layers, and one of the requirements file `more`; returns the interpreter that sees them."""
    requirements = read_requirements()
    if transformers_version:
        requirements["transformers"] = f"transformers=={transformers_version}"
    base = directory / "base"
    thin = directory / f"transformers-{transformers_version or 'newest'}"
    make_environment(base, [line for name, line in requirements.items() if name not in THIN_LAYER])
    make_environment(thin, [line for name, line in requirements.items() if name in THIN_LAYER], [base])
    if more is None:
        return interpreter(thin)
    more = more.resolve()
    purpose = more.parent.name if more.stem == "requirements" else more.stem.removeprefix("requirements-")
    top = directory / f"{thin.name}-{purpose}"
    make_environment(top, list(read_requirements([more]).values()), [thin, base])
    return interpreter(top)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", metavar="VERSION", help="default: the newest that requirements.txt allows")
    parser.add_argument(
        "--with", dest="more", metavar="FILE", type=Path, help="requirements of a tool, such as demo/requirements.txt"
    )
    parser.add_argument("--envs", metavar="DIR", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    parser.add_argument("command", choices=["ask", "test", "python"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the command as they are")
    return parser.parse_args(argv)


def main(argv=None):
    if sys.version_info < (3, 10):
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    options = parse_arguments(argv)
    try:
        python = prepare(options.envs.resolve(), options.transformers, options.more)
    except (BootstrapError, OSError) as error:
        sys.exit(f"bootstrap: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    command = {"ask": [ROOT / "scripts" / "ask.py"], "test": TEST, "python": []}[options.command]
    # Paths given to `ask` are the caller's; pytest's are the repository's.
    directory = ROOT if options.command == "test" else None
    if options.command == "test":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # with a process on each core, more threads only wait
    try:
        code = subprocess.run([python, *command, *options.arguments], cwd=directory).returncode
    except KeyboardInterrupt:
        code = 130
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
