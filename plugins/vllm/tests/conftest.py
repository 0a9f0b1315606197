"""Fixtures: the engine in this process, beside transformers with the same weights."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]

import code_package  # noqa: E402,F401  the code files as the package `rediprune`
import pytest  # noqa: E402
from served import Reference, Served  # noqa: E402


@pytest.fixture(scope="session")
def questions():
    """100 questions of the world that the repository's checkpoint was trained in."""
    from toy_world import HELD_OUT_START, sample_video

    texts = [question.question for seed in range(30) for question in sample_video(HELD_OUT_START + seed).questions]
    return list(dict.fromkeys(texts))[:100]


@pytest.fixture(scope="module")
def serve():
    """
    `serve(folder, **pruning)` -> (`Served`, `Reference`) of a variant.

    There is one engine at a time in a process: the next call, and the end of the module, stop the one before.
    """
    engines = []

    def start(folder=ROOT, engine=(), **pruning):
        stop()
        engines.append(Served(folder, pruning, **dict(engine)))
        return engines[-1], Reference(folder, pruning)

    def stop():
        if engines:
            engines.pop().stop()

    yield start
    stop()
