"""Tests of the merging inside the vision encoder (EvoPrune, reconstruction)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rediprune.core_layout import split_budget
from rediprune.core_positions import pooled_places
from rediprune.hub_versions import clip_transformer
from rediprune.ops_merging import merge_tokens, merging_schedule
from rediprune.vision_clip import encode_and_merge, read_attention, run_tower
from tiny import IMAGE_SIZE, PATCHES


@pytest.mark.parametrize("num_tokens, num_kept, num_layers, schedule", [
    (576, 58, 23, {4: 324, 8: 183, 12: 103, 16: 58}),
    (256, 26, 23, {4: 145, 8: 82, 12: 46, 16: 26}),
    (576, 22, 23, {3: 300, 6: 156, 9: 81, 12: 42, 15: 22}),
    (576, 14, 23, {3: 310, 6: 167, 9: 90, 12: 48, 15: 26, 18: 14}),
    (144, 22, 5, {1: 90, 2: 56, 3: 35, 4: 22}),
    (64, 3, 2, {1: 3}),
    (64, 3, 1, {0: 3}),
    (10, 10, 23, {4: 10, 8: 10, 12: 10, 16: 10}),
])  # fmt: skip
def test_schedule(num_tokens, num_kept, num_layers, schedule):
    assert merging_schedule(num_tokens, num_kept, num_layers) == schedule


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 40))
def test_schedule_falls_to_the_count(num_tokens, num_kept, num_layers):
    num_kept = min(num_tokens, num_kept)
    schedule = merging_schedule(num_tokens, num_kept, num_layers)
    counts = list(schedule.values())
    assert counts[-1] == num_kept and counts == sorted(counts, reverse=True) and counts[0] <= num_tokens
    assert 0 <= min(schedule) and max(schedule) < num_layers


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 50), max_size=6), st.floats(0, 1))
def test_split_budget(sizes, share):
    total = int(share * sum(sizes))
    parts = split_budget(total, sizes)
    assert sum(parts) == total
    assert all(0 <= part <= size and abs(part - share * size) <= 1 + 1e-9 + share for part, size in zip(parts, sizes))


@pytest.mark.parametrize(
    "side, stride, cells", [(4, 2, [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]), (3, 2, [0] * 9)]
)
def test_pooled_places(side, stride, cells):
    assert pooled_places(torch.arange(side**2), side, stride).tolist() == cells


def tokens(num_sets=3, num_tokens=24, kind="gaussian"):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_sets, num_tokens, 6, generator=generator)
    states = {"gaussian": states, "identical": torch.ones_like(states), "zero": torch.zeros_like(states)}[kind]
    keys = states @ torch.randn(6, 4, generator=generator)
    attention = torch.rand(num_sets, num_tokens, generator=generator)
    attention = attention if kind == "gaussian" else torch.ones_like(attention)
    source_indices = torch.arange(num_tokens).expand(num_sets, -1)
    return states, keys, attention, torch.ones(num_sets, num_tokens), source_indices


def slow_merge(states, keys, attention, num_merged):
    """One step, one token at a time: groups of patches, and their means."""
    unit, count = F.normalize(keys, dim=-1), len(states)
    similarity = unit @ unit.T
    crowding = torch.stack([(similarity[i].sum() - similarity[i, i]) / (count - 1) for i in range(count)])
    scaled = lambda values: (values - values.min()) / (values.max() - values.min())  # noqa: E731
    diversity, weight = 1 - scaled(crowding), scaled(attention)
    partner = {a: max(range(1, count, 2), key=lambda b: float(similarity[a, b])) for a in range(0, count, 2)}  # noqa: B023
    priority = {a: float(similarity[a, b] - 0.3 * diversity[a] - 0.3 * weight[a]) for a, b in partner.items()}
    groups = {index: [index] for index in range(count)}
    for a in sorted(priority, key=priority.get, reverse=True)[:num_merged]:
        groups[partner[a]] += groups.pop(a)
    groups = sorted((sorted(group) for group in groups.values()), key=min)
    return torch.stack([states[group].mean(0) for group in groups]), [group[0] for group in groups]


@pytest.mark.parametrize("num_tokens, num_kept", [(24, 20), (24, 12), (25, 13), (2, 1)])
def test_one_step_equals_slow_reference(num_tokens, num_kept):
    states, keys, attention, sizes, source_indices = tokens(num_tokens=num_tokens)
    merged, new_sizes, new_indices = merge_tokens(states, keys, attention, sizes, source_indices, num_kept)
    assert (new_sizes.sum(1) == num_tokens).all()
    for index in range(3):
        expected, firsts = slow_merge(states[index], keys[index], attention[index], num_tokens - num_kept)
        torch.testing.assert_close(merged[index], expected)
        assert new_indices[index].tolist() == firsts


@pytest.mark.parametrize("kind", ["gaussian", "identical", "zero"])
@pytest.mark.parametrize("num_kept", [1, 2, 7, 23, 24])
def test_merging(kind, num_kept):
    """Whatever is merged, the count is met, nothing is lost, and a set is the same alone."""
    given_tokens = tokens(kind=kind)
    states, sizes, source_indices = merge_tokens(*given_tokens, num_kept)
    assert states.shape == (3, num_kept, 6) and (sizes.sum(1) == 24).all() and (sizes >= 1).all()
    assert (source_indices.diff(dim=1) > 0).all() and (source_indices[:, 0] >= 0).all()
    mean = (states * sizes[..., None]).sum(1) / 24
    torch.testing.assert_close(mean, given_tokens[0].mean(1))
    alone = merge_tokens(*(values[1:2] for values in given_tokens), num_kept)
    assert torch.equal(alone[2][0], source_indices[1])
    torch.testing.assert_close(alone[0][0], states[1])


def test_merging_in_half_precision():
    states, keys, attention, sizes, source_indices = tokens()
    half = merge_tokens(states.half(), keys.half(), attention, sizes, source_indices, 7)
    full = merge_tokens(states.half().float(), keys.half().float(), attention, sizes, source_indices, 7)
    assert half[0].dtype == torch.float16
    assert torch.equal(half[2], full[2]) and torch.equal(half[0], full[0].half())


def test_nan_raises():
    states, keys, attention, sizes, source_indices = tokens()
    keys[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"keys.*NaN.*sets \[1\]"):
        merge_tokens(states, keys, attention, sizes, source_indices, 7)


# -- in a tower ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels():
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_tower_that_merges_nothing_is_the_stock_tower(model, pixels):
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    for num_layers in (1, 2, 3):
        features, source_indices = encode_and_merge(tower, pixels, num_layers, PATCHES)
        torch.testing.assert_close(features, states[num_layers][:, 1:], atol=1e-4, rtol=1e-4)
        assert torch.equal(source_indices, torch.arange(PATCHES).expand(3, -1))


@torch.no_grad()
def test_a_token_of_many_patches_is_attended_to_as_many(model, pixels):
    """If all patches are the same, merging them changes nothing for the layers after it."""
    tower = model.model.vision_tower
    clip_transformer(tower).embeddings.position_embedding.weight[1:] = 0
    grey = torch.full_like(pixels, 0.3)
    states = tower(grey, output_hidden_states=True).hidden_states
    features, _ = encode_and_merge(tower, grey, 3, 5)
    torch.testing.assert_close(features, states[3][:, 1:6], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merging_in_the_tower(model, pixels):
    tower = model.model.vision_tower
    features, source_indices = encode_and_merge(tower, pixels, 2, 9)
    assert features.shape == (3, 9, 16) and (source_indices.diff(dim=1) > 0).all()
    alone = encode_and_merge(tower, pixels[1:2], 2, 9)
    assert torch.equal(alone[1][0], source_indices[1])
    torch.testing.assert_close(alone[0][0], features[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_patches_of_padding_are_left_out(model, pixels):
    inside = torch.arange(16, 40).expand(3, -1)
    features, source_indices = encode_and_merge(model.model.vision_tower, pixels, 2, 9, inside)
    assert features.shape == (3, 9, 16) and source_indices.min() >= 16 and source_indices.max() < 40


def test_gradient_flows_through_the_merging_tower(model, pixels):
    features, _ = encode_and_merge(model.model.vision_tower, pixels, 2, 9)
    features.square().sum().backward()
    weight = clip_transformer(model.model.vision_tower).embeddings.patch_embedding.weight
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@torch.no_grad()
def test_attention_and_keys_are_those_of_the_eager_tower(model, pixels):
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    output = tower(pixels, output_hidden_states=True, output_attentions=True)
    required_signals = {"cls_attention", "keys", "cls_features", "last_cls_attention", "last_keys", "last_attention"}
    found = read_attention(tower, output.hidden_states, -2, required_signals)
    received = output.attentions[2].mean((1, 2))[..., None]
    torch.testing.assert_close(found["last_attention"], received[:, 1:], atol=1e-5, rtol=1e-4)
    assert torch.equal(found["cls_features"], output.hidden_states[2][:, :1].expand(-1, 64, -1))
    with_cls = read_attention(tower, output.hidden_states, -2, required_signals, with_cls=True)
    torch.testing.assert_close(with_cls["last_attention"], received, atol=1e-5, rtol=1e-4)
    assert with_cls["cls_features"].shape[1] == 65
    expected = output.attentions[1].mean(1)[:, 0, 1:, None]
    torch.testing.assert_close(found["cls_attention"], expected, atol=1e-5, rtol=1e-4)
    layers = clip_transformer(tower).encoder.layers
    keys = layers[1].self_attn.k_proj(layers[1].layer_norm1(output.hidden_states[1]))[:, 1:]
    torch.testing.assert_close(found["keys"], keys.unflatten(-1, (2, 8)).mean(2))
    last = layers[2].layer_norm1(output.hidden_states[2])
    query, last_keys = layers[2].self_attn.q_proj(last[:, :1]), layers[2].self_attn.k_proj(last)
    wide = (query @ last_keys.mT / 16**0.5).softmax(-1)[:, 0, 1:, None]  # one head as wide as all
    torch.testing.assert_close(found["last_cls_attention"], wide, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["last_keys"], last_keys[:, 1:])


@pytest.mark.parametrize("taps, required_signals, kept", [
    ([-2], set(), {2}),
    ([-1, 0], set(), {3, 0}),
    ([-2], {"keys", "relevance"}, {2, 1}),
    ([1], {"cls_attention", "last_keys"}, {1, 0, 2}),
    ([0], {"keys"}, {0}),
    ([1], {"cls_features"}, {1}),
    ([1], {"cls_features", "last_attention"}, {1, 2}),
])  # fmt: skip
def test_the_tower_keeps_what_is_asked_for(model, pixels, taps, required_signals, kept):
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    layers = clip_transformer(tower).encoder.layers
    before = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers]
    with torch.no_grad():
        found = run_tower(tower, pixels, taps, required_signals)
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers] == before
    assert found.keys() == kept
    assert all(torch.equal(found[index], states[index]) for index in kept)
    with_gradients = run_tower(tower, pixels, taps, required_signals)
    assert all(torch.equal(with_gradients[index], states[index]) for index in kept)
    assert all(with_gradients[index].requires_grad for index in kept)
    attention = required_signals - {"relevance"}
    for name, values in read_attention(tower, found, taps[-1], required_signals).items():
        assert torch.equal(values, read_attention(tower, states, taps[-1], attention)[name])


def test_a_layer_that_does_not_exist(model, pixels):
    with torch.no_grad(), pytest.raises(ValueError, match="vision_feature_layer 7 does not exist .* 3 layers"):
        run_tower(model.model.vision_tower, pixels, [7])
