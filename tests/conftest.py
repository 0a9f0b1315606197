"""Small random models and processors. The code files are imported as the package `rediprune`, as the Hub's dynamic modules
import them: each from the same folder, by relative imports."""

import os
import sys
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
package = types.ModuleType("rediprune")
package.__path__ = [str(ROOT)]
sys.modules["rediprune"] = package

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

from tiny import make_inputs, save_clip, save_stock_checkpoint, tiny_config, tiny_model, tiny_processor  # noqa: E402

__all__ = ["make_inputs"]


def pytest_configure(config):
    config.addinivalue_line("markers", "gradients: the test runs with gradients enabled")


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory):
    """Folder of a CLIP checkpoint whose vision tower is as wide as the models'."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a stock checkpoint, to read."""
    return save_stock_checkpoint(tmp_path_factory.mktemp("stock") / "base")


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def config():
    return tiny_config()
