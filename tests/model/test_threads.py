"""Several requests at once: what a thread gets is what it gets alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rediprune.methods_registry import METHODS
from tiny import random_image, random_video, tiny_model, tiny_processor
from transformers import DynamicCache

QUESTIONS = ("what colour is the star ?", "which way does it move ?", "how many red ?")
PROMPTS = [f"USER: {kind}\n{question} ASSISTANT:" for question in QUESTIONS for kind in ("<video>", "<image>")]
ROUNDS = 3


@pytest.fixture(autouse=True)
def switch_often():
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 1000)
    yield
    sys.setswitchinterval(interval)


def media_of(index, prompt):
    return {"videos": [random_video(index)]} if "<video>" in prompt else {"images": [random_image(index)]}


def at_once(function, requests):
    """`function` of every request, several times over, from as many threads as requests: (request, result) pairs."""
    with ThreadPoolExecutor(len(requests)) as pool:
        jobs = [(request, pool.submit(function, request)) for _ in range(ROUNDS) for request in requests]
        return [(request, job.result()) for request, job in jobs]


def assert_as_alone(function, requests, same):
    alone = {id(request): function(request) for request in requests}
    for request, result in at_once(function, requests):
        assert same(result, alone[id(request)])


def same_tensors(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def flat(kept):
    """The tensors of `image_kept_indices` or `video_kept_indices`."""
    return list(kept or ())


def requests_of(processor):
    return [processor(text=prompt, **media_of(index, prompt)) for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("method", METHODS)
def test_forward_passes_at_once(method):
    settings = {"method": method, "keep_ratio": 0.3, **({"inner_layer": 1} if METHODS[method].inner else {})}
    model, requests = tiny_model(**settings), requests_of(tiny_processor(**settings))

    @torch.no_grad()
    def run(request):
        outputs = model(**request)
        return [outputs.logits, *flat(outputs.image_kept_indices), *flat(outputs.video_kept_indices)]

    assert_as_alone(run, requests, same_tensors)


@pytest.mark.parametrize("method", ["rediprune", "rediprune_plus", "visionzip", "prumerge", "evoprune"])
def test_selections_at_once(method):
    settings = {"method": method, "keep_ratio": 0.3}
    model, requests = tiny_model(**settings), requests_of(tiny_processor(**settings))
    select = lambda request: [item.kept for item in model.select_tokens(**request)]  # noqa: E731
    assert_as_alone(select, requests, same_tensors)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("method", ["rediprune", "rediprune_plus", "visionzip", "fastv"])
def test_answers_at_once(method, cache):
    if method == "fastv" and cache == "static":
        pytest.skip("fewer tokens in some layers need a dynamic cache")
    settings = {"method": method, "keep_ratio": 0.3, **({"inner_layer": 1} if method == "fastv" else {})}
    model, requests = tiny_model(**settings), requests_of(tiny_processor(**settings))
    generate = lambda request: [  # noqa: E731
        model.generate(**request, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    ]
    assert_as_alone(generate, requests, same_tensors)


def test_conversations_at_once():
    settings = {"method": "rediprune_plus", "keep_ratio": 0.3}
    model, processor = tiny_model(**settings), tiny_processor(**settings)
    requests = requests_of(processor)
    second = processor(text="what is it ? ASSISTANT:")["input_ids"]

    @torch.no_grad()
    def talk(request):
        cache = DynamicCache(config=model.config.text_config)
        model(**request, past_key_values=cache)
        return [model(input_ids=second, past_key_values=cache).logits]

    assert_as_alone(talk, requests, same_tensors)


def test_ratios_at_once():
    """A ratio per call is of that call alone."""
    model, processor = tiny_model(), tiny_processor()
    ratios = [0.1, 0.3, 0.6, 1.0]
    video = random_video()

    def count(ratio):
        inputs = processor(text=PROMPTS[0], videos=[video], keep_ratio=ratio)
        return [torch.tensor(inputs["input_ids"].shape), model(**inputs).logits.detach()]

    assert_as_alone(count, ratios, same_tensors)


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.inner is None])
def test_the_default_dtype_of_the_process_decides_nothing(method):
    """Another thread sets it while it loads a model in half precision."""
    settings = {"method": method, "keep_ratio": 0.3}
    settings |= {} if METHODS[method].merges_in_encoder else {"proportional_attention": True, "positions": "original"}
    model, requests = tiny_model(**settings), requests_of(tiny_processor(**settings))

    def select(request):
        items = model.select_tokens(**request)
        return [part for item in items for part in (item.kept, item.tokens, item.token_sizes) if part is not None]

    expected = [[*select(request), model(**request).logits] for request in requests]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [[*select(request), model(**request).logits] for request in requests]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(same_tensors, expected, found))
