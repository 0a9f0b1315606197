"""Every method and every family of the repository, and linked variants."""

import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from families import FAMILIES
from rediprune.methods_registry import METHODS
from served import MEDIA, kind_of

QUESTION = "what colour is the star?"
ASKED = [([name], QUESTION) for name in MEDIA] + [(MEDIA[1:3], "where is the red circle?")]


# Those inside the language model are refused when the engine starts (test_refusals.py).
BEFORE = {name: each for name, each in METHODS.items() if each.inner is None}
MOVING = [name for name, each in BEFORE.items() if each.positions != "compact" or each.proportional_attention]


@pytest.fixture(scope="module")
def both(serve):
    return serve(method="rediprune")


@pytest.mark.parametrize("method", [name for name in BEFORE if name not in MOVING])
def test_every_method(method, both):
    engine, reference = both
    engine.prune_by(method), reference.prune_by(method)
    asked = ASKED[:-1] if method == "random" else ASKED  # which draws anew for each medium of a prompt
    assert engine.answers(asked) == reference.answers(asked)
    assert set(engine.pruned) == reference.pruned(asked)


@pytest.mark.parametrize("method", MOVING)
def test_every_method_that_moves_positions(method, serve):
    engine, reference = serve(method=method)
    assert engine.answers(ASKED) == reference.answers(ASKED)
    assert set(engine.pruned) == reference.pruned(ASKED)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video", "video_llava"])
@pytest.mark.parametrize("method", ["rediprune", "rediprune_plus"])
def test_every_family_linked_to_its_base(family, method, serve, tmp_path, monkeypatch):
    """An exported variant holds no weights: they come from where its config.json says."""
    monkeypatch.setitem(tiny.TEXT_SIZES, "head_dim", 32)  # the smallest that vLLM's attention on CPUs has
    family = next(each for each in FAMILIES if each.name == family)
    (tmp_path / "base").mkdir()
    base = family.save_stock_checkpoint(tmp_path / "base")
    variant = tmp_path / "variant"
    command = [sys.executable, str(ROOT / "scripts" / "export.py"), str(base), "--link", "--output", str(variant)]
    subprocess.run([*command, "--no-check", "--method", method, "--keep-ratio", "0.3"], check=True)
    assert not list(variant.glob("*.safetensors"))
    engine, reference = serve(variant)
    asked = [
        (media, question)
        for media in (["image-1.png"], ["image-2.png", "image-1.png"], ["video-1.mp4"], ["video-2.mp4", "image-1.png"])
        for question in ("what colour is the star ?", "where does it move ?")
        if {kind_of(name) for name in media} <= set(family.kinds)
    ]
    # The stock checkpoints of the tests name no token that ends an answer to transformers; vLLM takes that of the config.
    end = reference.model.config.text_config.eos_token_id
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in reference.answers(asked)]
    assert engine.answers(asked) == expected
    assert set(engine.pruned) == reference.pruned(asked)
