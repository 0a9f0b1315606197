"""The evaluation script: the same numbers whatever was killed, resumed or shared, controls that control, clear messages."""

import copy
import importlib
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from benchmarking.operations import ratio_of_operations
from evaluation.log import answers_path, claimed, code_fingerprint
from evaluation.questions import CONSTANT_QUERY, OtherQuery, Questions
from evaluation.report import interval, mark_fronts, pareto_front, score
from evaluation.settings import as_setting
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from rediprune.configuration_rediprune import PruningConfig
from repository import FeatureMemory, keep_ratio
from toy_world import HELD_OUT_START, TABLES_START


def evaluate(output, *arguments):
    """Runs the script in this process; returns its report."""
    importlib.import_module("evaluate").main(["--output", str(output), *map(str, arguments)])
    return json.loads(output.with_name(output.name + ".json").read_text())


def refuse(capsys, *arguments):
    """The message with which the script refuses these arguments."""
    with pytest.raises(SystemExit) as error:
        importlib.import_module("evaluate").main([*map(str, arguments)])
    return str(error.value) + capsys.readouterr().err


@pytest.fixture(scope="module")
def loaded():
    model = transformers.AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True).eval()
    return model, transformers.AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture
def count_answers(monkeypatch):
    """A list that grows by one entry for each batch that the model answers."""
    module, batches = importlib.import_module("evaluate"), []
    real = module.answer

    def counted(model, processor, inputs):
        batches.append(len(inputs["input_ids"]))
        if len(batches) == counted.killed_in:
            raise KeyboardInterrupt
        return real(model, processor, inputs)

    counted.killed_in = None
    monkeypatch.setattr(module, "answer", counted)
    counted.batches = batches
    return counted


# -- nothing lost, nothing twice ---------------------------------------------------------------------------------------

SMALL = ("--scenes", 2, "--ratios", 0.25, "--kinds", "video", "--batch", 5, "--threads", 1)


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_batch_where_it_stopped(tmp_path, count_answers):
    whole = evaluate(tmp_path / "whole", *SMALL, "--settings", "rediprune", "random")
    total = len(count_answers.batches)
    assert [row["setting"] for row in whole["rows"]] == ["unpruned", "rediprune", "random"]
    assert whole["rows"][0]["agreement_with_unpruned"] == 1
    assert not list(tmp_path.glob("whole.batches.*")) and total == 3 * 3

    count_answers.batches.clear()
    count_answers.killed_in = 5
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", *SMALL, "--settings", "rediprune", "random")
    count_answers.killed_in = None
    resumed = evaluate(tmp_path / "killed", *SMALL, "--settings", "rediprune", "random")
    assert resumed["rows"] == whole["rows"]
    assert len(count_answers.batches) == total + 1  # the one that was killed

    count_answers.batches.clear()
    assert evaluate(tmp_path / "killed", *SMALL, "--settings", "random")["rows"] == whole["rows"][::2]
    assert not count_answers.batches
    with pytest.raises(SystemExit, match="another run"):
        evaluate(tmp_path / "killed", "--scenes", 3)


@pytest.mark.slow
def test_a_budget_in_tokens_runs_once_and_is_told_as_the_ratio_that_it_comes_to(tmp_path):
    settings = ["--settings", "uniform", "uniform,keep_tokens=9", "--ratios", 0.25, 0.5, *SMALL[4:], "--scenes", 1]
    rows = evaluate(tmp_path / "a", *settings)["rows"]
    told = [(row["setting"], row["keep_ratio"], row["visual_tokens"]) for row in rows]
    assert told == [
        ("unpruned", 1.0, 288.0),
        ("uniform", 0.25, 72.0),
        ("uniform", 0.5, 144.0),
        ("uniform,keep_tokens=9", 0.25, 72.0),
    ]
    assert rows[3]["accuracy"] == rows[1]["accuracy"]


@pytest.mark.slow
def test_a_cut_off_line_is_computed_again(tmp_path, capsys):
    first = evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")
    log = tmp_path / "a.answers.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    assert evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")["rows"] == first["rows"]
    assert "line 3 is incomplete" in capsys.readouterr().err
    assert log.read_text().splitlines()[-1] == lines[2]

    log.write_text('{"scenes": 2, "dt\nmore\n')
    with pytest.raises(SystemExit, match="line 1 .* Choose another --output, or remove that file"):
        evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")


@pytest.mark.slow
def test_processes_share_the_batches_and_give_the_same_answers(tmp_path):
    pytest.importorskip("accelerate")
    arguments = [*map(str, SMALL), "--settings", "rediprune", "random"]
    alone = evaluate(tmp_path / "alone", *arguments)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "scripts" / "evaluate.py")]
    command += ["--output", str(tmp_path / "shared"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    shared = json.loads((tmp_path / "shared.json").read_text())
    assert shared["rows"] == alone["rows"] and shared["environment"]["processes"] == 2
    assert (tmp_path / "shared.answers.jsonl").read_text() == (tmp_path / "alone.answers.jsonl").read_text()
    assert not list(tmp_path.glob("*.batches.*"))


@pytest.mark.slow
def test_answers_of_other_code_are_not_taken_over(monkeypatch, tmp_path):
    evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")
    monkeypatch.setattr(importlib.import_module("evaluate"), "code_fingerprint", lambda *objects: "0" * 16)
    with pytest.raises(
        SystemExit, match="belongs to another run .* where `code` differs, the checkout that began the run"
    ):
        evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")


def test_code_is_what_is_done_in_all_files_of_a_package(monkeypatch, tmp_path):
    (tmp_path / "things_of_a_test.py").write_text("class Thing:\n    pass\n")
    beside = tmp_path / "beside.py"
    beside.write_text('def two():\n    """Two."""\n    return 2\n')
    monkeypatch.syspath_prepend(tmp_path)
    thing = importlib.import_module("things_of_a_test").Thing()
    before = code_fingerprint(thing)
    beside.write_text('"""A file."""\n\n\ndef two():\n    """The number two."""\n    return 2  # as it is named\n')
    assert code_fingerprint(thing) == before
    beside.write_text("def two():\n    return 3\n")
    assert code_fingerprint(thing) != before


@pytest.mark.slow
def test_a_second_run_with_the_same_output_is_refused(tmp_path):
    with claimed(answers_path(tmp_path / "a")):
        with pytest.raises(SystemExit, match="another run is writing to .*a.answers.jsonl; .* choose another --output"):
            evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")
        evaluate(tmp_path / "b", *SMALL, "--settings", "uniform")
    evaluate(tmp_path / "a", *SMALL, "--settings", "uniform")


def test_the_features_of_a_batch_do_not_depend_on_what_came_before(loaded):
    model, processor = loaded
    pictures = torch.rand(5, 3, 96, 96)
    fresh = FeatureMemory(model)(pictures[2:])
    memory = FeatureMemory(model)
    memory(pictures[:4])
    again = memory(pictures[2:])
    assert torch.equal(again["features"], fresh["features"])
    twice = memory(pictures[[2, 3, 2, 4]])["features"]
    assert torch.equal(twice, again["features"][[0, 1, 0, 2]])
    assert memory(pictures.bfloat16())["features"].shape == (5, 144, 128)  # numpy has no such type
    del model.patch_features


def test_threads_that_share_a_memory_get_the_features_of_a_lone_one(loaded):
    model, generator = loaded[0], torch.Generator().manual_seed(0)
    pictures = torch.rand(6, 3, 96, 96, generator=generator)
    batches = [pictures[:3], pictures[2:], pictures[[1, 1, 4]], pictures[:3]] * 3
    alone = [FeatureMemory(model)(batch)["features"] for batch in batches]
    del model.patch_features

    calls, encode = [], model.patch_features
    model.patch_features = lambda *args, **kwargs: (calls.append(1), encode(*args, **kwargs))[1]
    memory, past = FeatureMemory(model), threading.Event()

    def ask(number):
        if number == 0:
            with memory.switched_off():
                past.wait(10)  # until the others have their answers
                return model.patch_features(batches[0])["features"]
        features = memory(batches[number])["features"]
        if len(calls) >= 3:
            past.set()
        return features

    with torch.no_grad(), ThreadPoolExecutor(len(batches)) as pool:
        answers = list(pool.map(torch.no_grad()(ask), range(len(batches))))
    assert all(map(torch.equal, answers[1:], alone[1:]))
    assert len(calls) == 3 + 1  # each batch once, and the one that went past
    del model.patch_features


def test_what_the_tower_is_asked_for_is_part_of_what_is_remembered(loaded):
    model = loaded[0]
    memory, pictures = FeatureMemory(model), torch.rand(2, 3, 96, 96)
    first, last = (memory(pictures, vision_feature_layer=layer)["features"] for layer in (1, -1))
    assert not torch.equal(first, last)
    assert torch.equal(memory(pictures, vision_feature_layer=1)["features"], first)
    del model.patch_features


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_nobody_measures_on_scenes_that_training_or_choices_were_made_on(tmp_path):
    import relevance_study
    from training.recipe import FOLLOWED_SCENES, TRAINING_SCENES

    arguments = ["--output", str(tmp_path / "a")]
    study = relevance_study.parse_arguments(arguments)
    chosen_on = range(study.first_scene, study.first_scene + study.scenes)
    followed = range(FOLLOWED_SCENES.start, FOLLOWED_SCENES.stop + 1000)  # README: final 1000
    tables = importlib.import_module("evaluate").parse_arguments(arguments)
    tables = range(tables.first_scene, tables.first_scene + tables.scenes)
    groups = [TRAINING_SCENES, followed, tables, chosen_on]
    assert all(first.stop <= second.start for first, second in zip(groups, groups[1:]))

    small = Questions("image", 2, first_scene=tables.start)
    assert small.texts == Questions("image", 2).texts != Questions("image", 2, first_scene=followed.start).texts


@pytest.mark.slow
def test_a_report_names_its_scenes(tmp_path):
    first = HELD_OUT_START + 7
    arguments = [*SMALL, "--settings", "uniform"]
    report = evaluate(tmp_path / "a", *arguments, "--first-scene", first)
    assert report["first_scene"] == first and report["command"].endswith(f"--first-scene {first}")
    assert f"about 2 scenes from number {first} on" in (tmp_path / "a.md").read_text()
    assert report["rows"][0]["questions"] == len(Questions("video", 2, first))
    with pytest.raises(SystemExit, match="belongs to another run"):
        evaluate(tmp_path / "a", *arguments)
    assert evaluate(tmp_path / "b", *arguments)["command"].endswith(f"--first-scene {TABLES_START}")


# -- controls and seeds ------------------------------------------------------------------------------------------------


def kept(model, processor, questions, number):
    inputs = questions.inputs(processor, 0, number, 0.25)
    return [medium.kept for medium in model.select_tokens(**inputs)]


@pytest.mark.slow
@torch.inference_mode()
def test_tokens_are_selected_for_another_question(loaded):
    model, processor = loaded
    questions = Questions("video", 2)
    number = len(questions)
    plain = kept(model, processor, questions, number)
    other_query = OtherQuery(model)
    prompts = [processor.tokenizer(questions.prompt(processor, text))["input_ids"] for text in questions.texts]
    other_query.tokens = [ids[ids.index(processor.video_token_id) + 1 :] for ids in prompts]
    assert all(map(torch.equal, kept(model, processor, questions, number), plain))

    other_query.tokens = [questions.query(processor, "constant", index, 0) for index in range(number)]
    assert len(set(map(tuple, other_query.tokens))) == 1
    assert CONSTANT_QUERY in processor.decode(other_query.tokens[0])
    constant = kept(model, processor, questions, number)
    of_scene = [kept for kept, scene in zip(constant, questions.scene_of) if scene == 0]
    assert all(torch.equal(kept, of_scene[0]) for kept in of_scene)
    other_query.tokens = None
    assert all(map(torch.equal, kept(model, processor, questions, number), plain))
    del model.prune_items


@torch.inference_mode()
@pytest.mark.parametrize("method", ["rediprune", "rediprune_plus", "mmtok", "mmtok,words=all", "trim"])
def test_a_control_is_what_every_method_selects_for(tmp_path, method):
    script = importlib.import_module("evaluate")
    texts = [method, f"{method},query=constant"]
    arguments = ["--output", str(tmp_path / "a"), "--settings", *texts, "--pruning", "keep_ratio=1"]
    args = script.parse_arguments(arguments)
    run, questions = script.Evaluation(args, script.Processes(args)), Questions("video", 1)
    choices = []
    for setting in args.settings:
        run.use(setting)
        media = run.model.select_tokens(**run.inputs(questions, setting, (0, len(questions)), 0.25))
        choices.append([medium.kept for medium in media])
    own, constant = choices
    assert all(torch.equal(kept, constant[0]) for kept in constant)
    assert not all(torch.equal(kept, own[0]) for kept in own)


def test_the_words_are_those_of_the_other_question(loaded):
    model, processor = loaded
    module, questions = importlib.import_module("evaluate"), Questions("video", 2)
    caller = copy.copy(processor)
    caller.pruning = PruningConfig(method="mmtok")
    script = SimpleNamespace(model=model, processor=caller, other_query=SimpleNamespace(tokens=None))
    for query, words in (("constant", {"see"}), ("own", None)):
        inputs = module.Evaluation.inputs(
            script, questions, as_setting(f"mmtok,query={query}"), (0, len(questions)), 0.25
        )
        found = {processor.decode(row[row >= 0]).strip() for row in inputs["word_input_ids"]}
        assert found == words if words else len(found) > 2


def test_the_other_question_is_about_another_scene():
    questions = Questions("image", 3)
    drawn = [[questions.text_of_another(index, seed) for index in range(len(questions))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for index, text in enumerate(drawn[0]):
        assert text in np.array(questions.texts)[questions.scene_of != questions.scene_of[index]]


@pytest.mark.slow
def test_what_is_drawn_runs_once_for_each_seed(tmp_path):
    settings = ["rediprune", "rediprune,query=other", "random", "random,seed=1"]
    report = evaluate(tmp_path / "a", *SMALL, "--seeds", 2, "--settings", *settings)
    rows = {row["setting"]: row for row in report["rows"]}
    assert [name for name, row in rows.items() if "accuracy_by_seed" in row] == ["rediprune,query=other", "random"]
    assert rows["random"]["accuracy"] == pytest.approx(np.mean(rows["random"]["accuracy_by_seed"]))
    assert rows["random"]["accuracy_by_seed"][1] == rows["random,seed=1"]["accuracy"]
    assert "mean of 2 seeds" in (tmp_path / "a.md").read_text()


@pytest.mark.slow
def test_controls_are_scored_against_the_original_question(tmp_path):
    report = evaluate(tmp_path / "a", *SMALL, "--settings", "rediprune,query=constant")
    assert report["rows"][1]["by_type"]["colour"]["accuracy"] > 0.5


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_score_is_the_mean_over_seeds():
    types, scenes = np.array(["a", "b", "a"]), np.array([0, 0, 1])
    row = score(["x", "y", "z"], types, scenes, [["x", "y", "-"], ["x", "-", "-"]], ["x", "y", "q"])
    assert row["accuracy"] == pytest.approx(0.5) and row["accuracy_by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert row["agreement_with_unpruned"] == pytest.approx(0.5)
    assert row["by_type"]["a"]["accuracy"] == pytest.approx(0.5) and row["by_type"]["a"]["questions"] == 2
    assert row["by_type"]["b"]["low"] == row["by_type"]["b"]["high"] == 0.5


def test_the_interval_resamples_scenes():
    right, scenes = np.repeat([1.0, 0.0], 50), np.repeat([0, 1], 50)
    wide = interval(right, scenes)
    assert (wide["low"], wide["high"]) == (0, 1)
    narrow = interval(right, np.arange(100))
    assert 0.35 < narrow["low"] < 0.5 < narrow["high"] < 0.65


def test_agreement_is_with_the_unpruned_model_and_not_with_the_right_answers():
    types, scenes = np.array(["a"] * 4), np.arange(4)
    row = score(["x"] * 4, types, scenes, [["x", "y", "y", "y"]], ["y", "y", "y", "z"])
    assert (row["accuracy"], row["agreement_with_unpruned"]) == (0.25, 0.5)


def test_the_interval_holds_95_percent():
    found = interval(np.tile([1.0, 0.0], 200), np.arange(400))
    half_width = (
        1.96 * 0.5 / 20
    )  # of a share of one half in 400 independent scenes; 90 % would be 1.645 * 0.5 / 20 = 0.041
    assert found["low"] == pytest.approx(0.5 - half_width, abs=0.004)
    assert found["high"] == pytest.approx(0.5 + half_width, abs=0.004)


def test_every_question_counts_the_same_however_many_its_scene_has():
    """Half of the scenes have nine questions, all right, the others one, wrong: the mean of scene shares would be one half."""
    scenes = np.repeat(np.arange(400), np.tile([9, 1], 200))
    right = np.isin(scenes % 2, 0).astype(float)
    found = interval(right, scenes)
    assert found["accuracy"] == 0.9 and 0.87 < found["low"] < 0.9 < found["high"] < 0.93


def test_pareto_front():
    assert pareto_front([1, 2, 3, 2, 2], [0.5, 0.7, 0.7, 0.4, 0.7]) == [True, True, False, False, True]
    rows = [{"kind": "video", "accuracy": a, "time": {"seconds_per_question": t}} for a, t in ((0.5, 1), (0.4, 2))]
    mark_fronts(rows)
    assert [row["on_pareto_front"] for row in rows] == [True, False]


@pytest.mark.slow
def test_times_include_the_vision_tower_and_are_kept(monkeypatch, tmp_path, count_answers):
    encoded = []
    monkeypatch.setattr(
        transformers.models.clip.modeling_clip.CLIPVisionEmbeddings,
        "forward",
        lambda self, pixels, *args, real=transformers.models.clip.modeling_clip.CLIPVisionEmbeddings.forward, **kwargs: (
            encoded.append(len(pixels)) or real(self, pixels, *args, **kwargs)
        ),
    )
    arguments = [*SMALL, "--settings", "uniform"]
    evaluate(tmp_path / "a", *arguments)
    encoded.clear()
    count_answers.batches.clear()
    report = evaluate(tmp_path / "a", *arguments, "--time", 1, "--plots")
    batches = count_answers.batches
    # Every frame of every question, after the one whose operations are counted.
    assert len(batches) == 3 * 2 and encoded[-6:] == [8 * questions for questions in batches]
    assert all(row["time"]["rounds"] == 1 and row["time"]["seconds_per_question"] > 0 for row in report["rows"])
    assert all((tmp_path / f"a.video-{name}.png").stat().st_size > 1000 for name in ("tokens", "time"))
    assert "the vision tower included" in (tmp_path / "a.md").read_text()
    batches.clear()
    again = evaluate(tmp_path / "a", *arguments, "--time", 1)
    assert again["rows"] == report["rows"] and not batches


def test_visual_tokens_are_counted(loaded):
    processor = loaded[1]
    assert Questions("video", 1).visual_tokens(processor, 1.0, 0) == 8 * 36
    assert Questions("video", 1).visual_tokens(processor, 0.25, 2) == 8 * 9


@pytest.mark.slow
def test_costs_of_what_leaves_inside_the_language_model(tmp_path):
    two_stages = "uniform,inner_method=fastv,inner_keep_ratio=0.125"
    arguments = ["--scenes", 1, "--kinds", "video", "--threads", 1]
    rows = evaluate(tmp_path / "a", *arguments, "--ratios", 0.25, "--settings", "uniform", "fastv", "vtw", two_stages)[
        "rows"
    ]
    told = {row["setting"]: (row["keep_ratio"], row["visual_tokens"], row["inner_tokens"]) for row in rows}
    assert told == {
        "unpruned": (1, 288, None),
        "uniform": (0.25, 72, None),
        "fastv": (0.25, 288, 72),
        two_stages: (0.25, 72, 36),
        "vtw": (0, 288, 0),  # once, whatever the ratios are
    }
    shares = {row["setting"]: row["share_of_operations"] for row in rows}
    assert shares["unpruned"] == 1
    assert shares[two_stages] < shares["uniform"] < shares["fastv"] < 0.6  # two of five layers see all tokens
    assert "| fastv | 0.25 | 288.0, then 72.0 |" in (tmp_path / "a.md").read_text()


@pytest.mark.slow
def test_equal_operations(tmp_path, capsys):
    two_stages = "uniform,inner_method=fastv,inner_keep_ratio=0.05"
    arguments = ["--scenes", 1, "--kinds", "video", "--threads", 1, "--operations", 0.5, 0.3]
    rows = evaluate(tmp_path / "a", *arguments, "--settings", "uniform", "fastv", two_stages)["rows"]
    told = [row["setting"] for row in rows]
    assert told == ["unpruned", "uniform", "fastv", two_stages, "uniform", two_stages]
    assert [row.get("asked_operations") for row in rows] == [None, 0.5, 0.5, 0.5, 0.3, 0.3]
    assert "fastv cannot take 0.3 of the unpruned operations: left out" in capsys.readouterr().err
    by_formula_and_counted = zip([0.5, 0.5, None, 0.3, 0.3], rows[1:])
    assert all(abs(row["share_of_operations"] - share) < 0.02 for share, row in by_formula_and_counted if share)
    assert (
        rows[3]["keep_ratio"] == 1 and rows[3]["share_of_operations"] < 0.5
    )  # with a second stage it never takes half


@given(st.floats(0.001, 0.999), st.floats(0, 0.5))
def test_the_ratio_of_a_number_of_operations(share, fixed):
    operations = lambda ratio: fixed + (1 - fixed) * (ratio + ratio**2) / 2  # noqa: E731
    ratio = ratio_of_operations(share, operations)
    if ratio is None:
        assert operations(1e-4) > share
    else:
        assert operations(ratio) <= share < operations(ratio + 1e-4)


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ratios", "0.5", "half"], "'half' is not a keep ratio: give numbers in (0, 1]"),
        (["--ratios", "nan"], "'nan' is not a keep ratio"),
        (["--ratios", "0"], "'0' is not a keep ratio"),
        (["--ratios", "1/0"], "'1/0' is not a keep ratio"),
        (["--settings", "magic"], "'magic': pruning key 'method' is 'magic', but must be one of 'rediprune'"),
        (["--settings", "rediprune,alpha"], "'alpha' is not KEY=VALUE"),
        (["--settings", "rediprune,alhpa=2"], "unknown pruning key 'alhpa'; allowed keys"),
        (["--settings", "rediprune,keep_ratio=0.3"], "give the keep ratio as --ratios 0.3"),
        (["--settings", "rediprune,query=mine"], "query is 'mine', but must be one of own, other, constant"),
        (["--settings", "uniform,query=other"], "does not look at the question; leave query=other out"),
        (["--settings", "rediprune,query=other", "--scenes", "1"], "give at least --scenes 2"),
        (["--seeds", "0"], "'0' is not a number of at least 1"),
        (["--scenes", "many"], "'many' is not a number of at least 1"),
        (
            ["--first-scene", "5"],
            "--first-scene 5 --scenes 300: held-out scenes have the numbers 1000000000 to 1999999999",
        ),
        (["--first-scene", "1999999990"], "--first-scene 1999999990 --scenes 300: held-out scenes"),
        (["--first-scene", "first"], "invalid int value: 'first'"),
    ],
)
def test_evaluate_says_what_is_wrong(capsys, tmp_path, arguments, message):
    assert message in refuse(capsys, "--output", tmp_path / "a", *arguments)


def test_evaluate_says_at_once_where_it_cannot_write(capsys, tmp_path):
    assert "is a folder; name the files in it" in refuse(capsys, "--output", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot write to" in refuse(capsys, "--output", tmp_path / "file" / "a")


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read"),
        ('{"rows": [{"kind"', "is not a whole JSON file"),
        ("[]", "has no rows"),
        ('{"rows": [{"kind": "video"}]}', "row 0 lacks accuracy, high, keep_ratio"),
    ],
)
def test_plots_say_what_is_wrong_with_a_report(tmp_path, text, message):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("evaluate_plots").read_report(path)


def test_plots_of_a_report_without_token_counts(tmp_path):
    plots = importlib.import_module("evaluate_plots")
    report = plots.read_report(ROOT / "docs" / "results" / "ablation-image.json")
    for row in report["rows"]:
        row.pop("visual_tokens", None)
    (path,) = plots.draw_plots(report, tmp_path / "a")
    assert path.name == "a.image-tokens.png" and path.exists()


@pytest.mark.parametrize("kept", range(1, 36))
def test_a_fraction_keeps_as_many_jointly_as_frame_by_frame(kept):
    ratio = keep_ratio(f"{kept}/36")
    count = PruningConfig(keep_ratio=ratio).count
    assert count(8 * 36) == 8 * count(36) == 8 * kept


def test_many_settings_get_a_panel_for_each_way_to_number_tokens():
    plots = importlib.import_module("evaluate_plots")
    names = [f"rediprune,alpha={number},positions={which}" for number in range(8) for which in ("compact", "original")]
    names += ["rediprune", "rediprune_plus"]  # as the method has them
    rows = [
        {"setting": name, "keep_ratio": ratio, "accuracy": ratio + 0.01 * names.index(name)}
        for name in names
        for ratio in (0.5, 0.1)
    ]
    panels = plots._panels([{"setting": "unpruned", "keep_ratio": 1, "accuracy": 1}, *rows])
    assert set(panels) == {"compact positions", "original positions"}
    assert list(panels["original positions"])[:2] == ["rediprune_plus", "rediprune,alpha=7"]  # best first
    assert list(panels["compact positions"])[0] == "rediprune"
    assert [row["keep_ratio"] for row in panels["compact positions"]["rediprune,alpha=3"]] == [0.1, 0.5]
    assert "rediprune,alpha=0,positions=compact" in plots._panels(rows[:20])[""]


def test_of_close_ticks_the_most_frequent_has_a_text():
    labelled = importlib.import_module("evaluate_plots")._labelled
    assert labelled([14, 16, 16, 29, 32, 32, 72]) == ([14, 16, 29, 32, 72], ["14", "16", "", "32", "72"])
