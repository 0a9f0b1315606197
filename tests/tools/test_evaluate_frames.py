"""Accuracy against the number of frames."""

import json

import evaluate_frames
import pytest

SETTING = "uniform,keep_tokens=2,positions=scaled"


def run(output, *arguments):
    evaluate_frames.main(["--output", str(output), *map(str, arguments)])
    return json.loads(output.with_suffix(".json").read_text())


@pytest.mark.slow
def test_a_video_that_is_too_long_for_the_unpruned_model_has_rows_of_the_others_alone(tmp_path):
    report = run(tmp_path / "a", "--frames", 8, 64, "--scenes", 1, "--settings", SETTING, "--threads", 1)
    told = [(row["frames"], row["setting"], row["visual_tokens"]) for row in report["rows"]]
    assert told == [(8, "unpruned", 288), (8, SETTING, 16), (64, "unpruned", None), (64, SETTING, 128)]
    assert [row["error"] is None for row in report["rows"]] == [True, True, False, True]
    assert "takes at most 2048" in report["rows"][2]["error"]
    table = (tmp_path / "a.md").read_text()
    assert "| 64 | unpruned | - | longer than the context |" in table and f"| 64 | {SETTING} | 128 | " in table
    assert all(0 <= row["accuracy"] <= 1 for row in report["rows"] if row["error"] is None)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--frames", "12"], "must be a multiple of 8"), (["--first-scene", "5"], "held-out scenes have the numbers")],
)
def test_what_cannot_be_measured_is_refused_first(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(tmp_path / "a", *arguments)
    assert message in capsys.readouterr().err
