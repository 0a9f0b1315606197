"""`transformers serve`, asked by an OpenAI client that sends images and videos as data URLs."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from families import FAMILIES
from tiny import SPECIALS, random_image, random_video, write_video

openai = pytest.importorskip("openai", reason="needs the client: pip install -r requirements-ecosystem.txt")
pytest.importorskip("fastapi", reason="needs what transformers serve needs: pip install -r requirements-ecosystem.txt")
pytest.importorskip("uvicorn", reason="needs what transformers serve needs: pip install -r requirements-ecosystem.txt")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 serves no images and videos"),
]
QUESTION = {"type": "text", "text": "what colour is the star ?"}
NEW_TOKENS = 5
SECRET = "c2VjcmV0IHBpY3R1cmUgb2YgYSBzdHJhbmdlcg"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from serving import Server

    with Server(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """For each kind of media the part of a message that holds it."""
    folder = tmp_path_factory.mktemp("media")
    random_image().save(folder / "image.png")
    write_video(folder / "video.mp4", random_video(frames=40))
    from serving import part_of

    return {kind: part_of(folder / file) for kind, file in (("image", "image.png"), ("video", "video.mp4"))}


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """For each family the folder of a variant, its model and its processor."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family.name)
        model, processor = family.model(keep_ratio=0.25), family.processor(keep_ratio=0.25)
        words = range(len(SPECIALS), len(processor.tokenizer))  # all else decodes to nothing
        model.generation_config.suppress_tokens = [token for token in range(64) if token not in words]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        found[family.name] = folder, model, processor
    return found


@torch.no_grad()
def expected(variant, part, **options) -> tuple:
    """What the same variant answers in this process."""
    _, model, processor = variant
    kind = part["type"].removesuffix("_url")
    chat = [{"role": "user", "content": [{"type": kind, "url": part[part["type"]]["url"]}, QUESTION]}]
    options = {"num_frames": 32, **options} if kind == "video" else options
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    length = inputs["input_ids"].shape[1]
    new_tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:]
    return processor.decode(new_tokens, skip_special_tokens=True).strip(), length


@pytest.mark.parametrize("name, kind", [(family.name, kind) for family in FAMILIES for kind in family.kinds])
def test_every_family_answers_in_one_piece_and_streamed(server, variants, parts, name, kind):
    answer, length = expected(variants[name], parts[kind])
    content = [parts[kind], QUESTION]
    assert answer and server.ask(variants[name][0], content, NEW_TOKENS) == (answer, length)
    assert server.ask(variants[name][0], content, NEW_TOKENS, stream=True) == (answer, None)


@pytest.mark.parametrize(
    "options",
    [{"num_frames": 8}, {"num_frames": None, "fps": 2}, {"keep_ratio": 0.5}, {"num_frames": 4, "keep_ratio": 1}],
)
def test_frames_and_ratio_of_a_request(server, variants, parts, options):
    variant = variants["llava_next_video"]
    wanted = expected(variant, parts["video"], **options)
    assert wanted[1] != expected(variant, parts["video"])[1]
    assert server.ask(variant[0], [parts["video"], QUESTION], NEW_TOKENS, **options) == wanted


def test_four_requests_at_once_get_what_each_gets_alone(server, variants, parts):
    cases = [("llava_next_video", "video", ratio) for ratio in (0.1, 0.3)] + [("llava_next_video", "image", 0.6)]
    cases.append(("video_llava", "video", 0.2))

    def ask(case):
        name, kind, ratio = case
        stream = ratio == 0.3
        return [
            server.ask(variants[name][0], [parts[kind], QUESTION], NEW_TOKENS, stream=stream, keep_ratio=ratio)[0]
            for _ in range(3)
        ]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, cases))
    wanted = [expected(variants[name], parts[kind], keep_ratio=ratio)[0] for name, kind, ratio in cases]
    assert found == [[answer] * 3 for answer in wanted]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_broken_medium_is_an_error_without_its_content(server, variants, parts, kind):
    part = json.loads(json.dumps(parts[kind]))
    part[f"{kind}_url"]["url"] = f"data:{kind}/x;base64,{SECRET * 100}"
    with pytest.raises(openai.InternalServerError) as caught:
        server.ask(variants["llava_next_video"][0], [part, QUESTION], NEW_TOKENS)
    assert server.ask(variants["llava_next_video"][0], [parts[kind], QUESTION], NEW_TOKENS)[
        0
    ]  # and by then the log is written
    assert SECRET not in str(caught.value) and SECRET not in server.log.read_text()
    assert f"a data URL of {len(part[f'{kind}_url']['url'])} characters" in server.log.read_text()
