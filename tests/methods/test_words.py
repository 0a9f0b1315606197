"""The words of a question that MMTok covers: which they are, how they reach the model, and that nothing else counts."""

import math
import operator

import pytest
import torch
from rediprune.inputs_words import content_words
from rediprune.ops_relevance import word_affinity
from tiny import by_frame, random_image, random_video, shown, tiny_model, tiny_processor

MMTOK = {"method": "mmtok", "keep_ratio": 0.25}


@pytest.mark.parametrize(
    "question, words",
    [
        ("which way does the red star on the left of blue move ?", "way red star left blue move"),
        ("What's the man in the red-shirt doing?\nAnswer the question using a single word or phrase.", "man red shirt"),
        ("Is it a CAT? Please answer yes or no.\nAnswer:", "CAT"),
        ("What is shown?\nB. dog\nAnswer with the option's letter from the given choices directly.", "shown B dog"),
        ("What did the answer say?", "answer say"),  # a question about an answer, not a request for one
        ("What is it?", "What is it"),  # nothing but stop words
        ("Answer: is it red?", "Answer red"),  # nothing but the request
        ("这个人在做什么？", "这个人在做什么"),
        ("? !", ""),
        ("", ""),
    ],
)
def test_content_words(question, words):
    assert content_words(question) == words.split()


def ids_of(prompt, **media):
    processor = tiny_processor(**MMTOK)
    media = media or {"videos": random_video()}
    return processor, processor(text=prompt, **media)["word_input_ids"][0].tolist()


@pytest.mark.parametrize(
    "prompt, words",
    [
        (
            "USER: <video>\nwhat colour is the star ? ASSISTANT:",
            "colour star",
        ),  # the chat template asks with these words
        ("USER: which way ? <video>\nwhere is the star ?", "star"),
        ("USER: where is the star ? <video>\nASSISTANT:", ""),
    ],
)
def test_the_processor_gives_their_ids(prompt, words):
    processor, ids = ids_of(prompt)
    assert ids == processor.tokenizer.convert_tokens_to_ids(words.split())
    content = [{"type": "image", "image": random_image()}, {"type": "text", "text": "where is the star ?"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert processor.tokenizer.convert_ids_to_tokens(chat["word_input_ids"][0].tolist()) == ["star"]


def test_shorter_questions_are_padded():
    processor = tiny_processor(**MMTOK)
    questions = ["is it ?", "the red star", "?"]
    found = processor(text=[f"<video> {text}" for text in questions], videos=[random_video()] * 3, padding=True)
    is_it, star = (processor.tokenizer.convert_tokens_to_ids(words.split()) for words in ("is it", "red star"))
    assert found["word_input_ids"].tolist() == [is_it, star, [-1, -1]]


def test_ids_are_there_where_they_are_needed():
    video = {"text": "<video> what ?", "videos": random_video()}
    given = lambda call=video, **pruning: "word_input_ids" in tiny_processor(**{**MMTOK, **pruning})(**call)  # noqa: E731
    assert given() and given(words="content") and given(keep_ratio=1.0, call={**video, "keep_ratio": 0.5})
    assert not given(words="all") and not given(relevance="attention") and not given(query_weighting="none")
    assert not given(keep_ratio=1.0) and not given({**video, "keep_ratio": 1.0}) and not given(method="rediprune")
    assert not given({"text": "what ?"}) and not given({"videos": random_video()})


def test_the_method_covers_them_alone():
    """Each of the two words has half of the weight; with words="all" each of the tail's eight tokens its part."""
    for words, ids in (("content", "colour star"), ("all", "what colour is the star ? ASSISTANT :")):
        model, processor = tiny_model(**MMTOK, words=words), tiny_processor(**MMTOK, words=words)
        inputs = processor(text="USER: <video>\nwhat colour is the star ? ASSISTANT:", videos=random_video())
        (tokens,) = shown(model, inputs)
        ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(ids.split()))
        expected = word_affinity(model.get_input_embeddings()(ids), tokens.projected) / len(ids)
        torch.testing.assert_close(tokens.text_affinity, expected)


def slow_mmtok(features, projected, words, num_kept):
    """(L, C), (L, H), (T, H) -> kept indices, one pick and one row at a time, in plain Python."""

    def shares(one, others, temperature):
        weights = [math.exp(cosine(one, other) / temperature) for other in others]
        return [weight / sum(weights) for weight in weights]

    def cosine(one, other):
        return sum(map(operator.mul, one, other)) / math.sqrt(sum(x * x for x in one) * sum(x * x for x in other))

    features, projected, words = (states.tolist() for states in (features, projected, words))
    rows = [[share / len(words) for share in shares(word, projected, 0.02)] for word in words]
    rows += [[0.5 / len(features) * share for share in shares(one, features, 0.2)] for one in features]
    kept = []
    while len(kept) < num_kept:
        covered = [max([row[token] for token in kept], default=0.0) for row in rows]
        gains = {
            token: sum(max(0.0, row[token] - best) for row, best in zip(rows, covered))
            for token in range(len(features))
            if token not in kept
        }
        kept.append(max(gains, key=gains.get))
    return sorted(kept)


@pytest.mark.parametrize("keep_ratio", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("question", ["which way does the red star move ?", "what colour is it ?"])
def test_the_model_keeps_what_a_plain_reference_keeps(question, keep_ratio):
    pruning = {**MMTOK, "keep_ratio": keep_ratio}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    inputs = processor(text=f"USER: <video>\n{question} ASSISTANT:", videos=random_video(3))
    (tokens,), (medium,) = shown(model, inputs), model.select_tokens(**inputs)
    words = model.get_input_embeddings()(inputs["word_input_ids"][0]).detach()
    sets = zip(tokens.features, tokens.projected, by_frame(medium.kept).tolist())
    for features, projected, kept in sets:
        assert kept == slow_mmtok(features, projected.detach(), words, len(kept))


def kept(prompt, **pruning):
    pruning = {**MMTOK, **pruning}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    return model.select_tokens(**processor(text=prompt, videos=random_video()))[0].kept


def test_stop_words_and_the_answer_prompt_change_nothing():
    plain = kept("USER: <video>\nred star left ASSISTANT:")
    assert torch.equal(plain, kept("USER: <video>\nwhere is the red star on the left ? ASSISTANT:"))
    assert torch.equal(plain, kept("USER: <video>\nred star left ?\nAnswer with a word . ASSISTANT:"))
    assert not torch.equal(plain, kept("USER: <video>\nblue star right ASSISTANT:"))
    assert not torch.equal(plain, kept("USER: <video>\nred star left ASSISTANT:", words="all"))


def test_at_most_so_many():
    prompt = "USER: <video>\nred star left {} ASSISTANT:"
    few = lambda words: kept(prompt.format(words), query_max_tokens=2)  # noqa: E731
    assert torch.equal(few("blue right"), kept("USER: <video>\nblue right ASSISTANT:"))


def test_missing_ids():
    model, processor = tiny_model(**MMTOK), tiny_processor(**MMTOK)
    inputs = processor(text="<video> the red star", videos=random_video())
    for change in ({"word_input_ids": None}, {"word_input_ids": inputs["word_input_ids"][:0]}):
        for call in (model, model.select_tokens):
            with pytest.raises(
                ValueError, match="words='content' needs word_input_ids.*processor of this.*words to 'all'"
            ):
                call(**{**inputs, **change})
    model.config.pruning.words = "all"
    model(**{**inputs, "word_input_ids": None})


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generates(mode):
    """A batch as each of its samples alone."""
    model, processor = tiny_model(**MMTOK), tiny_processor(**MMTOK)
    texts = [
        f"USER: <video>\n{question} ASSISTANT:" for question in ("where is it ?", "which way does the red star move ?")
    ]
    options = {"max_new_tokens": 4, "do_sample": False, **mode}
    videos = [random_video(1), random_video(2)]
    batch = model.generate(**processor(text=texts, videos=videos, padding=True), **options)[:, -4:]
    for row, text, video in zip(batch, texts, videos):
        assert torch.equal(model.generate(**processor(text=text, videos=video), **options)[0, -4:], row)


def test_a_later_turn_needs_none():
    """The media are in the cache: the words are read once."""
    model, processor = tiny_model(**MMTOK), tiny_processor(**MMTOK)
    inputs = processor(text="USER: <video>\nwhere is the red star ? ASSISTANT:", videos=random_video())
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    more = model.generate(
        **{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)},
        past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert more.shape[1] == ids.shape[1] + 3
