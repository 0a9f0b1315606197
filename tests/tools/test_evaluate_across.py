"""Groups of settings, and the tables of several checkpoints."""

import importlib
import json

import pytest
from evaluate_across import OURS, main
from evaluation.groups import GROUPS, as_settings
from rediprune.methods_registry import METHODS

ROW = {"questions": 10, "inner_tokens": None, "share_of_operations": 0.1}
RUN = {
    "cpu": "a CPU",
    "threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "torch": "2",
    "transformers": "5",
    "date": "today",
}


def report(first_scene=0, **accuracy_of_setting):
    """A report of evaluate.py whose intervals reach one point up and down; "__" in a name stands for a comma."""
    rows = []
    for name, accuracy in {"unpruned": 0.9, **accuracy_of_setting}.items():
        setting = name.replace("__", ",alpha=")
        place = {"kind": "video", "setting": setting, "keep_ratio": 1.0 if name == "unpruned" else 0.1}
        rows.append(ROW | place | {"accuracy": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01})
    return {"command": "made", "first_scene": first_scene, "scenes": 2, "environment": RUN, "rows": rows}


def across(tmp_path, **reports):
    named = []
    for name, content in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        named.append(f"{name}={tmp_path / name}.json")
    main([*named, "--output", str(tmp_path / "across")])
    return json.loads((tmp_path / "across.json").read_text()), (tmp_path / "across.md").read_text()


def test_every_method_that_a_ratio_sets_is_in_the_group():
    methods = {setting.changes["method"] for setting in as_settings("methods")}
    assert set(METHODS) - methods == {"none", "vtw", "prumerge_plus"}  # unpruned; and two whose budget is their own
    assert all(setting.takes_ratio and setting.may_be_refused for name in GROUPS for setting in as_settings(name))


def test_what_a_model_refuses_of_a_group_is_left_out_with_the_reason(capsys, tmp_path):
    script = importlib.import_module("evaluate")
    arguments = [
        "--subfolder",
        "checkpoints/qwen2_5_vl",
        "--kinds",
        "image",
        "--scenes",
        "2",
        "--output",
        str(tmp_path / "a"),
    ]
    args = script.parse_arguments([*arguments, "--settings", "methods", "rediprune_plus,alpha=2"])
    run = script.Evaluation(args, script.Processes(args))
    texts = [setting.text for setting in args.settings]
    assert "no CLS" in run.left_out["visionzip,positions=original"] and "visionzip,positions=original" not in texts
    assert "visionzip,positions=original is left out: method=" in capsys.readouterr().err
    assert "fastv" in run.left_out and "rediprune,positions=compact" in run.left_out
    assert {"rediprune_plus", "random,positions=original", "rediprune_plus,query=other", "rediprune_plus,alpha=2"} <= {
        *texts
    }

    with pytest.raises(SystemExit, match="no CLS"):  # asked for by name
        script.main([*arguments, "--settings", "visionzip"])


@pytest.mark.parametrize("rival, ahead", [(0.87, True), (0.89, False), (0.95, False)])
def test_the_goal_is_to_be_ahead_of_every_rival_outside_the_intervals(tmp_path, rival, ahead):
    rows = {"random": 0.4, "divprune": rival, f"{OURS}__2": 0.99, OURS: 0.9}
    (entry,) = across(tmp_path, one=report(**rows))[0]["goals"]
    assert entry["best_rival"] == "divprune" and entry["ahead_outside_intervals"] == ahead
    assert entry["share_of_unpruned"] == 1


def test_a_setting_that_one_checkpoint_lacks_has_a_dash(tmp_path):
    found, text = across(
        tmp_path, one=report(**{OURS: 0.8, "random": 0.5, "scope": 0.6}), two=report(**{OURS: 0.7, "random": 0.4})
    )
    assert (
        "| scope | 60.0 (59.0 to 61.0) | - |" in text
        and "| unpruned | 90.0 (89.0 to 91.0) | 90.0 (89.0 to 91.0) |" in text
    )
    assert [(entry["checkpoint"], entry["best_rival"]) for entry in found["goals"]] == [
        ("one", "scope"),
        ("two", "random"),
    ]


def by_operations(content):
    unpruned, *others = content["rows"]
    unpruned["share_of_operations"] = 1.0
    for row in others:
        row |= {"asked_operations": 0.5, "keep_ratio": row["accuracy"]}  # of which each setting has its own
    return content


def test_what_was_asked_for_by_operations_is_compared_by_operations(tmp_path):
    found, text = across(tmp_path, one=by_operations(report(**{OURS: 0.8, "random": 0.5})))
    (entry,) = found["goals"]
    assert (entry["measure"], entry["budget"], entry["best_rival"]) == ("share of the operations", 0.5, "random")
    assert "## Videos, share of the operations 0.5" in text and "| random | 50.0 (49.0 to 51.0) |" in text


def test_what_takes_no_ratio_stands_at_the_operations_that_it_takes(tmp_path):
    content = by_operations(report(**{OURS: 0.8, "random": 0.5, "vtw": 0.3}))
    del content["rows"][-1]["asked_operations"]
    content["rows"][-1] |= {"keep_ratio": 0, "share_of_operations": 0.23}
    found, text = across(tmp_path, one=content)
    assert "## Videos, share of the operations 0.23" in text and "share of the operations 0\n" not in text
    assert [entry["budget"] for entry in found["goals"]] == [0.5]


def test_budgets_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="some by operations"):
        across(tmp_path, one=report(random=0.5), two=by_operations(report(random=0.5)))


def test_reports_about_different_scenes_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="different scenes"):
        across(tmp_path, one=report(), two=report(first_scene=5))


def test_two_reports_of_one_name_are_refused(capsys, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(report()))
    with pytest.raises(SystemExit):
        main([f"a={path}", f"a={path}", "--output", str(tmp_path / "across")])
    assert "must differ" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a.json", "=a.json", "a="])
def test_a_report_needs_a_name(capsys, text):
    with pytest.raises(SystemExit):
        main([text, "--output", "a"])
    assert "give a name and a file" in capsys.readouterr().err


def test_a_picture_has_a_panel_for_each_checkpoint(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    rows = {OURS: 0.8, "divprune": 0.7, "random,positions=original": 0.4, f"{OURS}__2": 0.75}
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(**rows)))
    named = [f"{name}={tmp_path / name}.json" for name in ("one", "two")]
    main([*named, "--output", str(tmp_path / "across"), "--plots"])
    panels = pyplot.gcf().axes
    assert [panel.get_title() for panel in panels] == ["one", "two"]
    lines = {line.get_label() for line in panels[0].get_lines()}
    assert lines == {"unpruned", OURS, "divprune", "random,positions=original"}
    assert (tmp_path / "across.png").stat().st_size > 1000
