"""Tests of the pruning methods as pure tensor functions: reference vectors, worked examples, and what every method holds to."""

import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from places import GOLDEN
from rediprune.configuration_rediprune import PruningConfig
from rediprune.methods_base import VisualTokens
from rediprune.methods_coverage import select_coverage
from rediprune.methods_registry import METHODS
from rediprune.methods_relevance import select_conditional_dpp, unit_range
from rediprune.ops_relevance import word_affinity
from rediprune.ops_tokens import top_tokens
from safetensors.torch import load_file

MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())

# What each method has of its own where the configuration leaves it open.
OF_ALL = {
    "relevance": "pooled",
    "relevance_with_tower": None,
    "words": "all",
    "scope": "frame",
    "distance": "features",
    "time_weight": 0.0,
    "group_time_weight": None,
    "proportional_attention": False,
    "merge_weight": 0.0,
    "positions": "compact",
}
OWN = {
    "rediprune": {},
    "rediprune_plus": {
        "relevance": "late_attention",
        "scope": "video",
        "distance": "projected",
        "time_weight": 0.25,
        "group_time_weight": 1.0,
        "proportional_attention": True,
        "merge_weight": 0.3,
        "positions": "original",
    },
    "divprune": {"scope": "item", "distance": "projected"},
    "cdpruner": {"relevance": "projected", "relevance_with_tower": "clip"},
    "scope": {},
    "mmtok": {"words": "content"},
    "evoprune": {},
    "evoprune_rediprune": {},
    "visionzip": {},
    "prumerge": {},
    "prumerge_plus": {},
    "trim": {"relevance": "projected", "relevance_with_tower": "clip"},
    "vidcom2": {"scope": "video"},
    "fastvid": {"scope": "video", "positions": "original"},
    "flashvid": {"scope": "video"},
    "holitom": {"scope": "video"},
    "prunevid": {"scope": "video"},
    "random": {},
    "fastv": {},
    "vtw": {},
    "dart": {},
    "uniform": {},
    "downsample": {},
    "none": {},
}
REQUIRED_SIGNALS = {
    "rediprune": {"relevance", "compared", "times"},
    "rediprune_plus": {"relevance", "compared", "times"},
    "divprune": {"compared", "times"},
    "cdpruner": {"projected", "relevance"},
    "scope": {"cls_attention"},
    "mmtok": {"text_affinity"},
    "evoprune": set(),
    "evoprune_rediprune": {"relevance", "compared", "times"},
    "visionzip": {"cls_attention", "keys"},
    "prumerge": {"last_cls_attention", "last_keys"},
    "prumerge_plus": {"last_cls_attention", "last_keys"},
    "trim": {"relevance"},
    "vidcom2": {"projected"},
    "fastvid": {"cls_attention", "cls_features"},
    "flashvid": {"last_attention"},
    "holitom": {"last_attention"},
    "prunevid": set(),
    "fastv": set(),
    "vtw": set(),
    "dart": set(),
    "random": {"seeds"},
    "uniform": set(),
    "downsample": set(),
    "none": set(),
}
CONSTANTS = {
    "methods_coverage": {"VISION_TEMPERATURE": 0.2, "VISION_WEIGHT": 0.5},
    "ops_relevance": {"WORD_TEMPERATURE": 0.02},
    "methods_attention": {"NEIGHBOURS": 32, "CONTEXTUAL_SHARE": 10 / 64},
    "ops_merging": {"DIVERSITY_WEIGHT": 0.3, "ATTENTION_WEIGHT": 0.3, "MIN_STEPS": 4},
    "ops_selection": {"POOL_FACTOR": 3},
    "methods_still": {
        "STILL_WEIGHT": 0.6,
        "NEIGHBOURS": 7,
        "LONGEST_WINDOW": 1024,
        "SEGMENT_SHARE": 0.25,
        "CLUSTER_SHARE": 0.5,
        "LEAST_CLUSTERED": 15,
    },
    "methods_video": {
        "CHANNEL_SHARE": 0.5,
        "FRAME_TEMPERATURE": 0.01,
        "WIDTHS": (1 / 8, 1 / 4, 1 / 2, 1, 2),
        "CONTEXT_SHARE": 0.4,
        "ANCHOR_INTERVAL": 4,
        "ANCHOR_WEIGHT": 0.6,
        "NEIGHBOURS": 4,
        "ATTENDED_SHARE": 0.7,
        "MOST_NEIGHBOURS": 7,
    },
    "ops_tokens": {"TIE_TOLERANCE": 1e-6, "RELATIVE_TIE": 1e-7},
    "inputs_text_tower": {"SEGMENT": 77},
}

# Every method that works on what the vision tower gives; those that work inside it are in test_evoprune.py.
REDUCING = [
    name for name, method in METHODS.items() if name != "none" and method.inner is None and not method.merges_in_encoder
]


def test_every_methods_own_values():
    found = {name: {key: getattr(method, key) for key in OF_ALL} for name, method in METHODS.items()}
    assert found == {name: {**OF_ALL, **own} for name, own in OWN.items()}
    assert {name: set(method.required_signals) for name, method in METHODS.items()} == REQUIRED_SIGNALS


@pytest.mark.parametrize("module", CONSTANTS)
def test_constants(module):
    found = vars(importlib.import_module(f"rediprune.{module}"))
    assert {name: found[name] for name in CONSTANTS[module]} == CONSTANTS[module]


@pytest.fixture(scope="module", params=["divprune_select", "cdpruner_select"])
def golden_file(request):
    return request.param, load_file(GOLDEN / f"{request.param}.safetensors")


def test_golden(golden_file):
    name, tensors = golden_file
    for case in MANIFEST[name]:
        field = lambda key: tensors[f"{case['id']}.{key}"]  # noqa: E731
        if name == "divprune_select":
            if case["K"]:  # DivPrune may keep nothing, here a token always stays
                tokens = VisualTokens(features=field("features")[None], compared=field("features")[None])
                kept = METHODS["divprune"].select(tokens, case["K"], PruningConfig())
                assert kept[0].tolist() == field("kept").tolist(), case["id"]
            continue
        patches, texts = (F.normalize(field(key).float(), dim=-1) for key in ("image_embeds", "text_embeds"))
        relevance = -(patches @ texts.T).mean(-1)
        assert_kept = lambda quality, key: torch.testing.assert_close(  # noqa: E731
            select_conditional_dpp(field("image_features"), quality, case["num_kept"]), field(key), msg=case["id"]
        )
        assert_kept(unit_range(relevance), "kept_single")
        whole_batch = unit_range(relevance.flatten()[None]).view_as(relevance)  # as the reference scales
        assert_kept(whole_batch, "kept")


@pytest.fixture(scope="module")
def coverage_vectors():
    return load_file(GOLDEN / "coverage_select.safetensors")


@pytest.mark.parametrize("case", MANIFEST["scope_select"] + MANIFEST["mmtok_select"], ids=lambda case: case["id"])
def test_golden_coverage(case, coverage_vectors):
    field = lambda key: coverage_vectors[f"{case['id']}.{key}"].float()[None]  # noqa: E731
    if "T" in case:
        rows = word_affinity(field("words")[0], field("projected")) / case["T"]
        method, tokens = "mmtok", VisualTokens(field("features"), text_affinity=rows)
    else:
        method, tokens = "scope", VisualTokens(field("features"), cls_attention=field("cls_attention"))
    kept = METHODS[method].select(tokens, case["K"], PruningConfig(method=method))
    assert kept.tolist() == field("kept").long().tolist()


# ---------------------------------------------------------------------------------------------------------------
# Worked examples: unit vectors at 0, 10, 80, 90 and 180 degrees


@pytest.fixture
def compass():
    angles = torch.deg2rad(torch.tensor([0, 10, 80, 90, 180], dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()[None]


def test_rediprune(compass):
    relevance = compass[..., 0]
    kept = lambda alpha: METHODS["rediprune"].select(  # noqa: E731
        VisualTokens(compass, compared=compass, relevance=relevance), 3, PruningConfig(alpha=alpha)
    )
    assert kept(0.5).tolist() == [[0, 3, 4]] and kept(2).tolist() == [[0, 1, 2]]


def test_divprune(compass):
    tokens = VisualTokens(features=torch.zeros(1, 5, 7), compared=compass)
    assert METHODS["divprune"].select(tokens, 3, PruningConfig(method="divprune")).tolist() == [[0, 3, 4]]


def test_divprune_takes_time_into_account(compass):
    """Only where `time_weight` says so: then the second token, seen far from the others, counts as different."""
    times = torch.tensor([[0.0, 1, 0, 0, 0]])
    tokens = VisualTokens(features=torch.zeros(1, 5, 7), compared=compass, times=times)
    kept = lambda **changes: METHODS["divprune"].select(tokens, 2, PruningConfig(method="divprune", **changes)).tolist()  # noqa: E731
    assert kept() == [[0, 4]] and kept(time_weight=5.0) == [[1, 4]]


def test_cdpruner(compass):
    quality = torch.tensor([[1, 0.9924, 0.5868, 0.5, 0]])
    kept = [select_conditional_dpp(compass, quality, k).tolist()[0] for k in range(1, 6)]
    # The vectors span two dimensions: from the third pick on no gain is left, and the rest comes by quality.
    assert kept == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_cdpruner_fills_up_by_quality(compass):
    """The vectors span two dimensions: two picks by gain (4: 1, then 2: 0.9698 * 0.36), the others by quality."""
    quality = torch.tensor([[0.2, 0.5, 0.6, 0.3, 1]])
    kept = [select_conditional_dpp(compass, quality, k).tolist()[0] for k in range(1, 6)]
    assert kept == [[4], [2, 4], [1, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_cdpruner_small_gains_are_gains():
    """Tokens that differ little, or matter little, are still told apart: no gain is too small but a rounding error."""
    features = torch.eye(4, dtype=torch.float64)[None] * 1e-3
    features[..., 0] += 1  # residuals around 1e-6
    features[:, 3] *= 7  # a length, which does not count
    features[:, 2, 2] *= 1.5
    assert select_conditional_dpp(features, torch.ones(1, 4), 2).tolist() == [[0, 2]]
    quality = torch.tensor([[1e-4, 1e-4, 2e-4, 1]])  # gains of 1e-8 and 4e-8
    assert select_conditional_dpp(torch.eye(4)[None], quality, 2).tolist() == [[2, 3]]


def test_unit_range():
    scaled = unit_range(torch.tensor([[1.0, 2, 3], [5, 5, 5]]))
    torch.testing.assert_close(scaled, torch.tensor([[5e-7, 0.5, 1], [1, 1, 1]]), atol=1e-6, rtol=0)


def test_coverage(compass):
    rows = torch.bmm(compass, compass.mT).clamp_min(0)
    # Sums 2.158, 2.501, 2.501, 2.158, 1; after 1 the gains of 2 and 3 are equal (1.469), then 4 is not covered at all.
    assert [select_coverage(rows, k).tolist()[0] for k in (1, 2, 3)] == [[1], [1, 2], [1, 2, 4]]
    saliency = torch.tensor([[1, 0, 0, 0.1, 1]])
    assert [select_coverage(rows, k, saliency).tolist()[0] for k in (1, 2, 3)] == [[0], [0, 4], [0, 3, 4]]


def slow_coverage(rows, num_kept, saliency):
    kept = []
    for _ in range(num_kept):
        gains = []
        for j in range(rows.shape[1]):
            best = rows[:, kept].amax(1) if kept else torch.zeros(len(rows))
            gain = saliency[j] * (rows[:, j] - best).clamp_min(0).sum()
            gains.append(-1.0 if j in kept else float(gain))
        kept.append(max(range(len(gains)), key=gains.__getitem__))
    return sorted(kept)


def test_coverage_equals_slow_reference():
    generator = torch.Generator().manual_seed(0)
    rows, saliency = torch.rand(6, 11, 20, generator=generator), torch.rand(6, 20, generator=generator)
    kept = select_coverage(rows, 7, saliency)
    assert kept.tolist() == [slow_coverage(*pair[:1], 7, pair[1]) for pair in zip(rows, saliency)]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1, 1e6])
def test_a_tie_of_gains_is_relative(scale):
    """However small the gains are: a share of 1e-6 decides, one of 1e-9 is a rounding error, which the first wins."""
    for share, first in ((1e-6, 2), (1e-9, 1)):
        rows = torch.zeros(1, 3, 4, dtype=torch.float64)
        rows[0, [0, 1, 2], [0, 1, 2]] = torch.tensor([0.5, 1, 1 + share], dtype=torch.float64) * scale
        assert select_coverage(rows, 1).tolist() == [[first]]
        assert select_coverage(torch.ones_like(rows), 1, rows.sum(1)).tolist() == [[first]]
        quality = (rows.sum(1) / scale).sqrt() * min(scale, 1)
        assert select_conditional_dpp(torch.eye(4)[None], quality, 1).tolist() == [[first]]


def test_what_is_covered_is_no_gain():
    """Tokens of one direction cover each other up to rounding errors, which decide nothing: the rest comes in order."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 40, generator=generator).double()[:, torch.arange(36) % 3]
    features *= torch.rand(1, 36, 1, generator=generator) + 0.1
    tokens = VisualTokens(features, cls_attention=torch.ones(1, 36), text_affinity=torch.ones(1, 2, 36) / 72)
    for method in ("scope", "mmtok"):
        kept = METHODS[method].select(tokens, 9, PruningConfig(method=method))
        assert kept.tolist() == [list(range(9))]


def test_conditional_dpp_maximizes_the_determinant_greedily():
    generator = torch.Generator().manual_seed(0)
    features, quality = torch.randn(4, 15, 8, generator=generator).double(), torch.rand(4, 15, generator=generator)
    unit = F.normalize(features, dim=-1) * quality[..., None]
    kernels = unit @ unit.mT
    for kernel, kept in zip(kernels, select_conditional_dpp(features, quality, 5).tolist()):
        expected = []
        for _ in range(5):
            volume = lambda i: kernel[expected + [i]][:, expected + [i]].det()  # noqa: E731, B023
            expected.append(max((i for i in range(15) if i not in expected), key=volume))
        assert kept == sorted(expected)


def test_mmtok_covers_the_words():
    """A word that one token alone stands for brings that token in, whatever the features say."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 20, 8, generator=generator)
    for token in range(20):
        rows = F.one_hot(torch.tensor([[token]]), 20).float()
        kept = METHODS["mmtok"].select(VisualTokens(features, text_affinity=rows), 1, PruningConfig())
        assert kept.tolist() == [[token]]


def test_visionzip():
    method, generator = METHODS["visionzip"], torch.Generator().manual_seed(0)
    features, keys = torch.randn(1, 12, 4, generator=generator), torch.zeros(1, 12, 2)
    keys[0, ::2, 0] = keys[0, 1::2, 1] = 1
    attention = torch.tensor([[0, 0, 0, 0.5, 0, 0, 0, 0, 0.3, 0.1, 0, 0]])
    tokens = VisualTokens(features, cls_attention=attention, keys=keys)
    merged, kept = method.reduce(tokens, 7, PruningConfig())
    # One contextual token: round(7 * 10 / 64); six dominant ones, ties by index. The rest is 4, 5, 6, 7, 10, 11, centre 4.
    assert kept.tolist() == [[0, 1, 2, 3, 4, 8, 9]]
    x = features[0]
    torch.testing.assert_close(merged[0, 4], x[4] + x[[5, 6, 7, 10, 11]].mean(0))
    assert torch.equal(merged[0, [0, 1, 2, 3, 5, 6]], x[[0, 1, 2, 3, 8, 9]])


@pytest.mark.parametrize("num_kept, contextual", [(64, 10), (128, 20), (192, 30), (22, 3), (3, 0)])
def test_visionzip_shares(num_kept, contextual):
    from rediprune.methods_attention import CONTEXTUAL_SHARE

    assert round(num_kept * CONTEXTUAL_SHARE) == contextual


def test_contextual_centres():
    from rediprune.methods_attention import around_centres

    keys = torch.eye(3)[[0, 1, 2, 2, 1, 0, 1]][None]
    centres, members = around_centres(keys, 3)  # every second one: 0, 2, 4
    assert centres.tolist() == [0, 2, 4]
    assert members[0].tolist() == [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1]]


def test_prumerge():
    attention = torch.tensor([[0.05, 0.05, 0.06, 0.05, 0.05, 0.30, 0.05, 0.39]])
    features = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens(features, last_cls_attention=attention, last_keys=features)
    merged, kept = METHODS["prumerge"].reduce(tokens, 3, PruningConfig())
    assert kept.tolist() == [[5, 6, 7]]  # two by attention, and the sum of the rest at the last dropped place
    x, a = features[0], attention[0][:, None]
    whole = (a * x).sum(0)  # eight tokens: all others are among the 32 nearest
    torch.testing.assert_close(merged[0, 0], x[5] + whole - a[5] * x[5])
    torch.testing.assert_close(merged[0, 1], whole - a[5] * x[5] - a[7] * x[7])
    torch.testing.assert_close(merged[0, 2], x[7] + whole - a[7] * x[7])


def test_prumerge_adds_the_32_nearest():
    generator = torch.Generator().manual_seed(0)
    features, keys = (torch.randn(2, 64, 6, generator=generator) for _ in range(2))
    attention = torch.rand(2, 64, generator=generator)
    tokens = VisualTokens(features, last_cls_attention=attention, last_keys=keys)
    merged, kept = METHODS["prumerge"].reduce(tokens, 5, PruningConfig())
    for row in range(2):
        chosen = attention[row].topk(4).indices.sort().values
        extra = max(token for token in range(64) if token not in chosen)  # where the token for the rest stands
        for place, token in enumerate(kept[row].tolist()):
            if token == extra:
                continue
            similarity = F.cosine_similarity(keys[row], keys[row, token], dim=-1)
            near = sorted((i for i in range(64) if i != token), key=lambda i: -similarity[i])[:32]
            expected = features[row, token] + (attention[row, near, None] * features[row, near]).sum(0)
            torch.testing.assert_close(merged[row, place], expected)
        assert sorted(kept[row].tolist()) == sorted([*chosen.tolist(), extra])


def test_nearest_others():
    from rediprune.methods_attention import nearest_others

    angles = torch.deg2rad(torch.tensor([0.0, 10, 25, 90, 100]))
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    near = nearest_others(keys, torch.tensor([[1, 4]]), neighbours=2)
    assert near[0].tolist() == [[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    "num_tokens, keep_ratio, count, plus",
    [(576, 0.1, 58, 231), (144, 0.1, 14, 58), (576, 0.25, 144, 576), (576, 0.05, 29, 120)],
)
def test_prumerge_counts(num_tokens, keep_ratio, count, plus):
    of = lambda name: PruningConfig(method=name, keep_ratio=keep_ratio).count(num_tokens)  # noqa: E731
    assert (of("prumerge"), of("prumerge_plus")) == (count, plus)


def test_prumerge_plus_keeps_its_grid():
    tokens = make_tokens(num_tokens=144)
    pruning = PruningConfig(method="prumerge_plus", keep_ratio=0.1)
    kept = METHODS["prumerge_plus"].reduce(tokens, pruning.count(144), pruning)[1]
    assert all(set(range(0, 143, 3)) < set(row) for row in kept.tolist())


def test_trim():
    features = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens(features, relevance=torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.0]]))
    merged, kept = METHODS["trim"].reduce(tokens, 3, PruningConfig())
    assert kept.tolist() == [[1, 4, 5]]
    assert torch.equal(merged[0, :2], features[0, [1, 4]])
    torch.testing.assert_close(merged[0, 2], features[0, [0, 2, 3, 5]].mean(0))


def test_top_tokens():
    scores = torch.tensor([[0.2, 0.9, 0.2, 0.9 + 1e-8, 0.1]])
    assert [top_tokens(scores, k).tolist()[0] for k in (1, 2, 3)] == [[1], [1, 3], [0, 1, 3]]
    with pytest.raises(ValueError, match=r"scores hold NaN.*sets \[0\]"):
        top_tokens(scores * float("nan"), 2)


# ---------------------------------------------------------------------------------------------------------------
# What every method holds to

KINDS = ("gaussian", "alike", "identical", "zero", "part zero")


def make_tokens(kind="gaussian", num_sets=3, num_tokens=36, seed=0):
    """Sets with everything that a method may need; set i is the same whatever their number."""
    sets = []
    for index in range(num_sets):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731, B023
        noise = {"gaussian": 1.0, "alike": 1e-3, "identical": 0.0, "zero": 0.0, "part zero": 1.0}[kind]
        base = 0.0 if "zero" in kind else draw(1, 12)
        features = base + noise * draw(num_tokens, 12)
        if kind == "part zero":
            features[::2] = 0
        same = kind in ("identical", "zero")
        score = (lambda: torch.full((num_tokens,), 0.5)) if same else (lambda: draw(num_tokens).softmax(0))
        mix = draw(12, 12)
        sets.append(
            {
                "features": features,
                "compared": features @ mix,
                "times": torch.arange(num_tokens) * 4 // num_tokens / 4,
                "relevance": score(),
                "text_affinity": torch.stack([score() for _ in range(4)]) / 4,
                "projected": features @ mix,
                "cls_attention": score(),
                "keys": features @ mix.T,
                "cls_features": features @ mix.T,
                "last_cls_attention": score(),
                "last_keys": features @ mix,
                "last_attention": score(),
            }
        )
    stacked = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
    return VisualTokens(**stacked, seeds=list(range(seed, seed + num_sets)))


def take(tokens, sets):
    """Some of the sets, e.g. `slice(1, 2)`."""
    fields = {name: value for name, value in vars(tokens).items() if value is not None and name != "grid"}
    return VisualTokens(**{name: value[sets] for name, value in fields.items()}, grid=tokens.grid)


def change(tokens, function, names=None):
    fields = {name: value for name, value in vars(tokens).items() if torch.is_tensor(value)}
    changed = {name: function(value) if names is None or name in names else value for name, value in fields.items()}
    return VisualTokens(**{**vars(tokens), **changed})


# Of sets of so many tokens (frames, height, width, leading): one frame for what is asked of each frame, a video for all else.
FRAMES = {36: (1, 6, 6, 0), 35: (1, 5, 7, 0), 2: (1, 1, 2, 0)}
VIDEOS = {36: (4, 3, 3, 0), 35: (5, 1, 7, 0), 2: (2, 1, 1, 0)}


def reduce(name, tokens, num_kept, **pruning):
    grids = FRAMES if METHODS[name].scope == "frame" else VIDEOS
    tokens = VisualTokens(**{**vars(tokens), "grid": grids.get(tokens.features.shape[1])})
    return METHODS[name].reduce(tokens, num_kept, PruningConfig(method=name, **pruning))


@pytest.mark.parametrize("name", REDUCING)
class TestEveryMethod:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("num_tokens, num_kept", [(36, 1), (36, 2), (36, 9), (35, 34), (2, 1)])
    def test_count_order_and_range(self, name, kind, num_tokens, num_kept):
        tokens = make_tokens(kind, num_tokens=num_tokens)
        num_kept = 30 if name == "downsample" and num_kept == 34 else num_kept  # of 5 x 7 the grid of 5 x 6
        features, kept = reduce(name, tokens, num_kept)
        assert features.shape == (3, num_kept, 12) and features.isfinite().all()
        assert kept.shape == (3, num_kept) and kept.dtype == torch.long
        assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < num_tokens

    @pytest.mark.parametrize("num_tokens", [1, 2, 36, 144, 256, 257, 576, 4608])
    @pytest.mark.parametrize("keep_ratio", [1e-6, 0.05, 0.1, 0.15, 0.25, 0.5, 0.9, 1])
    def test_count_is_in_range(self, name, num_tokens, keep_ratio):
        count = PruningConfig(method=name, keep_ratio=keep_ratio).count(num_tokens)
        assert 1 <= count <= num_tokens
        if keep_ratio == 1:
            assert count == num_tokens

    @pytest.mark.parametrize("kind", KINDS)
    def test_batch_invariance(self, name, kind):
        tokens = make_tokens(kind, num_sets=4)
        features, kept = reduce(name, tokens, 9)
        for index in range(4):
            alone = reduce(name, take(tokens, slice(index, index + 1)), 9)
            assert torch.equal(alone[1][0], kept[index])
            torch.testing.assert_close(alone[0][0], features[index])

    def test_shorter_questions_beside_longer_ones(self, name):
        tokens = make_tokens()
        padded = change(tokens, lambda rows: F.pad(rows, (0, 0, 0, 50)), ["text_affinity"])
        assert torch.equal(reduce(name, tokens, 9)[1], reduce(name, padded, 9)[1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_selects_as_its_fp32_copy(self, name, dtype):
        half = change(
            make_tokens(), lambda value: value.to(dtype), ["features", "compared", "projected", "keys", "last_keys"]
        )
        features, kept = reduce(name, half, 9)
        full_features, full_kept = reduce(name, change(half, torch.Tensor.float), 9)
        assert torch.equal(kept, full_kept)
        assert features.dtype == dtype and torch.equal(features, full_features.to(dtype))

    def test_gradient_flows_to_the_kept_tokens(self, name):
        tokens = change(make_tokens(), torch.Tensor.clone, ["features"])
        tokens.features.requires_grad_()
        features, kept = reduce(name, tokens, 9)
        features.square().sum().backward()
        assert tokens.features.grad.isfinite().all()
        assert (tokens.features.grad.gather(1, kept[..., None].expand_as(features)).abs().sum(-1) > 0).all()

    def test_without_text(self, name):
        tokens = make_tokens()
        tokens.relevance = tokens.text_affinity = None
        assert reduce(name, tokens, 9, query_weighting="none")[1].shape == (3, 9)

    def test_input_is_left_as_it_was(self, name):
        tokens, copy = make_tokens(), make_tokens()
        reduce(name, tokens, 9)
        for field, value in vars(copy).items():
            assert torch.equal(getattr(tokens, field), value) if torch.is_tensor(value) else True

    def test_nan_raises(self, name):
        looks_at = METHODS[name].required_signals - {"seeds", "times"}
        for field in looks_at | (set() if looks_at & {"compared", "projected"} else {"features"}):
            tokens = change(make_tokens(), torch.Tensor.clone)
            getattr(tokens, field)[1].flatten()[3] = torch.nan
            with pytest.raises(ValueError, match=r"NaN.*sets \[1\]"):
                reduce(name, tokens, 9)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("kind", KINDS)
    def test_cuda_selects_as_cpu(self, name, kind):
        tokens = make_tokens(kind)
        features, kept = reduce(name, tokens, 9)
        cuda_features, cuda_kept = reduce(name, change(tokens, torch.Tensor.cuda), 9)
        assert torch.equal(cuda_kept.cpu(), kept)
        torch.testing.assert_close(cuda_features.cpu(), features)
