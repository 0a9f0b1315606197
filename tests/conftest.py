"""Fixtures: small random models and processors."""

import code_package  # noqa: F401  first of all: what is imported below takes the code files for a package
import pytest
from tiny import make_inputs, save_clip, save_stock_checkpoint, tiny_config, tiny_model, tiny_processor

__all__ = ["make_inputs"]


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
