"""The study of what finds the object that a question asks about."""

import json
import math

import pytest
import relevance_study
import torch
from relevance_study import asked_about, share_ahead, shown
from toy_world import HELD_OUT_START, object_map, sample_video


def test_share_ahead_counts_pairs():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    wanted, others = torch.tensor([[True, False, True, False]]), torch.tensor([[False, True, False, True]])
    assert share_ahead(scores, wanted, others) == (1 + 1 + 1 + 0.5) / 4
    assert math.isnan(share_ahead(scores, torch.zeros_like(wanted), others))
    mixed = torch.cat([scores, -scores])  # the mean over sets
    assert share_ahead(mixed, wanted.expand(2, -1), others.expand(2, -1)) == 0.5


@pytest.mark.parametrize("seed", range(12))
def test_what_is_asked_about_answers_the_question(seed):
    scene = sample_video(HELD_OUT_START + seed)
    for question in scene.questions:
        things = [scene.things[number] for number in asked_about(scene, question)]
        if question.type in ("colour", "shape"):
            assert {getattr(thing, question.type) for thing in things} == {question.answer}
        elif question.type == "presence":
            assert bool(things) == (question.answer == "yes")
        elif question.type == "order":
            assert question.answer in {thing.name for thing in things} and len(things) == 2
        elif question.type in ("place", "motion"):
            assert len(things) == 1


def test_shown_tokens_lie_on_the_objects():
    scene = sample_video(HELD_OUT_START)
    tokens = shown(scene, range(len(scene.things)), 6)
    assert tokens.shape == (len(scene.frames), 36) and tokens.any()
    nothing = object_map(scene, 0).reshape(6, 16, 6, 16).transpose(0, 2, 1, 3).reshape(36, -1).max(1) == 0
    assert not tokens[0][torch.tensor(nothing)].any()


@pytest.mark.slow
def test_the_study_tells_aligned_from_unaligned_relevance(tmp_path):
    relevance_study.main(["--output", str(tmp_path / "found"), "--scenes", "3", "--threads", "1"])
    record = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["relevance"], row["scope"]): row for row in record["rows"]}
    best = rows["attention, layer 1: largest of heads and words", "video"]
    assert best["against_all_tokens"] > rows["pooled", "video"]["against_all_tokens"] + 0.1
    assert best["against_other_objects"] > 0.7
    assert "| pooled |" in (tmp_path / "found.md").read_text()
