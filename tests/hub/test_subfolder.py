"""Several checkpoints in one repository: code at the root, weights in folders of it."""

import json

import pytest
from code_package import code_files
from hub_server import Hub
from places import ROOT
from test_hub import OTHER_PYTHON, run_step

pytestmark = [pytest.mark.hub, pytest.mark.slow]
SUBFOLDERS = sorted(folder for folder in (ROOT / "checkpoints").iterdir() if folder.is_dir())


@pytest.mark.parametrize("folder", SUBFOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_in_a_folder_of_a_repository(folder, tmp_path):
    """Loaded from a Hub in a fresh process, with the code of the root; as it is loaded from a clone."""
    subfolder = f"checkpoints/{folder.name}"
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    files = {name: (ROOT / name).read_bytes() for name in code_files(auto_map)}
    files |= {f"{subfolder}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    here = run_step("of_subfolder", None, tmp_path / "a", repo=ROOT, subfolder=subfolder)
    with Hub() as hub:
        hub.add_token("hf_me", "me")
        hub.add_repository("me/several", files)
        found = run_step("of_subfolder", hub, tmp_path / "b", repo="me/several", subfolder=subfolder)
        if OTHER_PYTHON:
            other = run_step("of_subfolder", hub, tmp_path / "c", OTHER_PYTHON, repo="me/several", subfolder=subfolder)
            # Frames of noise are enlarged by other code there; tests/model/test_checkpoints.py asks about the samples on both lines.
            assert set(other["classes"]) == set(found["classes"]) and other["seen"]["prompt"] == found["seen"]["prompt"]
    assert found == here and len(set(found["classes"])) == 1
