"""Every file that a class of `auto_map` rests on is named by the file of that class: 4.57 copies no other from a folder."""

import re

import pytest
from places import ROOT

ENTRIES = ("configuration_rediprune", "processing_rediprune", "modeling_rediprune_llava", "modeling_rediprune_qwen")


def named(module):
    return set(re.findall(r"^\s*from\s+\.(\w+)\s+import", (ROOT / f"{module}.py").read_text(), re.MULTILINE))


def rests_on(module):
    found, waiting = set(), [module]
    while waiting:
        new = named(waiting.pop()) - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_file_names_all_that_it_rests_on(entry):
    missing = rests_on(entry) - named(entry) - {entry}
    assert not missing, f"add to the TYPE_CHECKING block of {entry}.py: " + "; ".join(
        f"from .{m} import ..." for m in missing
    )


def test_every_code_file_is_reached():
    reached = set().union(*(rests_on(entry) for entry in ENTRIES), ENTRIES)
    assert reached == {path.stem for path in ROOT.glob("*.py")}
