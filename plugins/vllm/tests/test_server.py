"""`vllm serve`, asked by OpenAI's own client: eight at once, and some of them wrong."""

import base64
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import ROOT
from served import MEDIA, SAMPLES, Reference, kind_of

STARTS_WITHIN = 240  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the repository itself, served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, str(ROOT / "plugins" / "vllm" / "cli.py"), "serve", str(ROOT), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "variant"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--trust-request-mm-kwargs"]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + STARTS_WITHIN
            while not _is_up(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def reference():
    return Reference(ROOT)


def part_of(name: str) -> dict:
    kind = kind_of(name)
    content = base64.b64encode((SAMPLES / name).read_bytes()).decode()
    mime = {"image": "image/png", "video": "video/mp4"}[kind]
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{content}"}}


def ask(client, media, question: str, **options) -> str:
    parts = [*map(part_of, media), {"type": "text", "text": question}]
    sampling = {"temperature": 0, "max_tokens": 8}
    reply = client.chat.completions.create(
        model="variant", messages=[{"role": "user", "content": parts}], **sampling, **options
    )
    return reply.choices[0].message.content


def expected(reference, media, question: str, **options) -> str:
    chat = [
        {"role": "user", "content": [*({"type": kind_of(name)} for name in media), {"type": "text", "text": question}]}
    ]
    text = reference.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = reference.inputs(media, question, text=text, **options)
    ids = reference.model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return reference.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_eight_clients_at_once(client, reference, questions):
    asked = [([MEDIA[index % len(MEDIA)]], question) for index, question in enumerate(questions[:40])]
    asked += [(["video-1.mp4", "video-2.mp4"], questions[0]), (["image-1.png", "video-1.mp4"], questions[1])]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda each: ask(client, *each), asked))
    assert answers == [expected(reference, *each) for each in asked]
    assert len(set(answers)) > 5


def test_an_answer_as_a_stream(client, reference):
    media, question = ["video-1.mp4"], "where is the blue square?"
    parts = [*map(part_of, media), {"type": "text", "text": question}]
    chunks = client.chat.completions.create(
        model="variant", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8, stream=True
    )
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert answer == expected(reference, media, question)


def test_a_ratio_and_frames_of_one_request(client, reference):
    media, question = ["video-3.mp4"], "how many circles do you see?"
    for options in ({"keep_ratio": 0.5}, {"num_frames": 4}, {"keep_ratio": 1}):
        answer = ask(client, media, question, extra_body={"mm_processor_kwargs": options})
        assert answer == expected(reference, media, question, **options)


def test_typed_placeholders_are_text(client, reference):
    for question in ("<video> where is the blue square?", "what is <image><video>?"):
        assert ask(client, ["video-1.mp4"], question) == expected(reference, ["video-1.mp4"], question)
        assert ask(client, [], question) is not None


BAD_VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
BAD_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BAD = {
    "a broken video": ([BAD_VIDEO], {}, "cannot be decoded as a video"),
    "a broken image": ([BAD_IMAGE], {}, "identify image"),
    "a ratio of 2": ([part_of("image-1.png")], {"keep_ratio": 2}, "keep_ratio"),
    "a ratio that is none": ([part_of("image-1.png")], {"keep_ratio": "half"}, "keep_ratio"),
    "the size of pictures": ([part_of("image-1.png")], {"crop_size": {"height": 9999, "width": 9999}}, "crop_size"),
    "another question": ([part_of("image-1.png")], {"question_of_prompt": [5]}, "question_of_prompt"),
    "no frames": ([part_of("video-1.mp4")], {"num_frames": 0}, "num_frames"),
    "too long": ([part_of("video-1.mp4")] * 30, {}, "maximum"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_request_fails_alone(case, client, reference):
    parts, options, words = BAD[case]
    media, question = ["video-2.mp4"], "where is the yellow square?"
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]

    def bad():
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(
                model="variant", messages=messages, max_tokens=4, extra_body={"mm_processor_kwargs": options}
            )

    with ThreadPoolExecutor(4) as clients:
        jobs = [clients.submit(bad), clients.submit(ask, client, media, question), clients.submit(bad)]
        jobs.append(clients.submit(ask, client, media, question))
        results = [job.result() for job in jobs]
    assert results[1] == results[3] == expected(reference, media, question)


def test_a_prompt_without_its_placeholder_is_refused(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="variant", prompt="USER: " + "word " * 5000, max_tokens=4)
