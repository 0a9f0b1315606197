"""Several checkpoints in one repository: code at the root, weights in folders of it."""

import json

import pytest
from code_package import code_files
from hub_server import Hub
from places import ROOT
from test_hub import OTHER_PYTHON, needs_other, run_steps

pytestmark = [pytest.mark.hub, pytest.mark.slow]
SUBFOLDERS = sorted(folder for folder in (ROOT / "checkpoints").iterdir() if folder.is_dir())
NAMES = [folder.name for folder in SUBFOLDERS]


@pytest.fixture(scope="module")
def hub():
    """With a repository of the code and every checkpoint."""
    files = {}
    for folder in SUBFOLDERS:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        files |= {name: (ROOT / name).read_bytes() for name in code_files(auto_map)}
        files |= {f"checkpoints/{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with Hub() as hub:
        hub.add_token("hf_me", "me")
        hub.add_repository("me/several", files)
        yield hub


def find(repo, hub, home, *python):
    """What a fresh process finds in each folder, by its name."""
    steps = {name: ("of_subfolder", {"repo": repo, "subfolder": f"checkpoints/{name}"}) for name in NAMES}
    return run_steps(hub, home, *python, **steps)


@pytest.fixture(scope="module")
def by_id(hub, tmp_path_factory):
    return find("me/several", hub, tmp_path_factory.mktemp("home"))


def test_checkpoints_in_folders_of_a_repository(by_id, tmp_path):
    """Loaded from a Hub with the code of the root, as they are loaded from a clone."""
    assert by_id == find(ROOT, None, tmp_path)
    assert all(len(set(found["classes"])) == 1 for found in by_id.values())


@needs_other
def test_checkpoints_in_folders_on_the_other_line(hub, by_id, tmp_path):
    """Frames of noise are enlarged by other code there; tests/model/test_checkpoints.py asks about the samples on both lines."""
    for name, found in find("me/several", hub, tmp_path, OTHER_PYTHON).items():
        assert set(found["classes"]) == set(by_id[name]["classes"])
        assert found["seen"]["prompt"] == by_id[name]["seen"]["prompt"]
