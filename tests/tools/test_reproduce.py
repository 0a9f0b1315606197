"""The paper's tables: their figures, the plan, and the runs, through a stand-in for lmms-eval and through lmms-eval itself."""

import json
import os
import signal
import subprocess
import sys
import time

import lmms_table
import paper_tables
import pytest
import reproduce
from places import ROOT
from plugin import PLUGIN, installed_plugin
from rediprune.configuration_rediprune import PruningConfig
from tflops import prefill

PAPER = paper_tables.read_data()
WORLD = ["--local", "--limit", 1, "--benchmarks", "world", "--methods", "original", "rediprune", "trim"]
STAND_IN = """
import json, os, sys, time
from pathlib import Path

value = lambda name: sys.argv[sys.argv.index(name) + 1]
model, folder = dict(pair.split("=", 1) for pair in value("--model_args").split(",")), Path(value("--output_path"))
with open(os.environ["STARTED"], "a") as file:
    file.write(f"{model.get('method', 'original')} on {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getpid()}\\n")
if os.environ.get("SLEEPS"):
    time.sleep(600)
if model.get("method", "original") == os.environ.get("FAILS"):
    sys.exit(0)  # as lmms-eval does
ratio = float(model["keep_ratio"])
results = {value("--tasks"): {f"{metric},none": ratio for metric in os.environ.get("METRICS", "accuracy score").split()}}
(folder / "1_results.json").write_text(json.dumps({"results": results, "config": {}, "date": "1"}))
request = {"visual_tokens": 4608 * ratio, "prompt_tokens": 4608 * ratio + 60, "requests": 1, "seconds": 1}
times = {"batches": [request], "device": "a stand-in", "dtype": "float16", "pruning": {}}
Path(model["times"]).write_text(json.dumps(times))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a stand-in for lmms-eval, and the plug-in, where this process and its children find them; returns who was started."""
    (tmp_path / "path" / "lmms_eval").mkdir(parents=True)
    (tmp_path / "path" / "lmms_eval" / "__init__.py").touch()
    (tmp_path / "path" / "lmms_eval" / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", installed_plugin(tmp_path / "path"))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.syspath_prepend(tmp_path / "path")
    return lambda: sorted((tmp_path / "started").read_text().splitlines())


def run(output, *arguments):
    reproduce.main(["--output", str(output), *map(str, arguments)])


def cells(output, table, backbone, method):
    rows = json.loads((output / "tables.json").read_text())["rows"]
    (row,) = [row for row in rows if (row["table"], row["backbone"], row["method"]) == (table, backbone, method)]
    return {cell["column"]: (cell["paper"], cell["measured"]) for cell in row["cells"]}


# -- the paper's figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PAPER, paper_tables.read_data(local=True)], ids=["paper", "local"])
def test_every_column_has_a_figure_and_something_that_measures_it(data):
    for table in data["tables"].values():
        assert len({column["title"] for column in table["columns"]}) == len(table["columns"])
        for backbone, method, figures in table["rows"]:
            assert len(figures) == len(table["columns"]) and backbone in data["backbones"] and method in data["methods"]
    known, counted = {f"{task} {metric}" for task, metric, *_ in lmms_table.COLUMNS}, {"TFLOPs", "visual tokens"}
    for column in (column for table in data["tables"].values() for column in table["columns"]):
        for name in column["of"]:
            own = data["benchmarks"][name].get("figures", dict.fromkeys(("prefill", "end to end", "memory")))
            assert column["figure"] in {*own, *counted, "share of TFLOPs"}
            assert all(set(figure["mean_of"]) <= known for figure in own.values() if figure)


def test_every_run_has_options_that_the_configuration_takes(tmp_path):
    plan = reproduce.Plan(reproduce.parse_arguments(["--output", str(tmp_path)]))
    assert len(plan.runs) == len(set(plan.runs)) == 4 * 2 * 4 + 7 * 5 + 4 * 3 + 4
    for options in map(plan.options, plan.runs):
        values = {key: value for key, value in options.items() if key != "num_frames"}
        if "video_pooling" in values:  # as lmms-eval reads it from its arguments
            values["video_pooling"] = {"true": True, "false": False}[values["video_pooling"]]
        block = PruningConfig.from_value(values)
        assert block.keep_ratio == options["keep_ratio"]


def test_the_tflops_of_the_paper_are_those_of_its_formula():
    """But for the known typing error, and for the 0.53 of 56 or 57 tokens where 58 are 0.54."""
    tokens = {"video-llava-7b": (308, 206), "llava-next-video-7b": (688, 464)}
    text = {"video-llava-7b": ((38, 196), (28, 21)), "llava-next-video-7b": ((60, 249), (64, 57))}
    for backbone, method, figures in PAPER["tables"]["1"]["rows"]:
        full = {"video-llava-7b": 2056, "llava-next-video-7b": 4608}[backbone]
        for kept, texts, printed in zip(tokens[backbone], text[backbone], (figures[2], figures[7])):
            visual = full if method == "original" else kept
            assert sum(prefill(visual, length) for length in texts) / 2 == pytest.approx(printed, abs=1.01e-3)
    images = {method: figures[5:7] for _, method, figures in PAPER["tables"]["2"]["rows"]}
    wrong = {name: count for name, (count, cost) in images.items() if abs(prefill(int(count), 48.6) - cost) > 0.015}
    assert wrong == {"original": 576}


def test_nothing_of_the_paper_is_shown_as_measured():
    rows = paper_tables.rows_of(PAPER, {})
    assert all(cell["measured"] is None and cell["paper"] is not None for row in rows for cell in row["cells"])
    text = paper_tables.markdown(PAPER, rows, [])
    assert (
        "| LLaVA-1.5-7B | Original | 61.9 | - | 64.7 | - | 1506.5 | - | 85.9 | - | 69.5 | - | 576 | - | 2.23 | - |"
        in text
    )
    assert "typing error" in text and "576 tokens a frame" in text and "larger budget" in text
    assert "not here: DART" in text and "not here: TRIM*" in text


def test_the_estimate():
    run = paper_tables.Run("llava-next-video-7b", "rediprune", "egoschema")
    assert paper_tables.hours_of(PAPER, run) == pytest.approx((60 + 500 * (0.205 + 1)) / 3600)
    assert paper_tables.hours_of(PAPER, run, limit=20, seconds_per_sample=3) == pytest.approx((60 + 20 * 3) / 3600)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_commands_and_writes_nothing(tmp_path, capsys):
    run(tmp_path / "out", "--dry-run", "--tables", 2, 4, "--seconds-per-sample", 2, "--gpus", "0,1")
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "40 of 40 runs to do: " in text and "2 s a sample, as you say" in text and "not here: DART" in text
    assert "export.py llava-hf/llava-1.5-7b-hf --link" in text and "Video-LLaVA" not in text
    (command,) = [line for line in text.splitlines() if "rediprune-average/activitynetqa.part/times.json" in line]
    assert command.strip().startswith("MODEL_VERSION=gpt-3.5-turbo-0125 ") and "--tasks activitynetqa " in command
    assert "num_frames=8,video_pooling=false,keep_ratio=0.1,method=rediprune,query_weighting=average," in command
    assert text.count("method=trim,text_tower=openai/clip-vit-large-patch14-336,") == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tables", 5], "--tables 5: choose of 1, 2, 3, 4"),
        (["--methods", "magic"], "--methods magic: choose of original, .*rediprune"),
        (["--methods", "dart"], "no run of all that was chosen .*not here: DART, prunes inside"),
        (["--tables", 2], "torch sees no GPU here; --dry-run shows"),
        (["--tables", 1], "NExT-QA needs|without a judge lmms-eval gives 0 for activitynetqa, videochatgpt, mmbench"),
        (["--tables", 4], "without a judge lmms-eval gives 0"),
        (["--tables", 3, "--gpus", "0,x"], "torch sees no GPU"),
        (["--local", "--gpus", "0,x"], "--gpus x: torch sees 0 GPU"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(monkeypatch, stand_in, tmp_path, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if arguments == ["--tables", 2]:
        monkeypatch.setenv("OPENAI_API_KEY", "a")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "out", *arguments)
    assert not (tmp_path / "started").exists()


def test_lmms_eval_and_its_plugin_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match='lmms-eval is not installed: pip install "lmms-eval'):
        run(tmp_path / "out", *WORLD)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: type("None", (), {"names": set()}))
    with pytest.raises(SystemExit, match="the plug-in of lmms-eval is not installed"):
        run(tmp_path / "out", *WORLD)


# -- the runs ----------------------------------------------------------------------------------------------------------


def test_runs_are_shared_out_and_a_failed_one_is_tried_again(monkeypatch, stand_in, tmp_path, capsys):
    output = tmp_path / "out"
    monkeypatch.setenv("FAILS", "trim")
    with pytest.raises(SystemExit, match="failed: embedded/trim/world; the same command tries again"):
        run(output, *WORLD, "--gpus", "0,1")
    assert "failed embedded/trim/world: lmms-eval left no results; see" in capsys.readouterr().err
    assert [line.split()[0] for line in stand_in()] == ["original", "rediprune", "trim"]
    assert {line.split()[2] for line in stand_in()} == {"0", "1"}
    assert cells(output, "1", "embedded", "trim")["accuracy"] == (None, None)
    monkeypatch.delenv("FAILS")
    run(output, *WORLD)
    assert "finished embedded/trim/world" in capsys.readouterr().out and len(stand_in()) == 4
    run(output, *WORLD)
    assert "0 of 3 runs to do" in capsys.readouterr().out and len(stand_in()) == 4
    assert cells(output, "1", "embedded", "trim")["accuracy"] == (None, pytest.approx(10))
    assert not list(output.rglob("*.part")) and (output / "embedded" / "trim" / "world" / "log.txt").exists()
    with pytest.raises(SystemExit, match="--limit 2: .*out was begun with 1; give another --output"):
        run(output, *WORLD, "--limit", 2)
    with reproduce.claim(output), pytest.raises(SystemExit, match="another reproduce.py is at work in it"):
        run(output, *WORLD)


def test_the_paper_stands_beside_what_was_measured(monkeypatch, stand_in, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (tmp_path / "variants" / "llava-next-video-7b").mkdir(parents=True)
    choice = ["--tables", 1, "--backbones", "llava-next-video-7b", "--benchmarks", "egoschema"]
    with pytest.raises(SystemExit, match="--gpus 2: torch sees 2 GPU"):
        run(tmp_path, *choice, "--gpus", "0,2")
    run(tmp_path, *choice, "--methods", "original", "rediprune", "--gpus", 1)
    found = cells(tmp_path, "1", "llava-next-video-7b", "rediprune")
    assert found["EgoSchema"] == (45.6, pytest.approx(15)) and found["NextQA WUPS"] == (26.42, None)
    assert "| LLaVA-NeXT-Video-7B | Original | 26.33 | - | 43.6 | 100 |" in (tmp_path / "tables.md").read_text()
    monkeypatch.setenv("METRICS", "other")
    with pytest.raises(SystemExit, match="failed: llava-next-video-7b/divprune/egoschema"):
        run(tmp_path, *choice, "--methods", "divprune")


@pytest.mark.slow
def test_a_stopped_command_ends_its_runs(stand_in, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", "--output", tmp_path / "out", *WORLD]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "SLEEPS": "1"}, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM; the same command does what is not finished" in errors
    (line,) = stand_in()
    with pytest.raises(ProcessLookupError):
        os.kill(int(line.split()[-1]), 0)


@pytest.mark.slow
def test_a_backbone_gets_its_variant_or_a_message(base, tmp_path, capfd):
    arguments = ["--output", str(tmp_path), "--backbones", "llava-next-video-7b"]
    plan = reproduce.Plan(reproduce.parse_arguments(arguments))
    plan.data["backbones"]["llava-next-video-7b"]["base"] = str(tmp_path / "missing")
    with pytest.raises(SystemExit, match="no variant of .*missing could be made"):
        reproduce.prepare(plan)
    plan.data["backbones"]["llava-next-video-7b"]["base"] = str(base)
    reproduce.prepare(plan)
    assert json.loads((tmp_path / "variants" / "llava-next-video-7b" / "config.json").read_text())[
        "weights_from"
    ] == str(base)
    assert "missing: no such folder" in capfd.readouterr().err


@pytest.mark.slow
def test_the_times_of_the_small_checkpoint(tmp_path):
    run(tmp_path, "--local", "--tables", 3, "--methods", "original")
    figures = cells(tmp_path, "3", "embedded", "original")
    assert 0 < figures["prefill, s"][1] < figures["end to end, s"][1] and figures["memory"][1] > 0.009


def test_lmms_eval_itself(monkeypatch, tmp_path):
    pytest.importorskip("lmms_eval")
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PYTHONPATH", installed_plugin(tmp_path / "path"))
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "path")
    run(
        tmp_path / "out",
        "--local",
        "--limit",
        3,
        "--benchmarks",
        "world",
        "--methods",
        "original",
        "rediprune",
    )
    found = {method: cells(tmp_path / "out", "1", "embedded", method) for method in ("original", "rediprune")}
    assert found["original"]["visual tokens"][1] == 288 and found["rediprune"]["visual tokens"][1] == 32
    assert found["original"]["accuracy"][1] > 60 and found["rediprune"]["% of Original"][1] == pytest.approx(
        11.1, abs=0.5
    )
