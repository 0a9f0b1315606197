"""Tests of ops_selection.py: reference vectors, a slow reference step by step, and properties."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN
from rediprune.ops_query import QUERY_WEIGHTINGS, align_query, build_query
from rediprune.ops_selection import (
    CANDIDATE_POOLS,
    count_kept,
    rows_are_cheaper,
    select_random,
    select_rediprune,
    select_uniform,
)
from rediprune.ops_tokens import TIE_TOLERANCE, gather_tokens, group_means, group_sizes, nearest_kept, top_tokens
from safetensors.torch import load_file

MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def golden_cases(name):
    return pytest.mark.parametrize("case", MANIFEST[name], ids=lambda case: case["id"])


@pytest.fixture(scope="module")
def golden():
    files = {}

    def load(name, case, field):
        if name not in files:
            files[name] = load_file(GOLDEN / f"{name}.safetensors")
        return files[name][f"{case['id']}.{field}" if case else field]

    return load


# ------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize(
    "num_tokens, keep_ratio, count",
    [
        (144, 0.15, 22),
        (144, 0.1, 14),
        (576, 0.15, 86),
        (576, 0.1, 58),
        (257, 0.5, 128),
        (7, 0.5, 4),
        (5, 0.01, 1),
        (1, 1e-9, 1),
        (576, 1.0, 576),
        (36, 0.99, 36),
    ],
)
def test_count_kept(num_tokens, keep_ratio, count):
    assert count_kept(num_tokens, keep_ratio) == count


def test_count_kept_golden():
    assert len(MANIFEST["keep_count"]) == 108
    for case in MANIFEST["keep_count"]:
        assert count_kept(case["P"], case["ratio"]) == case["rediprune"], case


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True))
def test_count_kept_is_in_range(num_tokens, keep_ratio):
    assert 1 <= count_kept(num_tokens, keep_ratio) <= num_tokens


@pytest.mark.parametrize("num_tokens", [0, -3, 2.0, "7", None, True])
def test_count_kept_rejects_num_tokens(num_tokens):
    with pytest.raises(ValueError, match=r"num_tokens .*>= 1.*" + repr(num_tokens)):
        count_kept(num_tokens, 0.5)


@pytest.mark.parametrize("keep_ratio", [0, -0.1, 1.01, math.nan, math.inf, "0.5", None, True])
def test_count_kept_rejects_keep_ratio(keep_ratio):
    with pytest.raises(ValueError, match=r"keep_ratio .*\(0, 1\].*" + repr(keep_ratio)):
        count_kept(10, keep_ratio)


# ------------------------------------------------------------------------------------------------------------
# Query


@golden_cases("query_embedding")
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long])
def test_query_golden(case, mask_dtype, golden):
    table = golden("query_embedding", None, "embed_tokens").float()
    input_ids = golden("query_embedding", case, "input_ids")
    masks = [None] * case["B"]
    if case["has_mask"]:
        masks = golden("query_embedding", case, "attention_mask").to(mask_dtype)
    queries = []
    for ids, mask in zip(input_ids, masks):
        text = ids if mask is None else ids[mask.bool()]
        is_question = (text == MANIFEST["image_token_index"]).flip(0).cumsum(0).flip(0) == 0
        queries.append(build_query(table[text[is_question][-128:]]))
    torch.testing.assert_close(torch.stack(queries), golden("query_embedding", case, "expected"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("weighting", QUERY_WEIGHTINGS)
def test_short_texts(weighting):
    embeddings = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(build_query(embeddings, weighting), embeddings[0])
    empty = build_query(embeddings[:0].half(), weighting)
    assert empty.dtype == torch.float32 and empty.tolist() == [0.0] * 6


def test_query_weightings():
    # Embeddings at right angles: before the softmax A is the identity, so A = (I (e - 1) + 1) / (e + 2).
    embeddings = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    position_weights = torch.tensor([0.0391, 0.1753, 0.7856])  # proportional to 1, e^1.5, e^3
    mixing = (torch.eye(3) * (math.e - 1) + 1) / (math.e + 2)
    expected = {
        "average": torch.ones(3) / 3,
        "self_attention": torch.ones(3) / 3,
        "exponential": position_weights @ mixing,
        "middle_peak": torch.tensor([math.exp(-8 / 9), 1.0, math.exp(-8 / 9)]) / (1 + 2 * math.exp(-8 / 9)),
    }
    assert set(expected) == set(QUERY_WEIGHTINGS)
    for weighting, weights in expected.items():
        query = build_query(embeddings, weighting)
        torch.testing.assert_close(query, weights @ embeddings, atol=3e-4, rtol=0)


def test_self_attention_favours_what_the_text_repeats():
    embeddings = torch.eye(2)[[0, 0, 0, 1]]
    average, attended = build_query(embeddings, "average"), build_query(embeddings, "self_attention")
    assert attended[0] > average[0] == 0.75


@pytest.mark.parametrize("weighting", ["none", "Average", None])
def test_unknown_weighting(weighting):
    with pytest.raises(ValueError, match=f"exponential.*got {weighting!r}"):
        build_query(torch.ones(2, 3), weighting)


@pytest.mark.parametrize("query, dim, aligned", [
    ([1.0, 2, 3, 4], 4, [1.0, 2, 3, 4]),
    ([1.0, 3, 5, 9], 2, [2.0, 7]),
    ([1.0, 2, 6], 2, [1.5, 4]),
    ([1.0, 2], 5, [1.0, 2, 1, 2, 1]),
])  # fmt: skip
def test_align_query(query, dim, aligned):
    assert align_query(torch.tensor([query, query]).half(), dim).tolist() == [aligned, aligned]


# ------------------------------------------------------------------------------------------------------------
# Selection: reference vectors


@golden_cases("rediprune_select")
def test_rediprune_golden(case, golden):
    features = golden("rediprune_select", case, "visual_tokens")
    query = golden("rediprune_select", case, "text_query").reshape(1, -1)
    num_kept = count_kept(case["P"], case["keep_ratio"])
    pools = ["released"] if case["tau"] > 0 else ["released", "all"]
    for pool in pools:
        kept = select_rediprune(
            features[None],
            align_query(query, case["C"]),
            num_kept,
            alpha=case["alpha"],
            threshold=case["tau"],
            candidate_pool=pool,
        )
        assert kept[0].tolist() == golden("rediprune_select", case, "kept").tolist()


# DivPrune may keep nothing; this selection always keeps a token.
@pytest.mark.parametrize(
    "case", [case for case in MANIFEST["divprune_select"] if case["K"]], ids=lambda case: case["id"]
)
def test_divprune_golden(case, golden):
    kept = select_rediprune(golden("divprune_select", case, "features")[None], None, case["K"])
    assert kept[0].tolist() == golden("divprune_select", case, "kept").tolist()


def unit_vectors(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


@pytest.mark.parametrize("alpha, kept", [(0.5, [0, 3, 4]), (2, [0, 1, 2])])
def test_worked_example(alpha, kept):
    features, query = unit_vectors(0, 10, 80, 90, 180)[None], unit_vectors(0)
    assert select_rediprune(features, query, 3, alpha=alpha).tolist() == [kept]


def test_worked_example_without_query():
    features = unit_vectors(0, 10, 80, 90, 180)[None]
    assert [select_rediprune(features, None, k).tolist()[0] for k in (1, 2, 3)] == [[4], [0, 4], [0, 3, 4]]


# ------------------------------------------------------------------------------------------------------------
# Selection: a slow reference, one set and one step at a time


def first_largest(scores):
    return min(i for i in scores if scores[i] >= max(scores.values()) - TIE_TOLERANCE)


def most_relevant(tokens, relevance, number):
    return sorted(tokens, key=lambda i: (-relevance[i], i))[:number]


def algorithm1_pool(remaining, relevance, num_left, threshold, max_candidates):
    cap = max(num_left, min(max_candidates or len(remaining), len(remaining)))
    pool = [i for i in remaining if threshold <= 0 or relevance[i] >= threshold]
    if len(pool) < num_left:
        pool = most_relevant(remaining, relevance, cap)
    return most_relevant(pool, relevance, min(len(pool), cap, 3 * num_left))


def released_pool(tokens, relevance, num_kept, threshold):
    if threshold <= 0:
        return tokens
    if num_kept < len(tokens) // 2:
        return most_relevant(tokens, relevance, max(3 * num_kept, num_kept + 1))
    pool = [i for i in tokens if relevance[i] >= threshold]
    return pool if len(pool) >= num_kept else most_relevant(tokens, relevance, num_kept)


def reference_select(features, query, num_kept, alpha=0.5, threshold=0.0, candidate_pool="all", max_candidates=None):
    """(L, C), (C,) -> kept indices, in fp64 and straight from the definitions."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = (1 - unit @ unit.T).tolist()
    tokens = list(range(len(unit)))
    if query is None:
        relevance = [0.0] * len(unit)
        start = {i: min(distance[i][u] for u in tokens if u != i) for i in tokens}
    else:
        relevance = (unit @ torch.nn.functional.normalize(query.double(), dim=-1)).tolist()
        start = dict(enumerate(relevance))
    kept = []
    while len(kept) < num_kept:
        if candidate_pool == "all":
            pool = tokens
        elif candidate_pool == "released":
            pool = released_pool(tokens, relevance, num_kept, threshold)
        else:
            remaining = [i for i in tokens if i not in kept]
            pool = algorithm1_pool(remaining, relevance, num_kept - len(kept), threshold, max_candidates)
        pool = [i for i in pool if i not in kept]
        if not kept:
            scores = {i: start[i] for i in pool}
        else:
            scores = {i: min(distance[u][i] for u in kept) + alpha * relevance[i] for i in pool}
        kept.append(first_largest(scores))
    return sorted(kept)


@st.composite
def selections(draw, kinds=("gaussian", "clustered", "correlated")):
    """Features (N, L, C), query (N, C) and k with 1 <= k < L."""
    num_sets, num_tokens = draw(st.integers(1, 4)), draw(st.integers(2, 40))
    num_features = draw(st.sampled_from([8, 20, 64]))
    num_kept = draw(st.integers(1, num_tokens - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    features = torch.randn(num_sets, num_tokens, num_features, generator=generator)
    kind = draw(st.sampled_from(kinds))
    if kind == "correlated":  # as vision features are: a large part in common
        features = features + 2 * torch.randn(num_features, generator=generator)
    elif kind != "gaussian":
        noise = {"clustered": 0.3, "still": 1e-3, "near-identical": 1e-6, "identical": 0.0}[kind]
        num_clusters = 1 if kind == "identical" else draw(st.integers(1, min(4, num_tokens)))
        which = torch.randint(num_clusters, (num_tokens,), generator=generator)
        features = features[:, which] + noise * features
    query = torch.randn(num_sets, num_features, generator=generator)
    return features, query, num_kept


pool_options = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"candidate_pool": st.just("released"), "threshold": st.sampled_from([-1, 0, 0.1, 0.5])}),
    st.fixed_dictionaries(
        {
            "candidate_pool": st.just("algorithm1"),
            "threshold": st.sampled_from([-1, 0, 0.1, 0.5]),
            "max_candidates": st.sampled_from([None, 1, 5, 20]),
        }
    ),
)
alphas = st.sampled_from([-0.5, 0.0, 0.1, 0.5, 2.0])


@settings(examples, max_examples=150)
@given(selections(), alphas, pool_options)
def test_equals_slow_reference(selection, alpha, options):
    features, query, num_kept = selection
    kept = select_rediprune(features, query, num_kept, alpha=alpha, **options)
    expected = [reference_select(x, q, num_kept, alpha, **options) for x, q in zip(features, query)]
    assert kept.tolist() == expected


@examples
@given(selections())
def test_equals_slow_reference_without_query(selection):
    features, _, num_kept = selection
    kept = select_rediprune(features, None, num_kept)
    assert kept.tolist() == [reference_select(x, None, num_kept) for x in features]


def test_several_blocks_equal_slow_reference():
    generator = torch.Generator().manual_seed(0)
    features, query = (torch.randn(*shape, generator=generator) for shape in [(2, 203, 16), (2, 16)])
    kept = select_rediprune(features, query, 20)
    assert kept.tolist() == [reference_select(x, q, 20) for x, q in zip(features, query)]


def test_pools_differ():
    generator = torch.Generator().manual_seed(0)
    features, query = torch.randn(1, 60, 16, generator=generator), torch.randn(1, 16, generator=generator)
    kept = {
        pool: select_rediprune(features, query, 10, candidate_pool=pool, threshold=0.0 if pool == "all" else 0.05)
        for pool in CANDIDATE_POOLS
    }
    assert len({tuple(indices[0].tolist()) for indices in kept.values()}) == len(CANDIDATE_POOLS)


# ------------------------------------------------------------------------------------------------------------
# Selection: properties

any_kind = selections(kinds=("gaussian", "clustered", "correlated", "still", "near-identical", "identical"))


@settings(examples, max_examples=100)
@given(any_kind, alphas, pool_options, st.booleans())
def test_count_order_and_range(selection, alpha, options, with_query):
    features, query, num_kept = selection
    before = features.clone(), query.clone()
    if with_query:
        kept = select_rediprune(features, query, num_kept, alpha=alpha, **options)
    else:
        kept = select_rediprune(features, None, num_kept)
    assert kept.shape == (len(features), num_kept) and kept.dtype == torch.long
    assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < features.shape[1]
    assert torch.equal(features, before[0]) and torch.equal(query, before[1])


@settings(examples, max_examples=100)
@given(any_kind, alphas, pool_options, st.booleans())
def test_batch_invariance(selection, alpha, options, with_query):
    features, query, num_kept = selection
    if with_query:
        kept = select_rediprune(features, query, num_kept, alpha=alpha, **options)
        alone = [
            select_rediprune(features[i : i + 1], query[i : i + 1], num_kept, alpha=alpha, **options)
            for i in range(len(features))
        ]
    else:
        kept = select_rediprune(features, None, num_kept)
        alone = [select_rediprune(features[i : i + 1], None, num_kept) for i in range(len(features))]
    assert torch.equal(kept, torch.cat(alone))


@pytest.mark.parametrize("num_tokens", [144, 257])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-3])
def test_batch_invariance_of_still_videos(num_tokens, noise):
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(1, 12, 1024, generator=generator).repeat(1, num_tokens // 12 + 1, 1)[:, :num_tokens]
    features = scene + noise * torch.randn(8, num_tokens, 1024, generator=generator)
    query = torch.randn(1, 1024, generator=generator).expand(8, -1)
    kept = select_rediprune(features, query, 22)
    for sets in (slice(0, 1), slice(3, 4), slice(2, 5), slice(5, 8)):
        assert torch.equal(select_rediprune(features[sets], query[sets], 22), kept[sets])
    if noise <= 1e-6:  # the twelve different tokens, then copies, of which the first win
        assert select_rediprune(features, query, 22, alpha=0).tolist() == [list(range(22))] * 8


# Not of near-identical tokens, whose scores differ by about the width of a tie: there rounding decides what is one.
@examples
@given(
    selections(kinds=("gaussian", "clustered", "correlated", "still", "identical")),
    alphas, st.booleans(), st.booleans(), st.sampled_from([1, 3000]),
)  # fmt: skip
def test_groups_and_single_rows_select_the_same(selection, alpha, with_query, rows, cache_bytes):
    features, query, num_kept = selection
    query = query if with_query else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rediprune.ops_selection.rows_are_cheaper", lambda *sizes: False)
        expected = select_rediprune(features, query, num_kept, alpha=alpha)
        patch.setattr("rediprune.ops_selection.rows_are_cheaper", lambda *sizes: rows)
        patch.setattr("rediprune.ops_selection.CACHE_BYTES", cache_bytes)
        assert torch.equal(select_rediprune(features, query, num_kept, alpha=alpha), expected)


@pytest.mark.parametrize("num_tokens, num_features, num_kept, rows", [
    (144, 1024, 22, True), (144, 1024, 36, False),  # a frame of a 7B model
    (1152, 1024, 115, True), (1152, 4096, 115, False), (1152, 4096, 30, True),  # 8 of them jointly: 4096 leave the cache
    (288, 128, 32, True), (288, 128, 72, False),  # 8 frames of the tiny checkpoint
])  # fmt: skip
def test_the_cheaper_way_is_taken(monkeypatch, num_tokens, num_features, num_kept, rows):
    assert rows_are_cheaper(num_tokens, num_features, num_kept) == rows
    computed = []
    monkeypatch.setattr("rediprune.ops_selection._gram", lambda features: computed.append(1) or features @ features.mT)
    features, query = torch.randn(1, num_tokens, num_features), torch.randn(1, num_features)
    select_rediprune(features, query, num_kept)
    assert computed == ([] if rows else [1])


@examples
@given(selections(kinds=["identical"]), alphas, st.booleans())
def test_identical_tokens_keep_the_first(selection, alpha, with_query):
    features, query, num_kept = selection
    kept = select_rediprune(features, query if with_query else None, num_kept, alpha=alpha)
    assert kept.tolist() == [list(range(num_kept))] * len(features)


@examples
@given(selections(), st.randoms(use_true_random=False))
def test_permuted_tokens_select_the_same(selection, random):
    features, query, num_kept = selection
    permutation = torch.tensor(random.sample(range(features.shape[1]), features.shape[1]))
    kept = select_rediprune(features, query, num_kept)
    permuted = select_rediprune(features[:, permutation], query, num_kept)
    assert torch.equal(permutation[permuted].sort(dim=1).values, kept)


@examples
@given(selections(), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scale_does_not_matter(selection, feature_scale, query_scale):
    features, query, num_kept = selection
    kept = select_rediprune(features, query, num_kept)
    assert torch.equal(select_rediprune(features * feature_scale, query * query_scale, num_kept), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@examples
@given(selections())
def test_dtype_selects_as_its_fp32_copy(dtype, selection):
    features, query, num_kept = selection
    features, query = features.to(dtype), query.to(dtype)
    kept = select_rediprune(features, query, num_kept)
    assert torch.equal(kept, select_rediprune(features.float(), query.float(), num_kept))


@pytest.fixture
def video():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 144, 64, generator=generator) + torch.randn(64, generator=generator)
    return features, torch.randn(4, 64, generator=generator)


def test_surroundings_do_not_matter(video):
    features, query = video
    kept, query_vector = select_rediprune(features, query, 22), build_query(features[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select_rediprune(features, query, 22), kept)
        assert torch.equal(build_query(features[0]), query_vector)
    with torch.inference_mode():
        assert torch.equal(select_rediprune(features.clone(), query.clone(), 22), kept)
    trainable = features.clone().requires_grad_(), query.clone().requires_grad_()
    assert torch.equal(select_rediprune(*trainable, 22), kept)
    strided = torch.cat([torch.zeros(4, 1, 64), features], dim=1)[:, 1:]  # as after dropping the CLS token
    assert torch.equal(select_rediprune(strided, query, 22), kept)
    assert torch.equal(select_rediprune(features.mT.contiguous().mT, query, 22), kept)


def test_all_kept_and_no_sets(video):
    features, query = video
    for num_kept in (144, 200):
        assert torch.equal(select_rediprune(features, query, num_kept), torch.arange(144).expand(4, -1))
    assert select_rediprune(features[:0], query[:0], 5).shape == (0, 5)


def test_zero_query_starts_with_token_0(video):
    features, query = video
    kept = select_rediprune(features, torch.zeros_like(query), 22)
    assert (kept[:, 0] == 0).all() and len(set(map(tuple, kept.tolist()))) == len(kept)


def test_zero_token_is_at_distance_1():
    features = torch.tensor([[[0.9, 0.1], [1.0, 0.0], [0.0, 0.0], [0.8, 0.2]]])
    assert select_rediprune(features, torch.tensor([[1.0, 0.0]]), 2, alpha=0).tolist() == [[1, 2]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", CANDIDATE_POOLS)
def test_nonfinite_values_are_named(video, value, pool):
    features, query = video
    broken = features.clone()
    broken[1, 3, 5] = broken[3, 0, 0] = value
    with pytest.raises(ValueError, match=r"NaN.*sets \[1, 3\]"):
        select_rediprune(broken, query, 22, candidate_pool=pool)
    if pool == "all":
        with pytest.raises(ValueError, match=r"NaN.*sets \[1, 3\]"):
            select_rediprune(broken, None, 22)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"NaN.*sets \[1, 3\]"):
            patch.setattr("rediprune.ops_selection.CACHE_BYTES", 1)
            select_rediprune(broken, query, 22)
    broken = query.clone()
    broken[2, 0] = value
    with pytest.raises(ValueError, match=r"NaN.*sets \[2\]"):
        select_rediprune(features, broken, 22, candidate_pool=pool)


@pytest.mark.parametrize("changes, message", [
    ({"num_kept": 0}, "num_kept must be >= 1, got 0"),
    ({"features": torch.ones(5, 3)}, r"\(N, L, C\), got \(5, 3\)"),
    ({"features": torch.ones(2, 0, 3)}, "at least 1 token"),
    ({"query": torch.ones(3)}, r"\(2, 3\), got \(3,\)"),
    ({"query": torch.ones(1, 3)}, r"\(2, 3\), got \(1, 3\)"),
    ({"alpha": math.nan}, "alpha .*nan"),
    ({"alpha": 1e39}, r"alpha .*\[-1000000, 1000000\].*1e\+39"),
    ({"times": torch.ones(2, 5), "time_weight": 1e39}, "time_weight .*1e\\+39"),
    ({"threshold": 1.5, "candidate_pool": "released"}, r"threshold .*\[-1, 1\].*1.5"),
    ({"threshold": 0.1}, "threshold 0.1 needs candidate_pool"),
    ({"candidate_pool": "some"}, "candidate_pool .*algorithm1.*'some'"),
    ({"candidate_pool": "algorithm1", "query": None}, "needs a query"),
    ({"candidate_pool": "algorithm1", "max_candidates": 0}, "max_candidates .*got 0"),
    ({"max_candidates": 5}, "max_candidates .*got 5"),
])  # fmt: skip
def test_wrong_arguments(changes, message):
    arguments = {"features": torch.ones(2, 5, 3), "query": torch.ones(2, 3), "num_kept": 2} | changes
    with pytest.raises(ValueError, match=message):
        select_rediprune(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"candidate_pool": "released", "threshold": 0.05},
        {"candidate_pool": "algorithm1", "threshold": 0.05},
    ],
)
def test_cuda_selects_as_cpu(video, options):
    features, query = video
    kept = select_rediprune(features, query, 22, **options)
    assert torch.equal(select_rediprune(features.cuda(), query.cuda(), 22, **options).cpu(), kept)
    assert torch.equal(select_rediprune(features.cuda(), None, 22).cpu(), select_rediprune(features, None, 22))
    identical = torch.ones(3, 144, 64, device="cuda")
    assert select_rediprune(identical, identical[:, 0], 22).tolist() == [list(range(22))] * 3


@pytest.mark.parametrize("difference, kept", [(3e-7, 0), (2e-6, 1), (1e-5, 1)])
def test_a_tie_is_a_millionth_wide(difference, kept):
    """Scores closer than that are equal, and the first wins; farther apart they are not."""
    relevance = torch.tensor([[0.5, 0.5 + difference, 0.1]])
    options = {"relevance": relevance, "alpha": 1.0}
    assert select_rediprune(torch.eye(3)[None], None, 1, **options).tolist() == [[kept]]
    # The same from the second pick on: 2 is kept first, and 0 and 1 are equally far from it.
    features = torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1.0]]])
    relevance = torch.tensor([[0.0, difference, 1.0]])
    for rows in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rediprune.ops_selection.rows_are_cheaper", lambda *sizes: rows)  # noqa: B023
            assert select_rediprune(features, None, 2, relevance=relevance, alpha=1.0).tolist() == [[kept, 2]]
    assert nearest_kept(torch.eye(3)[None], torch.tensor([[0, 1]]))[0, 2] == 0
    tokens = torch.tensor([[[1.0, 0], [0, 1.0], [1.0, 1.0 + difference * 2]]])  # cosines apart by about 1.4 differences
    assert nearest_kept(tokens, torch.tensor([[0, 1]]))[0, 2] == kept
    assert top_tokens(torch.tensor([[0.5, 0.5 + difference]]), 1).tolist() == [[kept]]


# ------------------------------------------------------------------------------------------------------------
# Gathering and controls


def test_gather_tokens():
    features = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 4], [1, 2]])
    gathered = gather_tokens(features, indices)
    assert torch.equal(gathered, torch.stack([features[0, [0, 4]], features[1, [1, 2]]]))
    gathered.sum().backward()
    expected = torch.zeros(2, 5, 3, dtype=torch.float64)
    expected[0, [0, 4]] = expected[1, [1, 2]] = 1
    assert torch.equal(features.grad, expected)
    assert gather_tokens(features.bfloat16(), indices).dtype == torch.bfloat16


@examples
@given(st.integers(1, 60), st.integers(1, 60), st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_select_random(num_tokens, num_kept, seeds):
    kept = select_random(num_tokens, num_kept, seeds)
    assert kept.shape == (len(seeds), min(num_kept, num_tokens))
    assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < num_tokens
    assert torch.equal(kept, torch.cat([select_random(num_tokens, num_kept, [seed]) for seed in seeds]))


def test_select_random_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    kept = select_random(144, 22, range(100))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(row) for row in kept.tolist()}) == 100
    counts = kept.flatten().bincount(minlength=144)  # mean 15.3, standard deviation 3.6
    assert counts.min() > 0 and counts.max() < 35


@pytest.mark.parametrize("num_tokens, num_kept, kept", [
    (10, 1, [5]), (10, 2, [2, 7]), (9, 3, [1, 4, 7]), (7, 4, [0, 2, 4, 6]), (3, 3, [0, 1, 2]),
    (3, 9, [0, 1, 2]),
])  # fmt: skip
def test_select_uniform(num_tokens, num_kept, kept):
    assert select_uniform(num_tokens, num_kept).tolist() == kept


def test_controls_reject_empty_selections():
    for num_tokens, num_kept in [(0, 1), (5, 0)]:
        with pytest.raises(ValueError):
            select_uniform(num_tokens, num_kept)
        with pytest.raises(ValueError):
            select_random(num_tokens, num_kept, [0])


# ---------------------------------------------------------------------------------------------------------------
# Time, and what a kept token stands for


def slow_with_time(features, relevance, times, num_kept, alpha, time_weight):
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = 1 - unit @ unit.T + time_weight * (times[:, None] - times).abs()
    kept = [int(relevance.argmax())]
    while len(kept) < num_kept:
        score = distance[kept].amin(0) + alpha * relevance
        score[kept] = -torch.inf
        kept.append(int(score.argmax()))
    return sorted(kept)


@pytest.mark.parametrize("num_kept", [1, 3, 9, 20])
def test_time_is_a_part_of_the_distance(num_kept):
    generator = torch.Generator().manual_seed(0)
    features, relevance = torch.randn(5, 24, 8, generator=generator), torch.rand(5, 24, generator=generator)
    times = torch.arange(24).expand(5, -1) // 6 / 4
    options = {"relevance": relevance, "alpha": 0.3}
    kept = select_rediprune(features, None, num_kept, **options, times=times, time_weight=0.7)
    expected = [slow_with_time(*row, num_kept, 0.3, 0.7) for row in zip(features, relevance, times)]
    assert kept.tolist() == expected
    plain = select_rediprune(features, None, num_kept, **options)
    assert torch.equal(select_rediprune(features, None, num_kept, **options, times=times, time_weight=0.0), plain)
    assert torch.equal(select_rediprune(features, None, num_kept, **options, times=times * 0, time_weight=9.0), plain)


def test_equal_tokens_are_spread_over_time():
    times = torch.arange(8)[None] / 8
    kept = select_rediprune(torch.ones(1, 8, 4), None, 2, times=times, time_weight=1.0)
    assert kept.tolist() == [[0, 7]]


def test_groups_by_hand():
    angles = torch.deg2rad(torch.tensor([0.0, 10, 80, 90, 180]))
    features = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    nearest = nearest_kept(features, torch.tensor([[0, 3]]))
    assert nearest.tolist() == [[0, 0, 1, 1, 1]]
    assert group_sizes(nearest, 2).tolist() == [[2.0, 3.0]]
    values = torch.tensor([[[1.0], [3], [5], [7], [12]]])
    assert group_means(values, nearest, 2).tolist() == [[[2.0], [8.0]]]
    assert nearest_kept(features, torch.tensor([[1, 2, 4]])).tolist() == [[0, 0, 1, 1, 2]]
    times = torch.tensor([[0.0, 1, 0, 0, 0]])
    assert nearest_kept(features, torch.tensor([[0, 1]]), times, 5.0).tolist() == [
        [0, 1, 0, 0, 0]
    ]  # time alone decides


@examples
@given(any_kind)
def test_groups_hold_every_token_once(selection):
    features, query, num_kept = selection
    kept = select_rediprune(features, query, num_kept)
    nearest = nearest_kept(features, kept)
    assert torch.equal(nearest.gather(1, kept), torch.arange(num_kept).expand_as(kept))  # equal tokens, too
    sizes, means = group_sizes(nearest, num_kept), group_means(features, nearest, num_kept)
    assert sizes.dtype == torch.float32 and (sizes >= 1).all() and (sizes.sum(1) == features.shape[1]).all()
    totals = (means * sizes[..., None]).sum(1)
    torch.testing.assert_close(totals, features.float().sum(1), rtol=1e-3, atol=1e-3)
