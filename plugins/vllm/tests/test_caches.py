"""The tower runs once for a medium, whatever is asked about it; vLLM's caches are on, and right."""

import itertools

import pytest
from served import MEDIA

VIDEO, OTHER = "video-1.mp4", "video-3.mp4"
IMAGE = "image-1.png"
ASKED = [
    ([VIDEO], "what colour is the square?"),
    ([VIDEO], "where is the blue square?"),
    ([OTHER], "where is the blue square?"),
]
MIXED = [
    ([VIDEO, OTHER], "what colour is the star?"),
    ([OTHER, VIDEO], "what colour is the star?"),
    ([IMAGE, "image-2.png"], "what colour is the star?"),
    (["image-2.png", VIDEO, IMAGE], "how many triangles do you see?"),
    ([VIDEO, VIDEO], "which way does the star move?"),
    ([VIDEO], ""),
]
# Prompts are cut in the middle of their media, and blocks of the prefix cache are full before they end.
ENGINE = {"max_num_batched_tokens": 32, "block_size": 32, "enable_prefix_caching": True, "enable_chunked_prefill": True}


@pytest.fixture(scope="module", params=["rediprune", "rediprune_plus"])
def both(request, serve):
    return serve(engine=ENGINE, method=request.param)


@pytest.fixture(autouse=True)
def nothing_cached(both):
    both[0].forget()


def test_what_is_asked_in_every_order_together_and_apart(both):
    engine, reference = both
    expected = dict(zip(range(3), reference.answers(ASKED)))
    for order in itertools.permutations(range(3)):
        for groups in ([order], [[index] for index in order], [order, order]):
            engine.forget()
            encoded = 0
            for group in groups:
                answers = engine.answers([ASKED[index] for index in group])
                assert answers == [expected[index] for index in group], (order, group)
                encoded += engine.encoded
            assert encoded == 2  # two videos, whatever was asked


def test_several_media_in_a_prompt(both):
    engine, reference = both
    expected = reference.answers(MIXED)
    assert engine.answers(MIXED) == expected
    assert set(engine.pruned) == reference.pruned(MIXED)
    assert [engine.answers([asked])[0] for asked in MIXED] == expected


def test_a_ratio_for_one_request(both):
    engine, reference = both
    for options in ({"keep_ratio": 0.05}, {"keep_ratio": 0.5}, {"keep_tokens": 3}, {"keep_ratio": 1.0}):
        assert engine.answers(ASKED, options=options) == reference.answers(ASKED, options=options)
    assert engine.encoded == 2  # of unpruned media no signals are kept; the others share what the tower gave


def test_a_conversation_goes_on(both):
    """The second question decides anew which tokens stay: nothing of the first is taken over."""
    engine, reference = both
    first = ([VIDEO], "what colour is the square?")
    (answer,) = reference.answers([first])
    words = reference.processor.tokenizer.decode(answer, skip_special_tokens=True)
    second = ([VIDEO], f"what colour is the square? ASSISTANT: {words} USER: where is the blue square?")
    assert engine.answers([first]) == [answer]
    assert engine.answers([second]) == reference.answers([second])
    assert engine.encoded == 0


def test_long_answers_and_preemption(both):
    engine, reference = both
    asked = [([name], "how many triangles do you see?") for name in MEDIA] * 3
    assert engine.answers(asked, max_tokens=24) == reference.answers(asked[: len(MEDIA)], max_tokens=24) * 3


def test_the_cache_of_media_is_bounded(both):
    engine, reference = both
    media = engine.model.media
    engine.answers(ASKED[:1])
    size = media.num_bytes
    assert 0 < size < 2**20
    media.max_bytes, limit = int(1.5 * size), media.max_bytes
    try:
        for _ in range(2):
            engine.forget()
            for asked in (ASKED[0], ASKED[2], ASKED[1]):
                assert engine.answers([asked]) == reference.answers([asked])
                assert media.num_bytes == size and engine.encoded == 1
    finally:
        media.max_bytes = limit


def test_the_name_that_a_client_gives_to_a_medium_is_not_trusted(both):
    """vLLM takes a client's name of a medium for its content, and names can be given twice."""
    from vllm import SamplingParams

    engine, reference = both
    outputs = []
    for media, question in (ASKED[0], ([OTHER], ASKED[0][1])):
        request = {**engine.request(media, question), "multi_modal_uuids": {"video": ["mine"]}}
        (output,) = engine.llm.generate([request], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        outputs.append(list(output.outputs[0].token_ids))
    assert outputs == reference.answers([ASKED[0], ([OTHER], ASKED[0][1])])
