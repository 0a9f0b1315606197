"""Fixtures: small random models and processors."""

import os

import code_package  # noqa: F401  first of all: what is imported below takes the code files for a package
import pytest
from tiny import make_inputs, save_clip, save_stock_checkpoint, tiny_config, tiny_model, tiny_processor

__all__ = ["make_inputs"]

# Of transformers' own tests, which tests/model/test_transformers_suite.py imports.
SUITE_MARKS = (
    "accelerate_tests bitsandbytes flash_attn_test flash_attn_3_test flash_attn_4_test is_training_test is_fsdp_test "
    "is_expert_parallel_test is_pipeline_test is_staging_test is_tensor_parallel_test order torch_compile_test torch_export_test"
).split()


def pytest_configure(config):
    if os.environ.get("TRANSFORMERS_SDIST"):
        for mark in SUITE_MARKS:
            config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


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
