"""The methods for videos: the authors' own results with the authors' counts, fixed counts, segments, windows and clusters."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from places import GOLDEN
from rediprune.configuration_rediprune import PruningConfig
from rediprune.core_layout import TokenGrid
from rediprune.methods_base import VisualTokens
from rediprune.methods_registry import METHODS
from rediprune.methods_still import (
    Window,
    contiguous,
    frame_segments,
    loosened,
    merge_holitom,
    merge_prunevid,
    place_cosines,
    released_count,
    still_segments,
    still_windows,
)
from rediprune.methods_video import (
    anchor_frames,
    fastvid_plan,
    frame_counts,
    merge_fastvid,
    merge_flashvid,
    merge_trees,
    neighbour_cosines,
    pick_attended,
    vidcom2_scores,
)
from rediprune.ops_video import cluster_tokens, cut_segments, density_peaks, most_of_rows, share_out, spans
from safetensors.torch import load_file
from tiny import random_video, tiny_model, tiny_processor

CASES = json.loads((GOLDEN / "video_methods.json").read_text())
VIDEO_METHODS = ("vidcom2", "fastvid", "flashvid", "holitom", "prunevid")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "video_methods.safetensors")


def golden_cases(name):
    return pytest.mark.parametrize("case", CASES[name], ids=lambda case: case["id"])


def fields(golden, case, *names):
    """Inputs in fp32, results as they are."""
    found = [golden[f"{case['id']}.{name}"] for name in names]
    return [values.float() if values.dtype == torch.float16 else values for values in found]


def assert_tokens(found, tokens, places=None):
    """Equal to 1e-4 of the largest value, and in their places."""
    assert found[0].shape == tokens.shape
    assert (found[0] - tokens).abs().max() <= 1e-4 * tokens.abs().max()
    assert places is None or found[1].tolist() == places.tolist()


# -- the authors' results ------------------------------------------------------------------------------------------------


@golden_cases("vidcom2")
def test_vidcom2_golden(case, golden):
    features, kept = fields(golden, case, "features", "kept")
    scores, shares = vidcom2_scores(features, case["retention_ratio"])
    counts = (shares * case["P"]).round().clamp_min(1).long()
    assert counts.tolist() == case["per_frame"]
    assert most_of_rows(scores, counts).flatten().nonzero()[:, 0].tolist() == kept.tolist()


@golden_cases("fastvid")
def test_fastvid_golden(case, golden):
    names = ("features", "attention", "frame_features", "segments", "tokens", "positions")
    features, attention, frames, lengths, tokens, places = fields(golden, case, *names)
    segments = cut_segments(neighbour_cosines(frames), case["c"], case["tau"])
    assert segments == lengths.tolist()
    budget = int(case["retention_ratio"] * case["P"])
    context = int(budget * case["d"])
    anchors, own = [0] * case["F"], set()
    for index, span in enumerate(spans(segments)):
        of_segment = anchor_frames(span, case["p"])
        each = context * segments[index] // len(of_segment)
        for frame in of_segment:
            anchors[frame] = each
        if each == context:
            own.add(index)
    salient = [budget - context] * case["F"]
    assert_tokens(merge_fastvid(features, attention, segments, salient, anchors, own, case["beta"]), tokens, places)


@golden_cases("flashvid")
def test_flashvid_golden(case, golden):
    names = ("features", "attention", "segments", "tokens", "positions")
    features, attention, lengths, tokens, places = fields(golden, case, *names)
    segments = cut_segments(neighbour_cosines(features.mean(1)), case["min_segment_num"], case["segment_threshold"])
    assert segments == lengths.tolist()
    budget = math.ceil(case["P"] * case["retention_ratio"] * case["expansion"])
    counts = [math.ceil(case["alpha"] * budget)] * case["F"]
    weighed = case["token_selection_method"] == "attn_div_v2"
    picked = pick_attended(features, attention, counts, segments if weighed else None)
    budgets = [budget] * case["F"]
    found = merge_flashvid(features, picked, segments, budgets, case["temporal_threshold"], released=True)
    assert_tokens(found, tokens, places)
    assert len(places) - len(set(places.tolist())) == case["repeated_positions"]


@golden_cases("holitom")
def test_holitom_golden(case, golden):
    names = ("features", "attention", "windows", "ratio", "tokens", "positions")
    features, attention, first_and_last, ratio, tokens, places = fields(golden, case, *names)
    windows = still_windows(place_cosines(features) > case["tau"], case["max_window"])
    assert [[window.start, window.stop - 1] for window in windows] == first_and_last.tolist()
    left = sum(sum(window.sizes) for window in windows)
    share = min(1, case["retain_ratio"] / (left / (case["F"] * case["P"])))
    assert share == pytest.approx(ratio.item())
    counts = []
    for window in windows:
        still, *moving = window.sizes
        counts += [round(still * share), *(math.ceil(size * share) for size in moving)]
    assert_tokens(merge_holitom(features, attention, windows, counts, case["beta"], case["knn"]), tokens, places)


@golden_cases("prunevid")
def test_prunevid_golden(case, golden):
    names = ("features", "window_sizes", "static_sizes", "dynamic_sizes", "tokens")
    features, lengths, still, moving, tokens = fields(golden, case, *names)
    segments = frame_segments(features, case["temporal_segment_ratio"])
    assert segments == lengths.tolist()
    windows, _ = still_segments(features, segments, case["tau"])
    counts = [[released_count(size, case["cluster_ratio"]) for size in window.sizes] for window in windows]
    assert [of_window[0] for of_window in counts] == still.tolist()
    assert [sum(of_window[1:]) for of_window in counts] == moving.tolist()
    assert_tokens(merge_prunevid(features, windows, sum(counts, [])), tokens)


# -- fixed counts --------------------------------------------------------------------------------------------------------


def video(num_frames, num_tokens, seed=0, width=8, kind="drifting"):
    """Features (1, F * P, C) of a video in which things move slowly, or do not move at all, or are all the same."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features = draw(1, num_tokens, width).expand(num_frames, -1, -1).clone()
    if kind == "drifting":
        features[num_frames // 2 :] += draw(num_tokens, width)
        features += 0.2 * draw(num_frames, num_tokens, width)
    if kind == "same":
        features = features[:1, :1].expand(num_frames, num_tokens, -1)
    score = draw(num_frames * num_tokens).softmax(0)[None]
    features = features.reshape(1, -1, width) + 1
    frames = features.unflatten(1, (num_frames, -1)).mean(2, keepdim=True).expand(-1, -1, num_tokens, -1)
    return VisualTokens(
        features,
        projected=features,
        cls_attention=score,
        last_attention=score,
        cls_features=frames.flatten(1, 2),
        grid=TokenGrid(num_frames, 1, num_tokens),
    )


@pytest.mark.parametrize("name", VIDEO_METHODS)
@pytest.mark.parametrize("kind", ["drifting", "still", "same"])
@pytest.mark.parametrize("size", [(1, 12), (2, 9), (3, 1), (9, 6)], ids=str)
def test_every_count_is_met(name, kind, size):
    tokens, method = video(*size, kind=kind), METHODS[name]
    for options in ({}, {"least_segments": 1, "segment_threshold": -1.0, "still_threshold": 0.2}):
        pruning = PruningConfig(method=name, **options)
        for count in range(1, math.prod(size), 1 + math.prod(size) // 12):
            features, kept = method.reduce(tokens, count, pruning)
            assert features.shape == (1, count, 8) and features.isfinite().all()
            assert (
                kept.shape == (1, count)
                and (kept.diff(dim=1) > 0).all()
                and 0 <= kept.min() <= kept.max() < math.prod(size)
            )


@pytest.mark.parametrize("name", ["fastvid", "flashvid", "holitom", "prunevid"])
def test_a_merged_token_lies_within_the_tokens_of_the_video(name):
    tokens = video(6, 9)
    features, _ = METHODS[name].reduce(tokens, 12, PruningConfig(method=name, least_segments=2, mean_of_trees=True))
    low, high = tokens.features.amin(1), tokens.features.amax(1)
    assert (features >= low - 1e-5).all() and (features <= high + 1e-5).all()


def test_a_video_that_stands_still_is_its_first_frame():
    """As many tokens as a frame has: each place once, whatever the number of frames."""
    tokens = video(6, 9, kind="still")
    for name in ("holitom", "prunevid"):
        features, kept = METHODS[name].reduce(tokens, 9, PruningConfig(method=name))
        assert kept.tolist() == [list(range(9))]
        torch.testing.assert_close(features, tokens.features[:, :9])


@pytest.mark.parametrize("shares, total, most, expected", [
    ([1, 1, 1], 7, [9, 9, 9], [3, 2, 2]), ([1, 2, 3], 6, [9, 9, 9], [1, 2, 3]), ([1, 1, 8], 9, [9, 9, 4], [3, 2, 4]),
    ([0, 0, 0], 4, [2, 2, 2], [2, 1, 1]), ([5, 1], 0, [3, 3], [0, 0]), ([0, 1], 5, [3, 3], [2, 3]),
    ([0.1, 0.2, 0.7], 10, [10, 10, 10], [1, 2, 7]), ([1, 1, 1], 9, [3, 3, 3], [3, 3, 3]),
    ([1, 5], 3, [0, 9], [0, 3]),
])  # fmt: skip
def test_largest_remainders(shares, total, most, expected):
    assert share_out(shares, total, most) == expected


def test_frames_of_vidcom2_have_a_token_each_if_there_are_as_many():
    assert frame_counts([0.01, 0.01, 0.98], 4, 3) == [1, 1, 2]
    assert frame_counts([0.01, 0.01, 0.98], 2, 3) == [0, 0, 2]
    assert frame_counts([0.2, 0.2, 0.4], 8, 9) == [2, 2, 4]


def test_unusual_frames_keep_more_of_vidcom2():
    """Of frames that are alike but one, that one; tokens near the mean of the video and of their frame leave first."""
    tokens = video(5, 6, kind="still")
    tokens.projected = tokens.projected.unflatten(1, (5, 6)).clone()
    tokens.projected[0, 3] = -tokens.projected[0, 3]
    tokens.projected = tokens.projected.flatten(1, 2)
    kept = METHODS["vidcom2"].select(tokens, 10, PruningConfig(method="vidcom2"))[0]
    counts = torch.bincount(kept // 6, minlength=5).tolist()
    assert sum(counts) == 10 and counts[3] > max(counts[:3] + counts[4:])


def test_fastvid_takes_more_anchor_frames_where_they_are_full():
    salient, anchors, own = fastvid_plan([4], 10, 8)  # int(0.4 * 8) = 3 anchors in the last frame
    assert (sum(salient), anchors, own) == (5, [0, 0, 0, 3], set())
    salient, anchors, own = fastvid_plan([4], 10, 36)
    assert sum(salient) + sum(anchors) == 36 and own == {0} and all(map(lambda s, a: s + a <= 10, salient, anchors))


# -- in the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("scope", ["frame", "video", "item"])
def test_a_method_knows_the_grid_of_its_sets(family, scope):
    """Frames of a video that shares a budget; a row of tokens where grids of several sizes share one."""
    pruning = {"method": "vidcom2", "keep_ratio": 0.3, "scope": scope}
    if family.refusal(**pruning):
        return
    processor, model = family.processor(**pruning), family.model(**pruning)
    for index in range(len(family.prompts())):
        for item in model.select_tokens(**family.inputs(processor, index), return_signals=True):
            grids, shares = item.layout.grids, scope == "item" or scope == "video" and item.kind == "video"
            expected = [grid._replace(frames=1) for grid in grids]
            if shares:
                expected = list(grids) if len(grids) == 1 else [TokenGrid(1, 1, item.layout.num_tokens)]
            assert [signals.grid for signals in item.signals] == expected
            for signals in item.signals:
                assert signals.features.shape[1] == TokenGrid(*signals.grid).num_tokens


@torch.no_grad()
def test_attention_of_a_tower_without_cls():
    """A SigLIP gives what the methods of SigLIP's papers read; pooled like the features."""
    family = next(family for family in FAMILIES if family.name == "llava_onevision")
    model, processor = (
        family.model(method="flashvid", keep_ratio=0.3),
        family.processor(method="flashvid", keep_ratio=0.3),
    )
    tower = model.model.vision_tower
    pixels = torch.randn(
        3, 3, tower.config.image_size, tower.config.image_size, generator=torch.Generator().manual_seed(0)
    )
    found = model.patch_features(pixels, {"last_attention"})
    tower.set_attn_implementation("eager")
    received = tower(pixels, output_attentions=True).attentions[-1].mean((1, 2))[..., None]
    torch.testing.assert_close(found["last_attention"], received, atol=1e-5, rtol=1e-4)
    tower.set_attn_implementation("sdpa")
    for index in range(len(family.prompts())):
        for item in model.select_tokens(**family.inputs(processor, index), return_signals=True):
            assert all(
                signals.last_attention.shape == signals.features.shape[:2] for signals in item.signals if signals
            )


@torch.no_grad()
@pytest.mark.parametrize("name", ["vidcom2", "fastvid"])
def test_what_was_pruned_behind_the_projector_goes_on_as_it_is(name, monkeypatch):
    pruning = {"method": name, "keep_ratio": 0.3}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    inputs = processor(text="USER : <video> what moves ? ASSISTANT :", videos=[random_video()])
    seen, language_model = [], model.model.language_model
    call = language_model.forward
    monkeypatch.setattr(language_model, "forward", lambda **given: seen.append(given["inputs_embeds"]) or call(**given))
    model(**inputs)
    (item,) = model.select_tokens(**inputs)
    tokens = item.tokens if METHODS[name].after_projector else model.model.multi_modal_projector(item.tokens)
    assert torch.equal(seen[0][inputs["input_ids"] == model.config.video_token_id], tokens)


# -- segments, windows, clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("least, threshold, expected", [
    (1, -1, [6]), (2, -1, [2, 4]), (3, -1, [2, 3, 1]), (1, 0.6, [2, 3, 1]), (9, -1, [1, 1, 1, 1, 1, 1]), (2, 0.6, [2, 3, 1]),
])  # fmt: skip
def test_segments_are_cut_where_frames_differ_most(least, threshold, expected):
    assert cut_segments(torch.tensor([0.9, 0.1, 0.8, 0.7, 0.5]), least, threshold) == expected


def test_segments_of_one_frame():
    assert cut_segments(torch.zeros(0), 8, 0.9) == [1]


@pytest.mark.parametrize("labels, expected", [
    ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1]),
    ([0, 0, 1, 0, 0], [0, 0, 0, 0, 0]),  # a run of one frame; both runs of 0 are the longest
    ([0, 0, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1]),  # the end has a neighbour on the left alone
    ([1, 0, 0, 2, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]),  # the left grew first
    ([0, 0, 2, 1, 1], [0, 0, 0, 1, 1]),  # of equal ones the left
    ([0, 1, 2], [0, 0, 0]),
])  # fmt: skip
def test_contiguous_labels(labels, expected):
    assert contiguous(labels) == expected


def test_windows_save_as_much_as_any_cut_does():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        still = torch.rand(5, 4, generator=generator) < 0.7

        def saved(bounds):
            pairs = zip(bounds, bounds[1:])
            return sum(
                (stop - start - 1) * int(still[start : stop - 1].all(0).sum())
                for start, stop in pairs
                if stop - start > 1
            )  # noqa: B023

        cuts = [[0, *[place for place in range(1, 6) if mask >> place & 1], 6] for mask in range(0, 64, 2)]
        windows = still_windows(still)
        assert [window.start for window in windows[1:]] == [window.stop for window in windows[:-1]]
        assert saved([0, *(window.stop for window in windows)]) == max(map(saved, cuts))
        for start, stop, places in windows:
            assert places.tolist() == (still[start : stop - 1].all(0).tolist() if stop - start > 1 else [False] * 4)
        assert all(window.stop - window.start <= 2 for window in still_windows(still, longest=2))


def test_places_that_move_most_are_given_up_first():
    window = Window(0, 4, torch.tensor([True, True, False, True]))
    strengths = [torch.tensor([0.9, 0.8, 0.1, 0.95])]
    sizes = lambda least: [of.still.tolist() for of in loosened([window], strengths, least)]  # noqa: E731
    assert sizes(7) == [[True, True, False, True]]
    assert sizes(8) == sizes(10) == [[True, False, False, True]]
    assert sizes(11) == [[False, False, False, True]] and sizes(16) == [[False] * 4]


def test_density_peaks_by_hand():
    """Two groups on a line: the middle of the larger one is densest, and has the largest distance of all as its peak."""
    places = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    scores, distances = density_peaks(places, 3)
    assert distances[0].tolist() == pytest.approx([0, 1, 2, 10, 11])
    spread = torch.tensor([5 / 3, 2 / 3, 5 / 3, (1 + 64) / 3, (1 + 81) / 3])
    peak = torch.tensor([1.0, 11, 1, 8, 1])
    torch.testing.assert_close(scores, ((-spread).exp() * peak).double())
    centres, members = cluster_tokens(places, 2, 3)
    assert centres.tolist() == [1, 0] and members.tolist() == [1, 0, 0, 0, 0]


def test_trees_are_means_of_their_tokens_where_that_is_asked_for():
    """One thing in four frames: the authors' quotient grows with the chain, the mean does not."""
    features = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1)
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    for mean_of_trees, factor in ((True, 1), (False, 2)):  # a chain of four is four tokens over two
        values, roots = merge_trees(features, nothing, 0.9, 1, mean_of_trees)
        assert roots.tolist() == [[True] * 5, *[[False] * 5] * 3]
        torch.testing.assert_close(values[0], factor * features[0])


def test_trees_leave_as_many_tokens_as_they_have_to():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 9, 6, generator=generator) + 0.1 * torch.randn(3, 9, 6, generator=generator)
    picked = torch.zeros(3, 9, dtype=torch.bool)
    picked[:, :2] = True
    for least in range(9, 28):
        _, roots = merge_trees(features, picked, -1.0, least, False)
        # 7 roots and 6 picked ones at least; the higher threshold is that of a token that then stays, too.
        assert int(roots.sum()) + 6 == (13 if least <= 13 else min(least + 1, 27))
        assert not (roots & picked).any()


def test_attended_tokens_are_far_from_one_another():
    """With equal attention it is DivPrune's rule; attention draws the choice to itself."""
    tokens = video(3, 12)
    features = tokens.features.unflatten(1, (3, 12))[0]
    even = pick_attended(features, torch.full((3, 12), 1 / 12), [4, 3, 2])
    assert even.sum(1).tolist() == [4, 3, 2]
    alone = METHODS["divprune"].select(
        VisualTokens(features[0][None], compared=features[0][None]), 4, PruningConfig(method="divprune")
    )
    assert even[0].nonzero()[:, 0].tolist() == alone[0].tolist()
    attention = F.one_hot(torch.tensor([5, 6, 7]), 12) + 1e-4
    assert pick_attended(features, attention, [1, 1, 1]).nonzero()[:, 1].tolist() == [5, 6, 7]
