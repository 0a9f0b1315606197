"""Importing this makes the code files the package `rediprune`, as the Hub's dynamic modules import them: each from the same
folder, by relative imports. It also sets what holds for every process of the tests: no Hub, one thread, no chatter."""

import os
import sys
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from places import ROOT

package = types.ModuleType("rediprune")
package.__path__ = [str(ROOT)]
sys.modules["rediprune"] = package

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def code_files(auto_map: dict) -> set:
    """Names of the code files that the classes of an `auto_map` rest on."""
    from transformers.dynamic_module_utils import get_relative_import_files

    entries = {ROOT / f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    return {Path(file).name for entry in entries for file in [entry, *get_relative_import_files(entry)]}
