"""The demo: what it answers, what it refuses, whose video is whose, and its page in a browser."""

import argparse
import base64
import io
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from html import unescape

import answers
import engine as engine_file
import pytest
from browser import Browser, find_browser
from engine import Engine, Refused
from media import add_media_arguments, process, read_media
from PIL import Image, ImageStat
from places import ROOT
from repository import add_model_arguments, load

QUESTION, OTHER = "what colour is the square?", "where is the blue square?"
NASTY = "</script><b>\"a\" & 'b'</b> <video> ${1}"
VIDEO = (ROOT / "samples" / "video-1.mp4").read_bytes()
# The frames are gone, and what is written about them is still there.
DAMAGED = VIDEO[: VIDEO.index(b"mdat") + 4].ljust(VIDEO.index(b"moov") - 4, b"\0") + VIDEO[VIDEO.index(b"moov") - 4 :]
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n"


def arguments(add, *given):
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(given)


@pytest.fixture(scope="module")
def loaded():
    return load(arguments(add_model_arguments))


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(*loaded)


@pytest.fixture(scope="module")
def video(engine):
    return engine.open_video(VIDEO)


@pytest.mark.parametrize("method", ["rediprune", "rediprune_plus", "visionzip"])
@pytest.mark.parametrize("keep_ratio", [0.15, 1.0])
def test_an_answer_is_that_of_a_model_with_this_method(engine, video, method, keep_ratio):
    model, processor = load(arguments(add_model_arguments), {"method": method})
    args = arguments(add_media_arguments, "--video", str(ROOT / "samples" / "video-1.mp4"))
    inputs = process(args, processor, read_media(args), QUESTION, keep_ratio)
    expected = model.generate(**inputs, max_new_tokens=engine_file.MAX_NEW_TOKENS, do_sample=False)
    expected = processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    got = engine.answer(video, QUESTION, method, keep_ratio)
    assert got["answer"] == expected
    assert got["visual_tokens"] == int((inputs["input_ids"] == model.config.video_token_id).sum())
    assert got["seconds"]["vision encoder"] == 0 < got["seconds"]["prefill"]


def test_a_video_is_encoded_once(engine, loaded):
    calls = []
    tower, _ = loaded[0].tower_of("video")
    tower = getattr(tower, "vision_model", tower)  # in 4.57 the tower is inside another module
    counter = tower.encoder.layers[0].register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        video = engine.open_video(VIDEO)
        once = len(calls)
        for method in ("rediprune", "cdpruner"):
            for question in (QUESTION, OTHER):
                engine.answer(video, question, method, 0.15)
                engine.answer(video, question, method, 1.0)
        engine.kept_page(video, QUESTION, "visionzip", 0.15)
    finally:
        counter.remove()
    assert len(calls) == once >= 1


def test_visitors_get_what_they_would_get_alone(engine, video):
    other = engine.open_video((ROOT / "samples" / "video-2.mp4").read_bytes())
    asked = [(video, QUESTION, "rediprune", 0.1), (other, "what shape is the white thing?", "divprune", 0.4)] * 4

    def counts(result):
        return result["answer"], result["visual_tokens"], result["prompt_tokens"]

    alone = [counts(engine.answer(*one)) for one in asked]
    together = [None] * len(asked)

    def ask(place):
        together[place] = counts(engine.answer(*asked[place]))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len(set(alone)) == 2


def test_methods_that_only_serve_themselves_are_left_out(engine, loaded):
    assert {"rediprune", "rediprune_plus", "divprune", "random"} <= set(engine.methods)
    assert not {"none", "evoprune", "evoprune_rediprune", "fastv", "dart", "vtw"} & set(engine.methods)
    assert loaded[0].config.pruning.method == engine.default_method


@pytest.mark.slow
def test_every_method_answers_and_is_drawn_as_it_answered(engine, video, monkeypatch):
    monkeypatch.setattr(engine_file, "RATIO_STOPS", 3)
    for method in engine.methods:
        answered = engine.answer(video, QUESTION, method, 0.15)
        page = engine.kept_page(video, QUESTION, method, 0.15)
        drawn = json.loads(re.search('id="data">(.*?)</script>', page)[1])
        assert drawn["methods"] == [method] and drawn["ratios"][drawn["marks"][0]] == 0.15
        assert drawn["runs"][0][0]["counts"][drawn["marks"][0]] == answered["visual_tokens"], method
        assert len(drawn["panels"]) == 8


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read as a video"),
        (b"not a video" * 100, "cannot be read as a video"),
        (VIDEO[:100], "cannot be read as a video"),
        (PLAYLIST, "cannot be read as a video"),
        ((ROOT / "samples" / "questions.json").read_bytes(), "cannot be read as a video"),
        ((ROOT / "docs" / "overlay.png").read_bytes(), "does not tell its length"),
        (DAMAGED, "is damaged"),
        (bytes(engine_file.MAX_BYTES + 1), "at most 64 MB"),
    ],
    ids=["empty", "text", "cut", "playlist", "json", "picture", "damaged", "large"],
)
def test_wrong_files_are_refused_in_plain_words(engine, content, message):
    with pytest.raises(Refused, match=message) as error:
        engine.open_video(content)
    assert "/" not in str(error.value) and "video 0" not in str(error.value)


@pytest.mark.parametrize("limit, message", [("MAX_PIXELS", "3840 x 2160"), ("MAX_SECONDS", "minutes are taken")])
def test_what_a_file_announces_is_held_against_the_limits_before_it_is_decoded(engine, monkeypatch, limit, message):
    monkeypatch.setattr(engine_file, limit, 1)
    monkeypatch.setattr(Engine, "_encode", lambda *args: pytest.fail("decoded"))
    with pytest.raises(Refused, match=message):
        engine.open_video(VIDEO)


@pytest.mark.parametrize(
    "question, method, keep_ratio, message",
    [
        ("  ", "rediprune", 0.15, "Type a question"),
        ("a" * 401, "rediprune", 0.15, "401 characters"),
        (QUESTION, "evoprune", 0.15, "no such method"),
        (QUESTION, "../../etc", 0.15, "no such method"),
        (QUESTION, "rediprune", 0, "above 0"),
        (QUESTION, "rediprune", float("nan"), "above 0"),
        ("\ud800", "rediprune", 0.15, "refuses this question"),
    ],
)
def test_wrong_questions_are_refused_in_plain_words(engine, video, question, method, keep_ratio, message):
    with pytest.raises(Refused, match=message):
        engine.answer(video, question, method, keep_ratio)


def test_what_visitors_type_stays_text(engine, video):
    pruned, full = (engine.answer(video, NASTY, "rediprune", ratio) for ratio in (0.15, 1.0))
    written = answers.comparison(NASTY, NASTY, 0.15, pruned, full) + answers.earlier(
        [(NASTY, NASTY, 0.15, pruned, full)]
    )
    written += answers.remark(NASTY)
    assert '<b>"a"' not in written and "</script>" not in written and written.count("&lt;/script&gt;") == 5
    kept = engine.kept_page(video, NASTY, "rediprune", 0.15)
    framed = answers.framed(kept)
    assert re.fullmatch(r'<iframe [^<>"]*="[^<>]*"></iframe>', framed) and 'sandbox="allow-scripts"' in framed
    assert unescape(re.search('srcdoc="([^"]*)"', framed)[1]) == kept


def test_numbers_are_those_of_the_answers():
    def result(tokens, prefill):
        seconds = {"selection": 0.01, "projector": 0.01, "prefill": prefill, "decode": 5.0, "vision encoder": 9.0}
        return {"answer": "red", "visual_tokens": tokens, "prompt_tokens": 60, "new_tokens": 2, "seconds": seconds}

    written = answers.comparison("?", "divprune", 0.25, result(72, 0.08), result(288, 0.38))
    assert "<b>72 of 288</b> visual tokens (25%)" in written
    assert "<b>100 ms</b> instead of 400 ms: 4.0 times as fast, in one run of each" in written
    assert "vision encoder" not in written and "<td>5100 ms</td><td>5400 ms</td>" in written


# -- the page, in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(engine):
    """The page, served on loopback."""
    pytest.importorskip("gradio", reason="the page of the demo needs gradio: install demo/requirements.txt")
    import app

    page = app.build(engine)
    page.queue(default_concurrency_limit=2)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())
    yield url
    page.close()


@pytest.fixture
def open_page(address, tmp_path):
    """Opens the page for one more visitor."""
    executable = find_browser()
    if executable is None or os.name != "posix":
        pytest.skip("no Chromium here: install one to check the page in it")
    visitors = []

    def open_page(width=1280, scheme="light"):
        visitors.append(Visitor(Browser(executable, tmp_path / str(len(visitors))), address))
        visitors[-1].browser.resize(width, 900, scheme)
        visitors[-1].open()
        return visitors[-1]

    yield open_page
    problems = [problem for visitor in visitors for problem in visitor.browser.problems]
    for visitor in visitors:
        visitor.browser.close()
    assert problems == []


class Visitor:
    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self):
        self.browser.open(self.address)
        self.wait("document.querySelector('#ask') !== null && [...document.querySelectorAll('button')].length > 3")

    def wait(self, condition):
        end = time.monotonic() + 60
        while not self.browser.evaluate(condition):
            assert time.monotonic() < end, f"still not {condition}: {self.text('body')[:2000]}"
            time.sleep(0.05)

    def text(self, place):
        return self.browser.evaluate(f"document.querySelector('{place}')?.innerText ?? ''")

    def pick(self, sample):
        self.browser.evaluate(
            f"[...document.querySelectorAll('button')].find((one) => one.innerText.includes('{sample}')).click()"
        )
        self.wait("document.querySelector('#about').innerText.includes('encoded once')")

    def type(self, question):
        field = "document.querySelector('#question :is(input, textarea)')"
        self.browser.evaluate(f"{field}.focus(); {field}.select()")
        self.browser.call("Input.insertText", text=question)

    def ask(self, question):
        self.type(question)
        self.browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
        self.wait(f"document.querySelector('#answers h2')?.innerText === {question!r}")
        self.wait("document.querySelector('#kept iframe') !== null && !document.querySelector('.generating')")

    def upload(self, path):
        root = self.browser.call("DOM.getDocument")["root"]["nodeId"]
        field = self.browser.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])


@pytest.mark.slow
def test_a_visitor_asks_twice_about_a_sample(open_page, engine, video):
    visitor = open_page()
    visitor.pick(QUESTION)
    about = visitor.text("#about")
    visitor.ask(QUESTION)
    pruned, full = (engine.answer(video, QUESTION, engine.default_method, ratio) for ratio in (0.15, 1.0))
    assert visitor.text(".pruned .answer") == pruned["answer"] and visitor.text(".full .answer") == full["answer"]
    assert f"{pruned['visual_tokens']} of {full['visual_tokens']} visual tokens" in visitor.text("#answers")
    assert f"{engine.default_method} at a ratio of 0.15" in visitor.text("#answers") and visitor.text("#history") == ""
    visitor.ask(OTHER)
    assert visitor.text("#about") == about  # the same encoding, in the same time
    assert QUESTION in visitor.text("#history") and OTHER not in visitor.text("#history")
    asked = {url for url in visitor.browser.requests if not url.startswith(("data:", "blob:", "about:"))}
    assert all(url.startswith(visitor.address) for url in asked), {
        url for url in asked if not url.startswith(visitor.address)
    }


@pytest.mark.slow
def test_visitors_do_not_see_one_another(open_page):
    first, second = open_page(), open_page()
    first.pick(QUESTION)
    first.ask(QUESTION)
    assert second.text("#answers") == second.text("#history") == second.text("#about") == ""
    second.pick("what shape is the white thing?")
    second.ask("what shape is the white thing?")
    first.ask(OTHER)
    assert "white thing" not in first.text("body").replace("Sample: what shape is the white thing?", "")
    assert second.text("#history") == ""


@pytest.mark.slow
def test_the_page_says_what_is_wrong_with_a_file_or_a_question(open_page, tmp_path):
    visitor = open_page()
    visitor.browser.evaluate("document.querySelector('#ask').click()")
    visitor.wait("document.querySelector('#answers [role=alert]')?.innerText === 'Choose a video first.'")
    wrong = tmp_path / "holiday.mp4"
    wrong.write_bytes(b"not a video" * 1000)
    visitor.upload(wrong)
    visitor.wait("document.querySelector('#about [role=alert]') !== null")
    assert visitor.text("#about") == "This file cannot be read as a video. MP4, WebM and MOV files work."
    visitor.open()
    visitor.upload(ROOT / "samples" / "video-1.mp4")
    visitor.wait("document.querySelector('#about').innerText.includes('encoded once')")
    visitor.type(" ")
    visitor.browser.evaluate("document.querySelector('#ask').click()")
    visitor.wait("document.querySelector('#answers [role=alert]')?.innerText === 'Type a question first.'")
    visitor.browser.problems.clear()  # the player's own, about what it cannot play


def post(address, content, kind):
    request = urllib.request.Request(address, content, {"Content-Type": kind})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_a_file_that_nobody_uploaded_is_not_read(address):
    """What a program sends that is no browser: the path of a file of the server."""
    secret = {"path": str(ROOT / "samples" / "video-1.mp4"), "meta": {"_type": "gradio.FileData"}}
    with urllib.request.urlopen(f"{address}config") as answer:
        (event,) = [one for one in json.loads(answer.read())["dependencies"] if one["api_name"] == "open_video"]
    data = {"data": [None, secret], "fn_index": event["id"], "session_hash": "somebody"}
    post(f"{address}gradio_api/queue/join", json.dumps(data).encode(), "application/json")
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=somebody") as events:
        messages = [json.loads(line[5:]) for line in events if line.startswith(b"data:")]
    (done,) = [message for message in messages if message["msg"] == "process_completed"]
    assert not done["success"] and "samples" not in json.dumps(messages)


@pytest.mark.slow
def test_an_upload_that_is_too_large_is_cut_off(address):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    kind = "multipart/form-data; boundary=b"
    assert post(f"{address}gradio_api/upload", head + b"small\r\n--b--\r\n", kind)
    with pytest.raises(urllib.error.HTTPError) as error:
        post(f"{address}gradio_api/upload", head + bytes(engine_file.MAX_BYTES + 1) + b"\r\n--b--\r\n", kind)
    assert error.value.code == 413


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_follows_light_and_dark(open_page, width, scheme):
    visitor = open_page(width, scheme)
    visitor.pick(QUESTION)
    visitor.ask(QUESTION)
    visitor.browser.evaluate("document.querySelector('#answers details').open = true")
    assert visitor.browser.evaluate("document.documentElement.scrollWidth") <= width
    assert visitor.browser.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    visitor.browser.evaluate("document.querySelector('#kept iframe').scrollIntoView()")
    visitor.wait("parseFloat(document.querySelector('#kept iframe').style.height) > 300")
    shot = base64.b64decode(visitor.browser.call("Page.captureScreenshot", format="png")["data"])
    assert brightness(shot) < 90 if scheme == "dark" else brightness(shot) > 150


def brightness(shot):
    return ImageStat.Stat(Image.open(io.BytesIO(shot)).convert("L")).median[0]


@pytest.mark.slow
def test_everything_is_reached_by_keyboard(open_page):
    visitor = open_page()
    visitor.pick(QUESTION)
    visitor.ask(QUESTION)
    visitor.browser.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(40):
        visitor.browser.call("Input.dispatchKeyEvent", type="keyDown", key="Tab", windowsVirtualKeyCode=9)
        visitor.browser.call("Input.dispatchKeyEvent", type="keyUp", key="Tab", windowsVirtualKeyCode=9)
        reached.append(
            visitor.browser.evaluate(
                "(({tagName, id, type, innerText, ariaLabel}) => [tagName, id, type, innerText, ariaLabel].join(' '))"
                "(document.activeElement)"
            )
        )
    for wanted in ("Sample: what colour", "TEXTAREA|INPUT", "range", "BUTTON ask", "SUMMARY", "IFRAME"):
        assert any(re.search(wanted, one) for one in reached), (wanted, reached)
