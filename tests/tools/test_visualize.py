"""The contact sheet and the page of what stays: numbers against the processor and the model, and the page in a browser."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import torch
import visualize
from browser import Browser, find_browser
from drawing.colours import HEAT, ORDER, colour_of
from drawing.sheet import wrapped
from drawing.trace import PreparedMedia, ratio_grid, trace
from media import add_media_arguments, process, read_media
from PIL import Image, ImageFont
from places import ROOT
from repository import FeatureMemory, add_model_arguments, load, parse_setting

SAMPLES = ROOT / "samples"
VIDEO = ["--video", str(SAMPLES / "video-1.mp4")]
IMAGE = ["--image", str(SAMPLES / "image-1.png")]
IMAGES = ["--image", str(SAMPLES / "image-1.png"), str(SAMPLES / "image-2.png")]
QUESTION, OTHER = "what colour is the square?", "where is the green star?"
NASTY = "is there </script><b>\"a\" & 'b'</b> <!-- ${1} {{DATA}} ?"


@pytest.fixture(scope="module")
def loaded():
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    model, processor = load(parser.parse_args([]))
    FeatureMemory(model)
    return model, processor, model.config.pruning


class Case:
    """Media with the model's pruning set to a method."""

    def __init__(self, loaded, media, setting):
        parser = argparse.ArgumentParser()
        add_media_arguments(parser)
        self.model, self.processor, base = loaded
        self.args, self.setting = parser.parse_args(media), setting
        self.media = read_media(self.args)
        self.pruning = type(base).from_value({**base.to_dict(), **parse_setting(setting)})
        self.prepared = PreparedMedia(self.args, self.model, self.processor, self.media)

    def processed(self, ratio, question=QUESTION):
        self.processor.pruning = self.model.config.pruning = self.pruning
        return process(self.args, self.processor, self.media, question, ratio)

    def trace(self, ratios=(0.1, 0.25), steps=144, question=QUESTION):
        ratios = ratio_grid(self.model, self.prepared, self.pruning, ratios, steps)
        return trace(self.model, self.prepared, question, self.setting, self.pruning, ratios)


@pytest.mark.parametrize("media", [VIDEO, IMAGE, IMAGES], ids=["video", "image", "images"])
@pytest.mark.parametrize(
    "setting", ["rediprune", "rediprune_plus", "divprune", "prumerge_plus", "rediprune,video_pooling=false"]
)
def test_prompts_are_those_of_the_processor(loaded, media, setting):
    case = Case(loaded, media, setting)
    for ratio in (0.1, 0.5, 1.0):
        expected = case.processed(ratio)
        got = case.prepared.inputs(QUESTION, case.pruning.with_budget(ratio))
        assert expected["input_ids"].tolist() == got["input_ids"].tolist()
        assert expected["attention_mask"].tolist() == got["attention_mask"].tolist()


@pytest.mark.parametrize("media", [VIDEO, IMAGE, IMAGES], ids=["video", "image", "images"])
@pytest.mark.parametrize(
    "setting",
    [
        "rediprune",
        "rediprune_plus",
        "divprune",
        "visionzip",
        "trim",
        "random",
        "mmtok",
        "rediprune,video_pooling=false",
    ],
)
def test_a_trace_says_what_the_model_keeps(loaded, media, setting):
    case = Case(loaded, media, setting)
    item = case.trace(steps=12)
    for ratio in (0.1, 0.25):
        start = 0
        kept = []
        for medium in case.model.select_tokens(**case.processed(ratio)):
            kept += [start + int(index) for index in medium.kept]
            start += medium.layout.num_tokens
        assert np.flatnonzero(item.masks[item.step(ratio)]).tolist() == sorted(kept)
        assert item.counts[item.step(ratio)] == len(kept)
    assert item.num_tokens == start == sum(height * width for height, width in item.grids)
    assert item.masks[-1].all() and item.ratios[-1] == 1
    assert len(case.prepared.panels()) == len(item.grids)


def picks_of(features, relevance, alpha):
    """The greedy rule of ReDiPrune, one token after the other."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    picks = [int(relevance.argmax())]
    while len(picks) < len(features):
        score = distance[:, picks].amin(1) + alpha * relevance
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
    return picks


@pytest.mark.parametrize("media", [VIDEO, IMAGE], ids=["video", "image"])
def test_where_a_trace_is_exact_its_ranks_are_the_order_of_the_picks(loaded, media):
    case = Case(loaded, media, "rediprune")
    item = case.trace()
    assert item.exact
    (kept,) = case.model.select_tokens(**case.processed(0.25), return_signals=True)
    shown = [pair for tokens in kept.signals for pair in zip(tokens.features, tokens.relevance)]
    for (features, relevance), part in zip(shown, item.set_slices, strict=True):
        expected = picks_of(features.float(), relevance, case.pruning.alpha)
        assert item.rank[part].argsort().tolist() == expected
        assert np.allclose(item.look[part], relevance)


@pytest.mark.parametrize(
    "setting, steps, nested, exact",
    [
        ("divprune,scope=frame", 144, True, True),
        ("scope", 144, True, True),
        ("random", 144, True, True),
        ("divprune", 144, True, False),  # two tokens come in at each stop, from all frames together
        pytest.param("divprune", 288, True, True, marks=pytest.mark.slow),
        pytest.param("rediprune_plus", 288, True, True, marks=pytest.mark.slow),
        ("uniform", 144, False, False),
        ("rediprune,candidate_pool=algorithm1", 144, False, False),
    ],
)
def test_an_order_is_claimed_only_where_there_is_one(loaded, setting, steps, nested, exact):
    item = Case(loaded, VIDEO, setting).trace(steps=steps)
    assert (item.nested, item.exact) == (nested, exact)
    assert item.joint == (setting in ("divprune", "rediprune_plus"))
    for token in range(0, item.num_tokens, 17):
        steps = np.flatnonzero(item.masks[:, token])
        assert item.entry[token] == steps[0]
        assert not nested or steps.tolist() == list(range(steps[0], len(item.ratios)))
    if exact:
        in_a_set = 288 if item.joint else 36
        assert all(sorted(item.rank[part]) == list(range(1, in_a_set + 1)) for part in item.set_slices)


@pytest.mark.parametrize("media", [VIDEO, IMAGES], ids=["video", "images"])
def test_what_a_method_looks_at_is_at_its_token(loaded, media):
    item = Case(loaded, media, "trim").trace(steps=36)
    assert item.look_name == "relevance"
    step = item.step(0.25)
    for part in item.set_slices:  # TRIM keeps the most relevant tokens, and one at the place of the last of the others
        kept = item.masks[step][part]
        chosen = np.sort(item.look[part][kept])[1:]
        assert chosen.min() >= np.sort(item.look[part][~kept])[-1] - 1e-5
    names = {
        "rediprune_plus": "relevance",
        "visionzip": "cls_attention",
        "mmtok": "text_affinity",
        "uniform": None,
        "evoprune": None,
    }
    for setting, name in names.items():
        item = Case(loaded, media, setting).trace(steps=4)
        assert item.look_name == name and (item.look is None) == (name is None)


def test_the_vision_tower_runs_once_for_all_ratios_and_questions(loaded, monkeypatch):
    case, calls = Case(loaded, VIDEO, "rediprune"), []
    real = type(case.model).patch_features.__get__(case.model)
    monkeypatch.setattr(case.model, "patch_features", real)
    FeatureMemory(case.model)
    tower = case.model.model.vision_tower
    hook = getattr(tower, "vision_model", tower).embeddings.register_forward_hook(lambda *_: calls.append(1))
    case.trace(steps=6)
    case.trace(steps=6, question=OTHER)
    hook.remove()
    assert len(calls) == 1


def test_colour_maps_go_from_one_lightness_to_the_other():
    for palette, sign in ((HEAT, 1), (ORDER, -1)):
        luma = palette @ np.array([0.2126, 0.7152, 0.0722])
        assert (sign * np.diff(luma) > 0).all()
    values = np.array([[0.0, 0.5], [1.0, 2.0]])
    assert colour_of(values, HEAT, 0, 1).shape == (2, 2, 3)
    assert (colour_of(values, HEAT, 0, 1)[1, 1] == HEAT[-1]).all()
    assert (colour_of(np.ones(3), HEAT, 1, 1) == HEAT[0]).all()


def test_long_questions_are_wrapped_and_cut():
    font = ImageFont.load_default(17)
    lines = wrapped("word " * 60 + "x" * 300, font, 200, lines=3)
    assert len(lines) == 3 and lines[-1].endswith("\u2026")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert wrapped("", font, 200, lines=3) == []
    assert wrapped("x" * 300, font, 200, lines=3)[0].endswith("\u2026")


def run(*arguments):
    visualize.main([*map(str, arguments)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of one run with two questions and three methods."""
    prefix = tmp_path_factory.mktemp("visualize") / "deep" / "kept"
    arguments = [*VIDEO, "--output", str(prefix), "--questions", QUESTION, NASTY]
    arguments += ["--methods", "rediprune", "divprune", "visionzip"]
    run(*arguments)
    return {ending: prefix.with_name("kept" + ending) for ending in visualize.ENDINGS}


@pytest.mark.slow
def test_one_run_writes_a_sheet_a_page_and_the_numbers(written, loaded):
    record = json.loads(written[".json"].read_text())
    assert len(record["traces"]) == 6 and len(record["panels"]) == 8
    first = record["traces"][0]
    assert first["question"] == QUESTION and first["method"] == "rediprune" and first["order_is_exact"]
    case = Case(loaded, VIDEO, "rediprune")
    (medium,) = case.model.select_tokens(**case.processed(0.25))
    assert first["kept"]["0.25"]["indices"] == [frame.tolist() for frame in medium.layout.split(medium.kept)]
    assert len(first["scores"]) == len(first["rank"]) == 8 and len(first["scores"][0]) == 36
    assert record["traces"][1]["scores"] is None
    width, height = Image.open(written[".png"]).size
    assert 1000 < width < 1400 and height > 1000
    assert not list(written[".png"].parent.glob("*.part"))


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself(written):
    page = written[".html"].read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert page.count("</script>") == 2 and NASTY not in page
    assert len(page) < 700_000


@pytest.mark.slow
@pytest.mark.parametrize("media", [IMAGE, IMAGES, [*VIDEO, "--num-frames", "3"]], ids=["image", "images", "short"])
@pytest.mark.parametrize("questions", [["what?"], ["", "where is <video>?"], ["one?", "two?", "three?"]], ids=len)
def test_sheets_of_other_shapes(tmp_path, media, questions):
    run(
        *media,
        "--output",
        tmp_path / "kept.png",
        "--questions",
        *questions,
        "--ratios",
        0.2,
        "--steps",
        6,
        "--methods",
        "rediprune,alpha=2",
        "evoprune",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.html", "kept.json", "kept.png"]
    record = json.loads((tmp_path / "kept.json").read_text())
    assert record["traces"][0]["pruning"]["alpha"] == 2 and len(record["traces"]) == 2 * len(questions)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--methods": ["magic"]}, "'magic'"),
        ({"--methods": ["rediprune,alpha"]}, "'alpha' is not KEY=VALUE"),
        ({"--methods": ["rediprune,alpha=x"]}, "alpha"),
        ({"--pruning": ["beta=1"]}, "beta"),
        ({"--ratios": ["1.5"]}, "'1.5' is not a keep ratio"),
        ({"--ratios": ["nan"]}, "'nan' is not a keep ratio"),
        ({"--ratios": ["half"]}, "'half' is not a keep ratio"),
        ({"--steps": ["0"]}, "--steps 0"),
        ({"--width": ["-3"]}, "--width -3"),
        ({"--questions": None}, "--questions"),
        ({"--video": ["missing.mp4"]}, "no video file at 'missing.mp4'"),
        ({"--video": [str(SAMPLES / "questions.json")]}, "cannot be decoded as a video"),
        ({"--video": None, "--image": ["missing.png"]}, "missing.png cannot be read as an image"),
        ({"--output": [str(SAMPLES)]}, "is a folder"),
        ({"--output": [str(SAMPLES / "questions.json" / "kept")]}, "cannot write to"),
        ({"--output": ["/proc/nothing/kept"]}, "cannot write to"),
    ],
)
def test_it_says_what_is_wrong(capsys, tmp_path, change, message):
    options = {"--video": VIDEO[1:], "--output": [str(tmp_path / "kept")], "--questions": ["what?"], **change}
    with pytest.raises(SystemExit) as error:
        run(*(part for name, values in options.items() if values is not None for part in (name, *values)))
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_browser()
    if executable is None or os.name != "posix":
        pytest.skip("no Chromium here: install one to check the page in it")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, written):
    browser.problems.clear()
    browser.requests.clear()
    browser.resize(1280, 800)
    browser.open(written[".html"].as_uri())
    yield browser
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [written[".html"].as_uri()]


def drawn(browser, side=0):
    return browser.evaluate(f"document.querySelectorAll('.side')[{side}].querySelectorAll('rect.kept').length")


def choose(browser, side, key, index):
    browser.evaluate(
        f"""(() => {{ const box = document.querySelectorAll('.side')[{side}].querySelector('[data-key={key}]');
        box.value = {index}; box.dispatchEvent(new Event('change')); }})()"""
    )


@pytest.mark.slow
@pytest.mark.parametrize("index, setting", list(enumerate(["rediprune", "divprune", "visionzip"])))
def test_the_slider_draws_as_many_patches_as_the_processor_counts(opened, loaded, index, setting):
    case = Case(loaded, VIDEO, setting)
    for side in (0, 1):
        choose(opened, side, "method", index)
    ratios = opened.evaluate("data.ratios")
    assert opened.evaluate("Number(document.getElementById('ratio').max)") == len(ratios) - 1 == 288  # DivPrune's set
    for stop in range(0, len(ratios), 32):
        opened.evaluate(
            f"""(() => {{ const box = document.getElementById('ratio');
            box.value = {stop}; box.dispatchEvent(new Event('input')); }})()"""
        )
        placeholders = case.processed(ratios[stop])["input_ids"] == case.model.config.video_token_id
        assert drawn(opened, 0) == drawn(opened, 1) == int(placeholders.sum())
        assert opened.evaluate("document.querySelector('.count b').textContent") == str(int(placeholders.sum()))


@pytest.mark.slow
def test_patches_are_drawn_where_the_model_keeps_them(opened, loaded):
    case = Case(loaded, VIDEO, "rediprune")
    (medium,) = case.model.select_tokens(**case.processed(0.25))
    marks = "[...document.querySelectorAll('#marks button')]"
    opened.evaluate(f"{marks}.find((chip) => chip.textContent === '0.25').click()")
    shown = opened.evaluate(
        """[...document.querySelectorAll('.side.one svg')].map((svg) => [...svg.querySelectorAll('rect')].flatMap(
        (rect, place) => rect.classList.contains('kept') ? [place] : []))"""
    )
    assert shown == [frame.tolist() for frame in medium.layout.split(medium.kept)]
    box = opened.evaluate(
        f"""(() => {{ const rect = document.querySelectorAll('.side.one svg')[0].querySelectorAll('rect')[{shown[0][0]}];
        const svg = rect.ownerSVGElement.getBoundingClientRect(), box = rect.getBoundingClientRect();
        return [(box.x + box.width / 2 - svg.x) / svg.width * 6, (box.y + box.height / 2 - svg.y) / svg.height * 6]; }})()"""
    )
    row, column = divmod(shown[0][0], 6)
    assert box == pytest.approx([column + 0.5, row + 0.5], abs=0.02)


@pytest.mark.slow
def test_keys_move_the_slider_and_choose_the_view(opened):
    step = opened.evaluate("state.step")
    opened.press("ArrowRight")
    opened.press("ArrowRight")
    opened.press("ArrowLeft")
    assert opened.evaluate("state.step") == step + 1
    opened.evaluate("document.getElementById('ratio').focus()")
    opened.press("ArrowRight")  # the slider's own key now
    assert opened.evaluate("state.step") == step + 2
    for key, view in (("2", "order"), ("3", "look"), ("1", "kept")):
        opened.press(key)
        assert opened.evaluate("document.querySelector('#views input:checked').value") == view
        assert opened.evaluate("document.querySelector('.side').classList.contains('coloured')") == (view != "kept")
    opened.press("c")
    assert opened.evaluate("document.querySelectorAll('.side').length") == 1
    opened.press("c")
    assert opened.evaluate("document.querySelectorAll('.side').length") == 2


@pytest.mark.slow
def test_pointing_at_a_patch_shows_its_numbers(opened, written):
    x, y = opened.evaluate(
        """(() => { const box = document.querySelector('rect').getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
    )
    opened.move_to(x, y)
    text = opened.evaluate("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    first, *_, other = [
        item for item in json.loads(written[".json"].read_text())["traces"] if item["method"] == "rediprune"
    ]
    assert text.startswith("frame 1, row 1, column 1\nleft:")
    for item in (first, other):
        score, rank = item["scores"][0][0], item["rank"][0][0]
        assert f"relevance to the question: {score:.4g} (rank " in text
        assert f"pick {rank} of 36" in text


@pytest.mark.slow
def test_a_question_is_shown_as_it_was_written(opened):
    assert opened.evaluate("document.querySelector('[data-key=question]').options[1].text") == NASTY
    assert opened.evaluate("document.querySelectorAll('b').length") == 3  # the ratio and the two counts


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1920])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_fits_a_phone_and_a_projector(opened, width, scheme):
    opened.resize(width, 900, scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    smallest = opened.evaluate("Math.min(...[...document.querySelectorAll('svg')].map((svg) => svg.clientWidth))")
    assert smallest >= 110
