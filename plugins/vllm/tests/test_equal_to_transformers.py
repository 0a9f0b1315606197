"""Answers and kept sets of the engine are those of transformers, in fp32."""

import pytest
from served import MEDIA

SETTINGS = {
    "rediprune": {},
    "rediprune_plus": {"method": "rediprune_plus"},
    "original positions": {"positions": "original"},
    "token sizes": {"proportional_attention": True},
    "merged": {"positions": "original", "proportional_attention": True, "merge_weight": 0.5, "scope": "video"},
    "attention": {"relevance": "attention", "relevance_layer": 2, "scope": "item"},
    "projected": {"relevance": "projected", "distance": "projected", "time_weight": 0.3},
    "unpooled": {"video_pooling": False, "keep_ratio": 0.05},
}


ALL = ("rediprune", "rediprune_plus", "merged")  # that are asked all of the questions


@pytest.mark.parametrize("setting", SETTINGS)
def test_questions_about_every_sample(setting, serve, questions):
    engine, reference = serve(**SETTINGS[setting])
    asked = [([MEDIA[index % len(MEDIA)]], question) for index, question in enumerate(questions)]
    asked = asked if setting in ALL else asked[:20]
    assert engine.answers(asked) == reference.answers(asked)
    assert set(engine.pruned) == reference.pruned(asked)
