"""The widths of each family's 7B model with random weights and few layers, in float32 and within 4 GB."""

import json
import os
import subprocess
import sys

import pytest
from families import FAMILIES
from places import SUPPORT

pytestmark = pytest.mark.slow  # the models of its fixture are large
GIGABYTE = 2**30
# Placeholders of an image of 480x640 pixels and of 8 frames, at the ratios 1, 0.15 and 0.1.
COUNTS = {
    "llava": {"image": [576, 86, 58]},
    # The base view, and tiles of 36x48 unpadded tokens, whose rows end with newlines where nothing is pruned.
    "llava_next": {"image": [576 + 36 * 48 + 36, 86 + 259, 58 + 173]},
    "llava_next_video": {"image": [576 + 36 * 48 + 36, 86 + 259, 58 + 173], "video": [8 * 144, 8 * 22, 8 * 14]},
    # Tiles of 40x54 unpadded tokens; frames pooled from 27x27 to 14x14, and a newline.
    "llava_onevision": {"image": [729 + 40 * 54 + 40, 109 + 324, 73 + 216], "video": [8 * 196 + 1, 8 * 29, 8 * 20]},
    "video_llava": {"image": [256, 38, 26], "video": [8 * 257, 8 * 39, 8 * 26]},  # 257: with CLS
    # 17x23 squares of 28 pixels; pairs of frames of 12x12.
    "qwen2_5_vl": {"image": [391, 59, 39], "video": [4 * 144, 4 * 22, 4 * 14]},
    # 15x20 squares of 32 pixels; four of the frames, the fewest that its own rule takes, in pairs of 10x10.
    "qwen3_vl": {"image": [300, 45, 30], "video": [2 * 100, 2 * 15, 2 * 10]},
}
# Tokens that the language model gets in the runs of `true_size.py`; the third of a family is without pooling.
RUNS = {
    "llava": [58],
    "llava_next": [231],
    "llava_next_video": [345, 8 * 22, 8 * 86],
    "llava_onevision": [73 + 216, 8 * 29, 8 * 73],
    "video_llava": [26, 8 * 26],
    "qwen2_5_vl": [39, 4 * 22],
    "qwen3_vl": [30, 2 * 15],
}
# What the projector sees, where that is not what is kept: LLaVA-OneVision pools frames behind it.
PROJECTED = {"llava_onevision": [73 + 216, 8 * 729, 8 * 73], "qwen2_5_vl": [0, 0], "qwen3_vl": [0, 0]}
TOKENS = {
    "llava_next_video": [32001, 32000],
    "llava_onevision": [151646, 151647],
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), [151655, 151656]),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def report(family, tmp_path_factory):
    """What `true_size.py` measured in a process of its own, whose peak of memory is this model's alone."""
    path = tmp_path_factory.mktemp("true_size") / "report.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SUPPORT / "true_size.py", family.name, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_placeholders(family, report):
    assert report["counts"] == COUNTS[family.name]


def test_kept_tokens(family, report):
    assert [run["placeholders"] for run in report["runs"]] == RUNS[family.name]
    assert [run["projected"] for run in report["runs"]] == PROJECTED.get(family.name, RUNS[family.name])
    for run in report["runs"]:
        assert run["kept"] == [run["placeholders"]]
        assert run["logits"] == [1, 1, 1024] and run["finite"]


def test_token_ids(family, report):
    assert report["token_ids"] == TOKENS.get(family.name, [32000, 32001][: len(family.kinds)])


def test_peak_memory(report):
    assert report["parameters"] > 240e6
    assert report["peak_bytes"] < 4 * GIGABYTE
