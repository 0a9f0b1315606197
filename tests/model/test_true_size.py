"""The shapes of LLaVA-NeXT-Video-7B with random weights, its language model cut to two layers, within 8 GB."""

import json
import os
import subprocess
import sys

import pytest
from places import SUPPORT

pytestmark = pytest.mark.slow  # the model of its fixture is large
FRAMES = 8
GIGABYTE = 2**30


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `true_size.py` measured in a process of its own, whose peak of memory is this model's alone."""
    path = tmp_path_factory.mktemp("true_size") / "report.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, SUPPORT / "true_size.py", path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


def test_placeholders(report):
    counts = [report[mode]["placeholders"] for mode in ("unpruned", "pooled", "unpooled")]
    assert counts == [1152, 176, 688]


@pytest.mark.parametrize("pooling, per_frame", [("pooled", 22), ("unpooled", 86)])
def test_kept_tokens(report, pooling, per_frame):
    result = report[pooling]
    assert result["kept"] == [FRAMES * per_frame]
    assert result["projected"] == FRAMES * per_frame  # the projector sees nothing else
    assert result["logits"] == [1, 1, 32064] and result["finite"]


def test_an_image_of_two_tiles(report):
    """336x672 pixels: 576 tokens of the base view and 24x48 of the tiles."""
    assert report["image"]["placeholders"] == round(0.15 * 576) + round(0.15 * 1152)
    assert report["image"]["finite"]


def test_vocabulary(report):
    assert report["token_ids"] == [32001, 32000]


def test_peak_memory(report):
    assert report["parameters"] > 900e6
    assert report["peak_bytes"] < 8 * GIGABYTE
