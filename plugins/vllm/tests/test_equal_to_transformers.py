"""Answers and kept sets of the engine are those of transformers, in fp32."""

import json

import pytest
from conftest import ROOT
from served import MEDIA

SETTINGS = {
    "rediprune": {"method": "rediprune"},
    "rediprune_plus": {"method": "rediprune_plus"},
    "original positions": {"method": "rediprune", "positions": "original"},
    "token sizes": {"method": "rediprune", "proportional_attention": True},
    "merged": {
        "method": "rediprune",
        "positions": "original",
        "proportional_attention": True,
        "merge_weight": 0.5,
        "scope": "video",
    },
    "attention": {"method": "rediprune", "relevance": "attention", "relevance_layer": 2, "scope": "item"},
    "projected": {"method": "rediprune", "relevance": "projected", "distance": "projected", "time_weight": 0.3},
    "scaled": {"method": "rediprune_plus", "positions": "scaled"},
    "unpooled": {"method": "rediprune", "video_pooling": False, "keep_ratio": 0.05},
}
ALL = ("rediprune", "rediprune_plus", "merged")  # that are asked all of the questions


@pytest.mark.parametrize("setting", SETTINGS)
def test_questions_about_every_sample(setting, serve, questions):
    engine, reference = serve(**SETTINGS[setting])
    asked = [([MEDIA[index % len(MEDIA)]], question) for index, question in enumerate(questions)]
    asked = asked if setting in ALL else asked[:20]
    assert engine.answers(asked) == reference.answers(asked)
    assert set(engine.pruned) == reference.pruned(asked)


@pytest.mark.parametrize("positions", ["scaled", "original"])
def test_a_video_that_is_longer_than_the_context(positions, serve, questions, tmp_path):
    """300 tokens before pruning, for a language model that was made for 256."""
    for file in ROOT.iterdir():
        if file.is_file() and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((ROOT / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 256
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine, reference = serve(tmp_path, {"max_model_len": 256}, method="rediprune_plus", positions=positions)
    asked = [([name], question) for name in MEDIA if name.endswith(".mp4") for question in questions[:4]]
    assert engine.answers(asked, max_tokens=16) == reference.answers(asked, max_tokens=16)
