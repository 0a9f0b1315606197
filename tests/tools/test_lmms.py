"""lmms-eval: the local task, the plug-in and the tables; the run itself where lmms-eval is installed."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation.questions import Questions
from exporting import run as export_variant
from families import FAMILIES
from make_lmms_task import TASKS, write_task
from places import ROOT
from plugin import PLUGIN, installed_plugin
from rediprune.inputs_video import read_video


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, 2)
    return folder


def utils_of(folder):
    spec = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def docs_of(folder):
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


# -- the task ----------------------------------------------------------------------------------------------------------


def test_the_task_asks_what_evaluate_asks_about_the_same_frames(task):
    questions, docs = Questions("video", 2), docs_of(task)
    assert [doc["question"] for doc in docs] == questions.texts
    assert [doc["answer"] for doc in docs] == questions.answers
    utils = utils_of(task)
    for index, doc in enumerate(docs):
        (path,) = utils.doc_to_visual(doc)
        frames, _ = read_video(path, lambda total, fps: np.arange(total))
        assert np.array_equal(frames, questions.media(index))


def test_the_yaml_names_the_questions_and_every_type(task):
    yaml = (task / "rediprune_world.yaml").read_text()
    assert json.dumps(str(task / "questions.jsonl")) in yaml and "QUESTIONS_FILE" not in yaml
    assert all(f"metric: accuracy_{doc['type']}\n" in yaml for doc in docs_of(task))
    result = utils_of(task).process_results({"answer": "red", "type": "colour"}, [" red "])
    assert result == {"accuracy": 1.0, "accuracy_colour": 1.0}


def test_a_task_about_images(tmp_path):
    """The same questions as evaluate's, about the very pixels."""
    write_task(tmp_path, 2, kind="image")
    questions, utils = Questions("image", 2), utils_of(tmp_path)
    assert [doc["question"] for doc in docs_of(tmp_path)] == questions.texts
    for index, doc in enumerate(docs_of(tmp_path)):
        (image,) = utils.doc_to_visual(doc)
        assert image.mode == "RGB" and np.array_equal(image, questions.media(index))
    assert "\ntask: rediprune_world_image\n" in (tmp_path / "rediprune_world_image.yaml").read_text()


@pytest.mark.parametrize("kind, file", [("video", "00000.mkv"), ("image", "00000.png")])
def test_a_task_folder_without_its_media_says_so(tmp_path, kind, file):
    write_task(tmp_path, 1, kind=kind)
    (tmp_path / f"{kind}s" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of its 1 {kind}s .* write it again with"):
        utils_of(tmp_path).doc_to_visual(docs_of(tmp_path)[0])


# -- the tables --------------------------------------------------------------------------------------------------------


def results(folder, date="1", model_args="pretrained=x", **tasks):
    folder.mkdir(exist_ok=True)
    named = {task: {f"{metric},none": value for metric, value in figures.items()} for task, figures in tasks.items()}
    content = {"results": named, "config": {"model": "huggingface", "model_args": model_args}, "date": date}
    (folder / f"{date}_results.json").write_text(json.dumps(content))
    return folder


def lmms_table(*arguments):
    importlib.import_module("lmms_table").main([*map(str, arguments)])


def test_the_table_sets_runs_side_by_side(tmp_path):
    results(
        tmp_path / "full", gqa={"exact_match": 0.5, "exact_match_stderr": 0.01}, mme={"mme_perception_score": 1400.0}
    )
    results(tmp_path / "pruned", gqa={"exact_match": 0.3})
    results(tmp_path / "pruned", date="2", gqa={"exact_match": 0.4, "exact_match_stderr": "N/A"}, own={"score": 3})
    batch = {"seconds": 0.5, "requests": 2, "visual_tokens": 44, "prompt_tokens": 60, "new_tokens": 4}
    times = {"batches": [batch], "device": "cpu", "dtype": "float32", "pruning": {}}
    (tmp_path / "pruned" / "times.json").write_text(json.dumps(times))
    runs = [f"unpruned={tmp_path / 'full'}", f"kept 0.15={tmp_path / 'pruned'}"]
    lmms_table("--output", tmp_path / "table", *runs)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| run | GQA | MME perception | own score | visual tokens | ms a request |"
    assert lines[2] == "| unpruned | 50.00 ± 1.00 | 1400.00 | not run |  |  |"
    assert lines[3] == "| kept 0.15 | 40.00 (80.0%) | not run | 3.00 | 22.0 | 250.0 |"
    assert json.loads((tmp_path / "table.json").read_text())[1]["tasks"]["gqa"]["exact_match"]["value"] == 0.4


def test_the_table_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half_results.json").write_text('{"results": {"gqa"')
    (tmp_path / "other_results.json").write_text("{}")
    wrong = {
        "runs/a": "'runs/a' is not NAME=PATH",
        f"a={tmp_path / 'missing'}": "a: there is no",
        f"a={tmp_path / 'empty'}": "holds no \\*_results.json; give",
        f"a={tmp_path / 'half_results.json'}": "is not a whole JSON file",
        f"a={tmp_path / 'other_results.json'}": "has no results; give",
    }
    for run, message in wrong.items():
        with pytest.raises(SystemExit, match=message):
            lmms_table("--output", tmp_path / "table", run)
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize("kind, task_name", [("video", "rediprune_world"), ("image", "rediprune_world_image")])
def test_answers_are_compared_one_by_one(tmp_path, kind, task_name):
    compare = importlib.import_module("lmms_compare")
    results(tmp_path / "run", **{task_name: {"accuracy": 0.5}})
    samples = [{"doc_id": 1, "filtered_resps": "b"}, {"doc_id": 0, "filtered_resps": " a "}]
    (tmp_path / "run" / f"1_samples_{task_name}.jsonl").write_text("\n".join(map(json.dumps, samples)))
    cell = {"kind": kind, "setting": "rediprune", "keep_ratio": 0.15, "answers": ["a", "c"]}
    (tmp_path / "a.answers.jsonl").write_text(f"{{}}\n{json.dumps(cell)}\n")
    (tmp_path / "questions.jsonl").write_text('{"answer": "a"}\n{"answer": "c"}\n')
    pair = ["--pair", tmp_path / "run", tmp_path / "a.answers.jsonl", "rediprune"]
    arguments = ["--output", tmp_path / "out", "--kind", kind, "--questions", tmp_path / "questions.jsonl", *pair]
    compare.main([*map(str, arguments), "0.15"])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["accuracy"] == {"lmms-eval": 0.5, "evaluate.py": 1.0} and row["same_answers"] == 1
    with pytest.raises(SystemExit, match=f"has no {kind}s with rediprune 0.3; it has: rediprune 0.15"):
        compare.main([*map(str, arguments), "0.3"])


# -- lmms-eval itself --------------------------------------------------------------------------------------------------


def test_the_plugin_names_its_entry_point():
    text = (PLUGIN / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nrediprune = "rediprune_lmms_eval:manifest"' in text
    code = (PLUGIN / "rediprune_lmms_eval" / "__init__.py").read_text()
    assert "def manifest()" in code and '"rediprune_lmms_eval.model.ReDiPrune"' in code
    assert "class ReDiPrune(Huggingface)" in (PLUGIN / "rediprune_lmms_eval" / "model.py").read_text()


def lmms_eval(folder, task, model, model_args, search_path="", name="rediprune_world"):
    """Runs lmms-eval on the task; returns its answers in the order of the questions."""
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "eval",
        "--model",
        model,
        "--model_args",
        model_args,
        "--device",
        "cpu",
    ]
    command += ["--include_path", str(task), "--tasks", name, "--batch_size", "1", "--log_samples"]
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    variables["PYTHONPATH"] = search_path
    command += ["--output_path", str(folder / model)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    files = list((folder / model).rglob("*samples*.jsonl"))
    assert result.returncode == 0 and files, result.stderr[-3000:]
    samples = [json.loads(line) for line in files[0].read_text().splitlines()]
    return [sample["filtered_resps"].strip() for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def evaluate(output, *arguments):
    command = ["--output", str(output), "--scenes", "2", "--kinds", "video", *arguments]
    importlib.import_module("evaluate").main(command)
    lines = output.with_name(output.name + ".answers.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["answers"]


def test_lmms_eval_gets_the_answers_of_evaluate(tmp_path, task):
    pytest.importorskip("lmms_eval")
    arguments = ["--batch", "1", "--dtype", "bfloat16", "--ratios", "0.15", "--settings", "rediprune"]
    expected = evaluate(tmp_path / "plain", *arguments)
    model_args = f"pretrained={ROOT},trust_remote_code=True,device_map=cpu"
    assert lmms_eval(tmp_path, task, "huggingface", model_args) == expected


def test_the_plugin_takes_ratio_method_and_frames(tmp_path, task):
    pytest.importorskip("lmms_eval")
    arguments = ["--batch", "1", "--ratios", "0.25", "--settings", "divprune,scope=frame,positions=original"]
    expected = evaluate(tmp_path / "plugin", *arguments)
    model_args = f"pretrained={ROOT},keep_ratio=0.25,method=divprune,scope=frame,positions=original,dtype=float32"
    model_args += f",num_frames=8,revision=main,times={tmp_path / 'times' / 'times.json'}"
    assert lmms_eval(tmp_path, task, "rediprune", model_args, installed_plugin(tmp_path)) == expected
    times = json.loads((tmp_path / "times" / "times.json").read_text())
    assert times["requests"] == len(times["batches"]) == len(expected)
    assert times["visual_tokens_per_request"] == 8 * 9 and times["pruning"]["scope"] == "frame"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_answers_in_lmms_eval(family, tmp_path):
    """Offline, through lmms-eval's own model and through the plug-in: about videos where it takes them, else about images."""
    pytest.importorskip("lmms_eval")
    kind = family.kinds[-1]
    (tmp_path / "base").mkdir()
    export_variant(
        family.save_stock_checkpoint(tmp_path / "base"), "--keep-ratio", 0.25, "--output", tmp_path / "variant"
    )
    write_task(tmp_path / "task", 1, kind=kind)
    model_args = f"pretrained={tmp_path / 'variant'},device_map=cpu"
    (tmp_path / "path").mkdir()
    answers = [
        lmms_eval(tmp_path, tmp_path / "task", model, f"{model_args},{more}", search_path, TASKS[kind])
        for model, more, search_path in (
            ("huggingface", "trust_remote_code=True", ""),
            ("rediprune", f"times={tmp_path / 'times.json'}", installed_plugin(tmp_path / "path")),
        )
    ]
    assert answers[0] == answers[1] and len(answers[0]) == len(docs_of(tmp_path / "task"))
    times = json.loads((tmp_path / "times.json").read_text())
    processor = family.processor_class.from_pretrained(tmp_path / "variant")
    media = Questions(kind, 1).media(0)
    ids = processor(text=f"<{kind}>", **{f"{kind}s": [media]})["input_ids"]
    assert times["visual_tokens_per_request"] == (ids == getattr(processor, f"{kind}_token_id")).sum()


def test_the_installed_package_knows_the_tasks_and_metrics():
    lmms_package = pytest.importorskip("lmms_eval")
    folder = Path(lmms_package.__file__).parent / "tasks"
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.yaml")]
    asked = re.findall(r"^run (\w+) +#", (ROOT / "docs" / "lmms-eval.md").read_text(), re.MULTILINE)
    assert len(asked) == 9
    for task in (*asked, "mmbench_en_dev_static"):
        assert any(re.search(rf'^(task|group): "?{task}"?\s*$', text, re.MULTILINE) for text in texts), task
    for task, metric, *_ in importlib.import_module("lmms_table").COLUMNS:
        if not task.startswith("rediprune_world"):
            (text,) = [text for text in texts if re.search(rf'^task: "?{task}"?\s*$', text, re.MULTILINE)]
            assert f"metric: {metric}\n" in text, (task, metric)
