"""The `pruning` block of `config.json`: how it is set, what it refuses, and that it comes back from a file unchanged."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rediprune.configuration_rediprune import PruningConfig, ReDiPruneConfig
from rediprune.methods_registry import METHODS
from tiny import random_video, tiny_config
from transformers import LlavaNextVideoConfig

DEFAULTS = {
    "method": "rediprune",
    "keep_ratio": 0.15,
    "keep_tokens": None,
    "scope": None,
    "relevance": None,
    "relevance_layer": 1,
    "text_tower": None,
    "words": None,
    "distance": None,
    "time_weight": None,
    "group_time_weight": None,
    "proportional_attention": None,
    "distance_bias": False,
    "merge_weight": None,
    "alpha": 0.5,
    "threshold": 0.0,
    "candidate_pool": "all",
    "max_candidates": None,
    "query_weighting": "exponential",
    "query_max_tokens": 128,
    "encoder_keep_ratio": 0.5,
    "video_pooling": True,
    "positions": None,
    "max_positions": None,
    "inner_method": None,
    "inner_layer": None,
    "inner_keep_ratio": None,
    "dart_visual_pivots": 4,
    "dart_text_pivots": 4,
    "least_segments": 8,
    "segment_threshold": 0.9,
    "still_threshold": 0.8,
    "weigh_by_segment": True,
    "mean_of_trees": False,
    "seed": 0,
}
METHOD_NAMES = ", ".join(map(repr, METHODS))
# For each key the values that it refuses, and what its message must say is allowed.
REFUSED = [
    ("method", "divprun", METHOD_NAMES),
    ("method", ["rediprune"], METHOD_NAMES),
    ("keep_ratio", 0, r"a number in (0, 1]"),
    ("keep_ratio", -0.1, r"a number in (0, 1]"),
    ("max_positions", 0, "an integer of at least 1"),
    ("inner_method", "rediprune", "one of 'fastv', 'vtw', 'dart', 'holitom', or None"),
    ("inner_layer", 0, "an integer of at least 1"),
    ("inner_keep_ratio", 0, r"a number in (0, 1]"),
    ("dart_visual_pivots", 0, "an integer of at least 1"),
    ("dart_text_pivots", -1, "an integer of at least 0"),
    ("keep_tokens", 0, "an integer of at least 1"),
    ("keep_tokens", 0.5, "an integer of at least 1"),
    ("keep_tokens", True, "an integer of at least 1"),
    ("keep_ratio", 1.01, r"a number in (0, 1]"),
    ("keep_ratio", math.nan, r"a number in (0, 1]"),
    ("keep_ratio", math.inf, r"a number in (0, 1]"),
    ("keep_ratio", "0.15", r"a number in (0, 1]"),
    ("keep_ratio", True, r"a number in (0, 1]"),
    ("keep_ratio", None, r"a number in (0, 1]"),
    ("keep_ratio", 0.3j, "0.3j, but must be a number in (0, 1]"),
    ("scope", "clip", "'frame', 'video', 'item', or None"),
    ("relevance_layer", 2**31, "an integer of at least 0 and below 2**31"),
    ("relevance_layer", -1, "an integer of at least 0"),
    ("relevance_layer", None, "an integer of at least 0"),
    ("relevance_layer", True, "an integer of at least 0"),
    ("words", "nouns", "'all', 'content', or None"),
    ("words", True, "'all', 'content', or None"),
    ("distance", "pooled", "'features', 'projected', or None"),
    ("time_weight", -0.1, "a number in [0, 1000000], or None"),
    ("time_weight", 1e39, "a number in [0, 1000000], or None"),
    ("group_time_weight", -0.1, "a number in [0, 1000000], or None"),
    ("time_weight", math.inf, "a number in [0, 1000000], or None"),
    ("distance_bias", None, "true or false"),
    ("distance_bias", 0.5, "true or false"),
    ("proportional_attention", 1, "true or false, or None"),
    ("proportional_attention", "yes", "true or false, or None"),
    ("merge_weight", 1.1, "a number in [0, 1], or None"),
    ("merge_weight", True, "a number in [0, 1], or None"),
    ("relevance", "clip", "text_tower is None; set text_tower to a CLIP checkpoint"),
    ("text_tower", "", "the Hub id or folder of a CLIP checkpoint, or None"),
    ("text_tower", True, "the Hub id or folder of a CLIP checkpoint, or None"),
    ("relevance", 1, "'pooled', 'projected', 'attention', 'late_attention', 'clip', or None"),
    ("relevance", "cosine", "one of 'pooled', 'projected', 'attention', 'late_attention', 'clip', or None"),
    ("relevance", ["pooled"], "one of 'pooled', 'projected', 'attention', 'late_attention', 'clip', or None"),
    ("alpha", math.nan, "a number in [-1000000, 1000000] (0 leaves diversity alone)"),
    ("alpha", 1e39, "a number in [-1000000, 1000000]"),
    ("alpha", -1000001, "a number in [-1000000, 1000000]"),
    ("alpha", "0.5", "a number in [-1000000, 1000000]"),
    ("threshold", 1.5, "a cosine in [-1, 1]"),
    ("threshold", math.nan, "a cosine in [-1, 1]"),
    ("candidate_pool", "some", "'all', 'algorithm1', 'released'"),
    ("max_candidates", 0, "an integer of at least 1 and below 2**31, or None"),
    ("max_candidates", 2.0, "an integer of at least 1 and below 2**31, or None"),
    ("max_candidates", 10**30, "an integer of at least 1 and below 2**31, or None"),
    ("query_weighting", "linear", "'exponential', 'self_attention', 'middle_peak', 'average', 'none'"),
    ("query_max_tokens", 0, "an integer of at least 1 and below 2**31"),
    ("query_max_tokens", True, "an integer of at least 1 and below 2**31"),
    ("encoder_keep_ratio", 0, r"a number in (0, 1]"),
    ("encoder_keep_ratio", 1.5, r"a number in (0, 1]"),
    ("encoder_keep_ratio", 0, r"a number in (0, 1]"),
    ("encoder_keep_ratio", "half", r"a number in (0, 1]"),
    ("video_pooling", "skip", "true or false"),
    ("video_pooling", None, "true or false"),
    ("positions", "absolute", "'compact', 'original'"),
    ("least_segments", 0, "an integer of at least 1 and below 2**31"),
    ("segment_threshold", 1.1, r"a cosine in [-1, 1]"),
    ("still_threshold", "high", r"a cosine in [-1, 1]"),
    ("weigh_by_segment", 1, "true or false"),
    ("mean_of_trees", None, "true or false"),
    ("seed", -1, "a non-negative integer"),
    ("seed", 0.5, "a non-negative integer"),
]
OTHER_THAN_DEFAULT = {
    "method": "random",
    "keep_ratio": None,
    "keep_tokens": 64,
    "scope": "video",
    "relevance": "attention",
    "relevance_layer": 0,
    "text_tower": "openai/clip-vit-large-patch14-336",
    "words": "all",
    "distance": "projected",
    "time_weight": 0.1,
    "group_time_weight": 0.3,
    "proportional_attention": True,
    "distance_bias": True,
    "merge_weight": 0.5,
    "alpha": 1.25,
    "threshold": 0.25,
    "candidate_pool": "algorithm1",
    "max_candidates": 12,
    "query_weighting": "average",
    "query_max_tokens": 7,
    "encoder_keep_ratio": 0.75,
    "video_pooling": False,
    "positions": "original",
    "max_positions": 2048,
    "inner_method": "fastv",
    "inner_layer": 3,
    "inner_keep_ratio": 0.05,
    "dart_visual_pivots": 2,
    "dart_text_pivots": 0,
    "least_segments": 3,
    "segment_threshold": 0.5,
    "still_threshold": 0.65,
    "weigh_by_segment": False,
    "mean_of_trees": True,
    "seed": 3,
}


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_defaults():
    assert ReDiPruneConfig().pruning.to_dict() == DEFAULTS
    assert ReDiPruneConfig(pruning=None).pruning.to_dict() == DEFAULTS
    assert ReDiPruneConfig(pruning={}).pruning.to_dict() == DEFAULTS


def test_the_table_of_refused_values_knows_every_key():
    assert {key for key, *_ in REFUSED} == set(DEFAULTS) == set(OTHER_THAN_DEFAULT)
    assert all(OTHER_THAN_DEFAULT[key] != DEFAULTS[key] for key in DEFAULTS)


def test_a_block_is_merged_over_the_defaults():
    config = ReDiPruneConfig(pruning={"keep_ratio": 0.4, "method": "uniform"})
    assert config.pruning.to_dict() == {**DEFAULTS, "keep_ratio": 0.4, "method": "uniform"}


def test_set_by_attribute(config):
    config.pruning.keep_ratio = 0.3
    assert config.to_dict()["pruning"]["keep_ratio"] == 0.3
    with pytest.raises(ValueError, match="'keep_ratio' is 3"):
        config.pruning.keep_ratio = 3
    assert config.pruning.keep_ratio == 0.3  # a refused value changes nothing


def test_set_by_assignment(config):
    config.pruning = {"keep_ratio": 0.5}
    assert config.pruning == PruningConfig(keep_ratio=0.5)
    block = PruningConfig(alpha=2)
    config.pruning = block
    block.alpha = 3
    assert config.pruning.alpha == 2  # a block is copied: two models never share one
    config.pruning = None
    assert config.pruning.to_dict() == DEFAULTS


def test_configs_do_not_share_their_block():
    first, second = ReDiPruneConfig(), ReDiPruneConfig()
    first.pruning.keep_ratio = 0.9
    assert second.pruning.keep_ratio == DEFAULTS["keep_ratio"]
    copied = copy.deepcopy(first)
    copied.pruning.keep_ratio = 0.8
    assert first.pruning.keep_ratio == 0.9


@pytest.mark.parametrize("key, value, expected", REFUSED)
def test_a_bad_value_names_key_value_and_allowed_range(key, value, expected, config):
    for set_it in (
        lambda: PruningConfig(**{key: value}),
        lambda: ReDiPruneConfig(pruning={key: value}),
        lambda: setattr(config.pruning, key, value),
    ):
        with pytest.raises(ValueError) as error:
            set_it()
        assert f"pruning key {key!r} is {value!r}" in str(error.value)
        assert expected in str(error.value)


@pytest.mark.parametrize(
    "key, value, shown",
    [
        ("keep_ratio", 10**400, "an integer of 1329 bits"),
        ("keep_ratio", 10**5000, "an integer of 16610 bits"),
        ("keep_ratio", "1" * 400, "'" + "1" * 199 + "..."),
        ("alpha", -(10**400), "an integer of 1329 bits"),
        ("relevance_layer", 10**400, "an integer of 1329 bits"),
        ("keep_ratio", np.True_, "True"),
        ("keep_ratio", torch.tensor(True), "True"),
        ("keep_ratio", np.float32(1.5), "1.5"),
        ("keep_ratio", np.array([0.3]), "array([0.3])"),
        ("keep_ratio", torch.tensor([0.3]), "tensor([0.3000])"),
    ],
    ids=lambda value: type(value).__name__,  # not all of them can be written out
)
def test_a_value_that_no_message_can_hold_is_cut_or_made_plain(key, value, shown, config):
    with pytest.raises(ValueError) as error:
        setattr(config.pruning, key, value)
    assert f"pruning key {key!r} is {shown}, but must be " in str(error.value)
    if key == "keep_ratio":
        with pytest.raises(ValueError) as error:
            config.pruning.with_budget(value)
        assert f"is {shown}, but must be a number in (0, 1]" in str(error.value)


def test_an_unknown_key_names_itself_and_the_allowed_ones(config):
    for set_it in (
        lambda: ReDiPruneConfig(pruning={"keepratio": 0.2}),
        lambda: PruningConfig.from_value({"keepratio": 0.2}),
        lambda: setattr(config.pruning, "keepratio", 0.2),
    ):
        with pytest.raises(
            ValueError, match="unknown pruning key 'keepratio'; allowed keys: method, keep_ratio, .*seed"
        ):
            set_it()


@pytest.mark.parametrize("block", [0.15, "rediprune", ["keep_ratio", 0.15], True])
def test_a_block_of_the_wrong_type(block, tmp_path):
    message = r"pruning is .*, but must be a dictionary with keys among method, keep_ratio"
    with pytest.raises(ValueError, match=message):
        ReDiPruneConfig(pruning=block)
    ReDiPruneConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ReDiPruneConfig.from_pretrained(tmp_path, pruning=block)


@pytest.mark.parametrize(
    "block, message",
    [
        ({"threshold": 0.2}, "threshold=0.2.*candidate_pool to 'algorithm1' or 'released'"),
        ({"max_candidates": 4}, "max_candidates=4.*candidate_pool='all'.*candidate_pool to 'algorithm1'"),
        (
            {"candidate_pool": "released", "max_candidates": 4},
            "max_candidates=4.*candidate_pool='released'.*candidate_pool to 'algorithm1'",
        ),
        ({"method": "evoprune", "scope": "video"}, "scope is 'video'.*method='evoprune' merges.*leave scope at None"),
        (
            {"method": "evoprune_rediprune", "proportional_attention": True},
            "proportional_attention is True.*merges tokens inside.*leave proportional_attention at None",
        ),
        (
            {"method": "evoprune", "merge_weight": 0.2},
            "merge_weight is 0.2.*merges tokens inside.*leave merge_weight at None",
        ),
        (
            {"words": "content", "relevance": "attention"},
            "words is 'content'.*relevance='attention' reads.*set words to 'all'",
        ),
        (
            {"candidate_pool": "algorithm1", "query_weighting": "none"},
            "candidate_pool='algorithm1'.*query_weighting",
        ),
    ],
)
def test_values_that_exclude_each_other(block, message):
    with pytest.raises(ValueError, match=message):
        ReDiPruneConfig(pruning=block)
    by_attribute = PruningConfig()
    with pytest.raises(ValueError, match=message):
        for key, value in block.items():
            setattr(by_attribute, key, value)


def test_an_open_key_is_the_methods_own():
    own = ("scope", "relevance", "distance", "time_weight", "proportional_attention", "merge_weight", "positions")
    resolved = lambda **block: tuple(PruningConfig(**block).resolved(key) for key in own)  # noqa: E731
    relevance = lambda method, **block: resolved(method=method, **block)[1]  # noqa: E731
    for method in ("cdpruner", "trim"):
        assert relevance(method) == "projected" and relevance(method, text_tower="me/clip") == "clip"
        assert relevance(method, text_tower="me/clip", relevance="pooled") == "pooled"
    assert relevance("rediprune", text_tower="me/clip") == "pooled"
    assert resolved() == ("frame", "pooled", "features", 0.0, False, 0.0, "compact")
    assert resolved(method="rediprune_plus") == ("video", "late_attention", "projected", 0.25, True, 0.3, "original")
    closed = {
        "scope": "frame",
        "distance": "features",
        "time_weight": 0,
        "proportional_attention": False,
        "merge_weight": 0,
    }
    assert resolved(method="rediprune_plus", **closed) == (
        "frame",
        "late_attention",
        "features",
        0,
        False,
        0,
        "original",
    )


def test_files_merge_over_defaults_and_arguments_over_files(tmp_path):
    ReDiPruneConfig(pruning={"keep_ratio": 0.4, "seed": 5}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content["pruning"] = {"keep_ratio": 0.4, "seed": 5}  # a block written by hand holds what it changes
    file.write_text(json.dumps(content))
    assert ReDiPruneConfig.from_pretrained(tmp_path).pruning.to_dict() == {
        **DEFAULTS,
        "keep_ratio": 0.4,
        "seed": 5,
    }
    merged = ReDiPruneConfig.from_pretrained(tmp_path, pruning={"keep_ratio": 0.6})
    assert merged.pruning.to_dict() == {**DEFAULTS, "keep_ratio": 0.6, "seed": 5}
    assert ReDiPruneConfig.from_pretrained(tmp_path, pruning=None).pruning.keep_ratio == 0.4
    whole = ReDiPruneConfig.from_pretrained(tmp_path, pruning=PruningConfig(alpha=1))
    assert whole.pruning == PruningConfig(alpha=1)
    with pytest.raises(ValueError, match="unknown pruning key 'keep'"):
        ReDiPruneConfig.from_pretrained(tmp_path, pruning={"keep": 0.6})
    assert json.loads(file.read_text()) == content


def test_a_bad_block_in_a_file(tmp_path):
    ReDiPruneConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    for block, message in (
        ({"keep_ratio": 15}, "'keep_ratio' is 15"),
        ({"ratio": 0.5}, "unknown pruning key 'ratio'"),
        (0.15, "pruning is 0.15, but must be a dictionary"),
    ):
        file.write_text(json.dumps({**content, "pruning": block}))
        with pytest.raises(ValueError, match=message):
            ReDiPruneConfig.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            ReDiPruneConfig.from_pretrained(tmp_path, pruning={"seed": 1})


def test_a_folder_without_a_config_file(tmp_path):
    with pytest.raises(OSError, match=f"no config.json in '{tmp_path}'"):
        ReDiPruneConfig.from_pretrained(tmp_path)


def test_a_stock_config_file_gets_the_defaults(tmp_path):
    tiny_config(LlavaNextVideoConfig).save_pretrained(tmp_path)
    config = ReDiPruneConfig.from_pretrained(tmp_path)
    assert config.pruning.to_dict() == DEFAULTS
    assert config.model_type == "rediprune_llava_next_video"
    assert config.vision_config.hidden_size == tiny_config().vision_config.hidden_size


def test_saving_and_loading_keeps_every_value(tmp_path):
    config = tiny_config(pruning=OTHER_THAN_DEFAULT)
    assert saved(config, tmp_path)["pruning"] == OTHER_THAN_DEFAULT
    loaded = ReDiPruneConfig.from_pretrained(tmp_path)
    assert loaded.pruning.to_dict() == OTHER_THAN_DEFAULT
    assert saved(loaded, tmp_path / "again") == saved(config, tmp_path)


def test_every_written_form_holds_the_block():
    config = tiny_config(pruning=OTHER_THAN_DEFAULT)
    for form in (
        config.to_dict(),
        config.to_diff_dict(),
        json.loads(config.to_json_string()),
        config.__dict__,
    ):
        block = form["pruning"]
        assert (block if isinstance(block, dict) else block.to_dict()) == OTHER_THAN_DEFAULT
    assert json.loads(config.to_json_string(use_diff=False))["pruning"] == OTHER_THAN_DEFAULT
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.pruning.to_dict() == OTHER_THAN_DEFAULT
    assert ReDiPruneConfig.from_dict(config.to_dict()).pruning.to_dict() == OTHER_THAN_DEFAULT
    assert ReDiPruneConfig(**config.to_dict()).pruning.to_dict() == OTHER_THAN_DEFAULT
    assert "OTHER" not in repr(config) and '"keep_tokens": 64' in repr(config)


def test_the_block_is_written_in_full_although_it_is_the_default(tmp_path):
    assert saved(ReDiPruneConfig(), tmp_path)["pruning"] == DEFAULTS


def test_no_pruning_key_outside_the_block(tmp_path):
    content = saved(tiny_config(pruning=OTHER_THAN_DEFAULT), tmp_path)
    assert not set(DEFAULTS) & set(content)
    stock = saved(tiny_config(LlavaNextVideoConfig), tmp_path / "stock")
    assert set(content) - set(stock) <= {"pruning", "auto_map"}


def test_equality_sees_the_block():
    assert tiny_config().to_dict() == tiny_config().to_dict()
    assert tiny_config().to_dict() != tiny_config(pruning={"seed": 1}).to_dict()


BLOCKS = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(list(METHODS)),
        "keep_ratio": st.floats(0, 1, exclude_min=True) | st.just(1),
        "alpha": st.floats(-1e6, 1e6) | st.integers(-5, 5),
        "query_weighting": st.sampled_from(["exponential", "self_attention", "middle_peak", "average", "none"]),
        "query_max_tokens": st.integers(1, 10**6),
        "video_pooling": st.booleans(),
        "positions": st.sampled_from(["compact", "original"]),
        "seed": st.integers(0, 2**63),
    },
)


@settings(max_examples=50, deadline=None)
@given(BLOCKS)
def test_any_valid_block_survives_json(block):
    config = PruningConfig.from_value(block)
    assert PruningConfig.from_value(json.loads(json.dumps(config.to_dict()))) == config
    assert {key: config.to_dict()[key] for key in block} == block


@settings(max_examples=100, deadline=None)
@given(num_tokens=st.integers(0, 5000), block=BLOCKS)
def test_counts_stay_in_range(num_tokens, block):
    config = PruningConfig.from_value(block)
    count = config.count(num_tokens)
    assert min(1, num_tokens) <= count <= num_tokens
    if not config.prunes:
        assert count == num_tokens


def test_counts_of_the_published_shapes():
    assert [PruningConfig().count(n) for n in (144, 576, 256)] == [22, 86, 38]
    assert PruningConfig(keep_ratio=1).count(144) == 144
    assert PruningConfig(method="none", keep_ratio=0.1).count(144) == 144


def test_a_ratio_for_one_call_is_a_copy_and_is_checked():
    block = PruningConfig(keep_ratio=0.2, seed=4)
    other = block.with_budget(0.7)
    assert (block.keep_ratio, other.keep_ratio, other.seed) == (0.2, 0.7, 4)
    assert block.with_budget(None) is block
    with pytest.raises(ValueError, match="'keep_ratio' is 0"):
        block.with_budget(0)


@pytest.mark.parametrize(
    "value",
    [np.float64(0.25), np.float32(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor(0.25).bfloat16()],
    ids=type,
)
def test_scalars_of_numpy_and_torch_are_the_numbers_that_they_hold(value, config):
    config.pruning.keep_ratio = value
    for block in (PruningConfig(keep_ratio=value), PruningConfig().with_budget(value), config.pruning):
        assert type(block.keep_ratio) is float and block.keep_ratio == 0.25 and block.count(100) == 25
    assert json.loads(config.to_json_string())["pruning"]["keep_ratio"] == 0.25


def test_what_need_not_be_whole_is_a_float_and_what_must_be_is_not():
    block = PruningConfig(
        keep_ratio=np.int64(1), alpha=2, time_weight=0, merge_weight=torch.tensor(1), seed=np.int64(3), query_max_tokens=np.uint8(9),
        proportional_attention=np.True_, method=np.str_("divprune"),
    )  # fmt: skip
    assert type(block.seed) is type(block.query_max_tokens) is int and block.proportional_attention is True
    assert type(block.method) is str
    assert all(
        type(getattr(block, key)) is float
        for key in ("keep_ratio", "alpha", "time_weight", "merge_weight", "threshold")
    )
    assert json.loads(json.dumps(block.to_dict())) == block.to_dict()


@torch.no_grad()
@pytest.mark.parametrize("weights", [{"alpha": 10**6}, {"alpha": -(10**6)}, {"time_weight": 10**6}], ids=str)
def test_the_largest_weights_leave_every_choice_sound(weights, model, processor):
    model.config.pruning = {"scope": "video", "keep_ratio": 0.3, **weights}
    processor = copy.copy(processor)
    processor.pruning = model.config.pruning
    output = model(**processor(text="USER: <video> what colour is the star ?", videos=[random_video()]))
    (kept,) = output.video_kept_indices
    assert (kept.diff() > 0).all() and output.logits.isfinite().all()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "2"])
def test_a_stride_that_pools_nothing_is_refused(value, config, tmp_path):
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "spatial_pool_stride": value}))
    for make in (lambda: tiny_config(spatial_pool_stride=value), lambda: ReDiPruneConfig.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="config key 'spatial_pool_stride' is .*, but must be a positive integer"):
            make()


@pytest.mark.parametrize(
    "value", [[], [336, 672], [[336]], [[0, 336]], [[336, 672.0]], [["336", "672"]], 336, "336x672", [None]]
)
def test_pinpoints_that_are_no_sizes_are_refused(value, config):
    with pytest.raises(
        ValueError, match="'image_grid_pinpoints' is .*, but must be a list of sizes .height, width. in pixels"
    ):
        config.image_grid_pinpoints = value
