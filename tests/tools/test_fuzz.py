"""The fuzz run: some of its cases, and that it notices what is wrong."""

import json
import re

import fuzz
import pytest
import rediprune.core_forward as forward
import rediprune.core_language as language
import rediprune.core_pruner as pruner
import torch
from fuzzing.cases import CACHES, draw_case
from rediprune.methods_base import Method
from rediprune.methods_registry import METHODS
from rediprune.ops_selection import count_kept

MANY = 150


@pytest.fixture(scope="module")
def models(text_tower):
    return fuzz.Models(text_tower)


def failures(models, numbers, such_as=lambda case: True):
    cases = (case for case in (draw_case(0, number) for number in numbers) if such_as(case))
    return (wrong for wrong in (fuzz.run_case(case, models) for case in cases) if wrong is not None)


@pytest.mark.parametrize("cache", CACHES)
def test_some_cases_of_every_cache(models, cache):
    of_cache = [number for number in range(1000, 1500) if draw_case(0, number).cache == cache]
    assert list(failures(models, of_cache[:3])) == []


def test_a_case_follows_from_its_number_and_the_draw_reaches_everything():
    cases = [draw_case(1, number) for number in range(400)]
    assert [case.as_record() for case in cases[:9]] == [draw_case(1, number).as_record() for number in range(9)]
    assert draw_case(2, 0).as_record() != cases[0].as_record()
    assert {case.pruning["method"] for case in cases} == {
        name for name, method in METHODS.items() if method.inner is None
    } and {case.cache for case in cases} == set(CACHES)
    for key in ("scope", "relevance", "positions", "proportional_attention", "merge_weight", "video_pooling", "words"):
        assert len({case.pruning.get(key) for case in cases}) > 2, key
    assert {case.padding_side for case in cases} == {"left", "right"}
    kinds = {tuple(sorted(part.kind for part in row if part.kind != "text")) for case in cases for row in case.rows}
    assert {(), ("image",), ("video",), ("image", "video"), ("image", "image"), ("video", "video")} <= kinds


def one_more(self, num_tokens, pruning):
    return min(num_tokens, count_kept(num_tokens, pruning.keep_ratio) + 1)


def late_gaps(*args):
    columns, skipped = real_columns(*args)
    return columns.roll(1, dims=1), skipped


def backwards(self, tokens, num_kept, pruning):
    return [values.flip(1) for values in real_reduce(self, tokens, num_kept, pruning)]


real_columns, real_sizes, real_reduce = language.unpruned_columns, pruner.group_sizes, Method.reduce
FAULTS = {
    "another count": (Method, "count", one_more, "placeholders|keeps"),
    "another order": (Method, "reduce", backwards, "is not ascending"),
    "gaps in other places": (language, "unpruned_columns", late_gaps, "logits differ"),
    "other sizes": (pruner, "group_sizes", lambda *args: real_sizes(*args) + 1, "sizes add up to"),
    "a cache that forgets": (language, "read_record", lambda *args: None, "logits differ|Error"),
    "sizes without weight": (language, "all_sizes", lambda *args: None, "logits differ"),
    "one row decides for all": (
        forward, "question_mask", lambda masks, *args, **kwargs: torch.ones_like(masks), "alone|differ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(models, monkeypatch, name):
    owner, attribute, fault, message = FAULTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    found = next(failures(models, range(MANY)), "nothing")
    assert re.search(message, found), found


def test_a_failing_case_is_told_with_the_command_that_repeats_it(monkeypatch, tmp_path, capsys):
    arguments = ["--runs", "3", "--seed", "7", "--first", "5"]
    monkeypatch.setattr(fuzz, "run_case", lambda case, models: "it is wrong" if case.number == 6 else None)
    with pytest.raises(SystemExit) as ended:
        fuzz.main([*arguments, "--output", str(tmp_path / "new" / "fuzz")])
    assert ended.value.code == 1
    report = json.loads((tmp_path / "new" / "fuzz.json").read_text())
    assert (report["runs"], report["failed"], sum(report["drawn"]["method"].values())) == (3, 1, 3)
    (failure,) = report["failures"]
    assert failure["command"] == "python scripts/fuzz.py --seed 7 --only 6" and failure["wrong"] == "it is wrong"
    assert failure["case"] == json.loads(json.dumps(draw_case(7, 6).as_record()))

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        fuzz.main(failure["command"].split()[2:])
    assert ended.value.code == 1 and "it is wrong" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        fuzz.main([*arguments[:-1], "0", "--runs", "2"])
    assert ended.value.code == 0


@pytest.mark.parametrize("arguments, message", [
    (["--runs", "0"], "'0' is not a number of at least 1"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--only", "-3"], "--only -3: must be at least 0"),
])  # fmt: skip
def test_fuzz_says_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit):
        fuzz.main(arguments)
    assert message in capsys.readouterr().err
