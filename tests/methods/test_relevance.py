"""Relevance by its values, where other tests look at what is selected: the maximum over words, fp32 sums, and segments."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rediprune.inputs_text_tower import question_segments
from rediprune.ops_query import build_query
from rediprune.ops_relevance import (
    attention_affinity,
    attention_by_head,
    attention_relevance,
    clip_relevance,
    cosine_relevance,
    late_attention,
    read_by_layers,
    spread_relevance,
    word_affinity,
)
from rediprune.ops_tokens import group_means, group_sizes, nearest_kept
from rediprune.vision_joint_space import JointSpace
from tiny import WORDS, random_image, random_video, shown, tiny_model, tiny_processor


def test_the_largest_of_all_words_counts():
    rows = torch.tensor([[[0.1, 0.6, 0.2, 0.1], [0.4, 0.0, 0.3, 0.3]]])
    # Largest 0.4, 0.6, 0.3, 0.3, of which 0.3 is the least; the means 0.25, 0.3, 0.25, 0.2 would order them otherwise.
    torch.testing.assert_close(attention_relevance(rows), torch.tensor([[1 / 3, 1, 0, 0]]))


def test_the_largest_of_all_heads_counts():
    layer = tiny_model().model.language_model.layers[0]
    generator = torch.Generator().manual_seed(0)
    words, tokens = torch.randn(3, 32, generator=generator), torch.randn(2, 9, 32, generator=generator)
    heads, rows = attention_by_head(layer, words, tokens), attention_affinity(layer, words, tokens)
    assert torch.equal(rows, torch.stack([heads[:, head] for head in range(4)]).amax(0))
    assert not torch.allclose(rows, heads.mean(1))


class Layer(torch.nn.Module):
    """The part of a decoder layer that attention is read from: `heads` query heads on `groups` key heads of `width` features."""

    def __init__(self, heads, groups, width, hidden, bias=True):
        super().__init__()
        self.input_layernorm, self.self_attn = torch.nn.LayerNorm(hidden), torch.nn.Module()
        self.self_attn.q_proj = torch.nn.Linear(hidden, heads * width, bias=bias)
        self.self_attn.k_proj = torch.nn.Linear(hidden, groups * width, bias=bias)
        self.self_attn.head_dim, self.self_attn.scaling = width, width**-0.5


class Adapted(torch.nn.Linear):
    """More than a matrix, for all that is known of it."""


def adapted(layer):
    """The same layer, whose keys can only be asked for."""
    layer.self_attn.k_proj.__class__ = Adapted
    return layer


@torch.no_grad()
@given(
    groups=st.sampled_from([1, 2, 4]), per_group=st.sampled_from([1, 3]), words=st.integers(1, 12),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_words_folded_into_the_keys_attend_as_they_did(groups, per_group, words, bias, seed):
    torch.manual_seed(seed)
    layer = Layer(groups * per_group, groups, 8, 24, bias)
    words, tokens = torch.randn(words, 24), torch.randn(3, 7, 24)
    found = attention_by_head(layer, words, tokens)
    torch.testing.assert_close(found, attention_by_head(adapted(layer), words, tokens))
    assert found.shape == (3, groups * per_group, len(words), 7)


@torch.no_grad()
@pytest.mark.parametrize(
    "case, folds", [("few words", True), ("many words", False), ("adapted", False), ("normed", False)]
)
def test_keys_are_computed_where_that_is_cheaper_or_they_are_more_than_a_matrix(case, folds):
    layer, calls = Layer(4, 4, 8, 24), []
    if case == "normed":
        layer.self_attn.k_norm = torch.nn.LayerNorm(8)
    layer = adapted(layer) if case == "adapted" else layer
    layer.self_attn.k_proj.register_forward_hook(lambda *args: calls.append(1))
    attention_by_head(layer, torch.randn(8 if case == "many words" else 2, 24), torch.randn(1, 7, 24))
    assert calls == ([] if folds else [1])


@torch.no_grad()
def test_late_words_count_more_and_all_heads():
    layer = tiny_model().model.language_model.layers[0]
    generator = torch.Generator().manual_seed(0)
    words, tokens = torch.randn(3, 32, generator=generator), torch.randn(2, 9, 32, generator=generator)
    rows = attention_by_head(layer, words, tokens).sum(1)
    weights = [math.exp(6 * place / 2) for place in range(3)]
    expected = sum(weight / sum(weights) * rows[:, place] for place, weight in enumerate(weights))
    torch.testing.assert_close(late_attention(layer, words, tokens), expected)
    torch.testing.assert_close(late_attention(layer, words[:1], tokens), rows[:, 0])


def test_what_shows_the_same_is_as_relevant():
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
    spread = spread_relevance(torch.tensor([[0.8, 0.2, 0.1, 0.1]]), tokens)
    torch.testing.assert_close(spread, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    near = torch.tensor([[[1.0, 0.0], [0.9, 0.19**0.5], [0.0, 1.0]]])  # cosines 0.9, 0 and 0.44
    weights = [[1, math.exp(-1), math.exp(-10)], [math.exp(-1), 1, math.exp(10 * (0.19**0.5 - 1))]]
    first, second = (row[0] / sum(row) for row in weights)
    third = math.exp(-10) / (math.exp(-10) + weights[1][2] + 1)
    torch.testing.assert_close(
        spread_relevance(torch.tensor([[1.0, 0.0, 0.0]]), near)[0, 1], torch.tensor((second - third) / (first - third))
    )


@torch.no_grad()
def test_the_question_is_read_layer_by_layer():
    model = tiny_model().model.language_model
    words = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    states = model(inputs_embeds=words[None], output_hidden_states=True).hidden_states
    for first, number, expected in [(0, 1, [0]), (0, 2, [0, 1]), (1, 1, [1]), (0, 4, [0, 1]), (1, 4, [1])]:
        found = read_by_layers(model, words, first, number)
        torch.testing.assert_close(found, torch.stack([states[layer][0] for layer in expected]))
        assert read_by_layers(model, words[:0], first, number).shape == (len(expected), 0, 32)


def random_states(*shape, seed=0):
    """Values that have much in common, so that sums in half precision lose what differs."""
    return 3 + torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_not_in_half_precision(dtype, autocast):
    """What comes of half precision is exactly what comes of its fp32 copy, and not in half precision."""
    words, tokens, queries = random_states(5, 32), random_states(2, 9, 32, seed=1), random_states(2, 32, seed=2)
    words, tokens, queries = (states.to(dtype) for states in (words, tokens, queries))
    nearest = torch.arange(18).view(2, 9) % 4
    layer = tiny_model().model.language_model.layers[0]
    compute = {
        "word_affinity": lambda words, tokens, queries: word_affinity(words, tokens),
        "cosine_relevance": lambda words, tokens, queries: cosine_relevance(tokens, queries),
        "clip_relevance": lambda words, tokens, queries: clip_relevance(tokens, queries),
        "build_query": lambda words, tokens, queries: build_query(words),
        "group_means": lambda words, tokens, queries: group_means(tokens, nearest, 4),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name, function in compute.items():
            found, expected = function(words, tokens, queries), function(words.float(), tokens.float(), queries.float())
            assert found.dtype in (torch.float32, torch.float64) and torch.equal(found, expected), name
        assert attention_by_head(layer.to(dtype), words, tokens).dtype == torch.float32
        assert group_sizes(nearest, 4).dtype == torch.float32


@pytest.mark.parametrize("function", [cosine_relevance, clip_relevance])
def test_cosines_equal_fp64(function):
    tokens, queries = random_states(3, 50, 64), F.normalize(random_states(3, 64, seed=1), dim=-1)
    expected = torch.stack(
        [F.cosine_similarity(row.double(), query.double()[None]) for row, query in zip(tokens, queries)]
    )
    sign = -1 if function is clip_relevance else 1
    torch.testing.assert_close(function(tokens, queries).double(), sign * expected, atol=1e-6, rtol=0)


def test_segments_of_padding_do_not_count(text_tower):
    """A question beside a longer one is where it is alone: the mean is over the segments that it has."""
    space = JointSpace(text_tower, 16)
    short, long = "what colour is the star ?", " ".join(WORDS)
    ids, mask = question_segments(text_tower, [short, long])
    assert mask.any(-1).sum(1).tolist() == [1, 3]
    together = space.place_questions(ids, mask)
    for row, question in enumerate((short, long)):
        (alone,) = space.place_questions(*question_segments(text_tower, [question]))
        torch.testing.assert_close(together[row], alone)
    torch.testing.assert_close(together[0].norm(), torch.tensor(1.0))
    assert together[1].norm() < 0.999  # a mean of unit vectors
    segments = [space.place_questions(ids[1:, number, None], mask[1:, number, None])[0] for number in range(3)]
    torch.testing.assert_close(together[1], torch.stack(segments).mean(0))


def test_merging_is_in_fp32():
    """Of features in half precision: the mean of the group, and the part of the way to it."""
    pruning = {"method": "rediprune_plus", "keep_ratio": 0.1, "merge_weight": 0.3}
    model, processor = tiny_model(**pruning).to(torch.bfloat16), tiny_processor(**pruning)
    inputs = processor(text="USER: <video>\nwhere is the star ? ASSISTANT:", videos=random_video()).to(torch.bfloat16)
    (tokens,), (medium,) = shown(model, inputs), model.select_tokens(**inputs)
    kept, features = medium.kept[None], tokens.features  # one set of all frames
    nearest = nearest_kept(tokens.compared, kept, tokens.times, 1.0)
    old, means = (
        features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1])),
        group_means(features, nearest, 6),
    )
    expected = (old.float() + 0.3 * (means - old.float())).to(torch.bfloat16)
    assert torch.equal(medium.tokens, expected.flatten(0, 1)) and not torch.equal(
        expected, old.lerp(means.bfloat16(), 0.3)
    )
    assert torch.equal(medium.token_sizes, group_sizes(nearest, 6).flatten())


@pytest.mark.parametrize("method", ["rediprune_plus", "divprune", "rediprune"])
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_times_are_shares_of_the_video(method, frames):
    """A token of frame f of F is seen at f / F, whether the frames are apart or share a budget; in an image at 0."""
    for scope in ("frame", "video"):
        pruning = {"method": method, "keep_ratio": 0.25, "scope": scope}
        model, processor = tiny_model(**pruning), tiny_processor(**pruning)
        prompt = "USER: <video>\nwhere is the star ? ASSISTANT:"
        (tokens,) = shown(model, processor(text=prompt, videos=random_video(frames=frames)))
        expected = torch.arange(frames)[:, None].expand(-1, 16) / frames
        assert torch.equal(tokens.times, expected if scope == "frame" else expected.flatten()[None])
        image = processor(text=prompt.replace("video", "image"), images=random_image())
        for tokens in shown(model, image):
            assert tokens.times.dtype == torch.float32 and not tokens.times.any()
