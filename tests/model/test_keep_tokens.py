"""A budget in tokens instead of a ratio."""

import json

import pytest
import torch
from families import FAMILIES
from rediprune.configuration_rediprune import PruningConfig, ReDiPruneConfig
from rediprune.methods_registry import METHODS
from tiny import POOLED, random_video, tiny_model, tiny_processor

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
BOTH = r"keep_ratio=0\.\d+ and keep_tokens=\d+ were both given, but a budget is one of them"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_a_budget_is_one_of_the_two():
    block = PruningConfig(keep_tokens=64)
    assert (block.keep_ratio, block.keep_tokens, block.budget) == (None, 64, "keep_tokens=64") and block.prunes
    assert PruningConfig.from_value(block.to_dict()) == block
    for give_both in (
        lambda: PruningConfig(keep_ratio=0.25, keep_tokens=64),
        lambda: ReDiPruneConfig(pruning={"keep_ratio": 0.25, "keep_tokens": 64}),
        lambda: PruningConfig().with_budget(0.25, 64),
        lambda: tiny_processor()(text="<video>", videos=random_video(), keep_ratio=0.25, keep_tokens=64),
        lambda: tiny_model().select_tokens(torch.tensor([[5]]), keep_ratio=0.25, keep_tokens=64),
    ):
        with pytest.raises(ValueError, match=BOTH):
            give_both()


def test_setting_one_takes_the_place_of_the_other():
    block = PruningConfig()
    block.keep_tokens = 64
    assert (block.keep_ratio, block.keep_tokens) == (None, 64)
    with pytest.raises(ValueError, match="'keep_ratio' is None"):
        block.keep_tokens = None
    assert block.keep_tokens == 64
    block.keep_ratio = 0.3
    assert (block.keep_ratio, block.keep_tokens) == (0.3, None)
    assert block.with_budget(keep_tokens=5).count(20) == 5 and block.with_budget() is block


def test_a_saved_budget_is_replaced_by_one_of_the_other_kind(tmp_path):
    ReDiPruneConfig(pruning={"keep_tokens": 64}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["pruning"]
    assert (saved["keep_ratio"], saved["keep_tokens"]) == (None, 64)
    assert ReDiPruneConfig.from_pretrained(tmp_path).pruning.keep_tokens == 64
    loaded = ReDiPruneConfig.from_pretrained(tmp_path, pruning={"keep_ratio": 0.5}).pruning
    assert (loaded.keep_ratio, loaded.keep_tokens) == (0.5, None)


@pytest.mark.parametrize("size, kept", [(576, 64), (144, 64), (64, 64), (10, 10), (1, 1), (0, 0)])
def test_smaller_sets_keep_all(size, kept):
    assert PruningConfig(keep_tokens=64).count(size) == kept


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if name != "none" and method.inner is None]
)
def test_a_budget_in_tokens_is_the_ratio_that_gives_as_many(method):
    """Four of sixteen tokens a frame, or sixteen of a video that is pruned jointly."""
    budget = 4 if METHODS[method].scope == "frame" else 16
    blocks = [{"method": method, "keep_ratio": 0.25}, {"method": method, "keep_tokens": budget}]
    texts = {"text": "<video> where is the star", "videos": [random_video()]}
    inputs, kept, logits = [], [], []
    for block in blocks:
        model = tiny_model(**block)
        inputs.append(tiny_processor(**block)(**texts))
        outputs = model(**inputs[-1])
        kept.append(outputs.video_kept_indices[0])
        logits.append(outputs.logits)
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    assert torch.equal(*kept) and torch.equal(*logits)


@EVERY_FAMILY
def test_the_budget_of_a_call_goes_from_the_processor_to_the_model(family):
    processor, model = family.processor(), family.model()
    batch = family.batch(processor, keep_tokens=3)
    assert type(batch["keep_tokens"]) is int and batch["keep_tokens"] == 3 and "keep_ratio" not in batch
    options = {"max_new_tokens": 3, "do_sample": False}
    answer = model.generate(**batch, **options)
    beams = model.generate(**batch, **options, num_beams=2)
    assert answer.shape == beams.shape
    items = model.select_tokens(**batch)
    for item in items:
        assert len(item.kept) == sum(number * min(3, size) for number, size in item.layout.sets(model.config.pruning))
    model.config.pruning = {"keep_tokens": 3}
    batch.pop("keep_tokens")
    assert torch.equal(model.generate(**batch, **options), answer)


def test_a_scope_says_what_shares_the_tokens():
    model, processor = tiny_model(keep_tokens=6), tiny_processor(keep_tokens=6)
    for scope, kept in (("frame", 4 * 6), ("video", 6), ("item", 6)):
        model.config.pruning.scope = processor.pruning.scope = scope
        inputs = processor(text="<video> where", videos=[random_video()])
        (item,) = model.select_tokens(**inputs)
        assert len(item.kept) == kept


def test_pipelines_with_a_batch_size_give_lists():
    model = tiny_model()
    assert model.pruning_of_call(None, [5, 5]).keep_tokens == 5
    with pytest.raises(ValueError, match=r"keep_tokens is \[5, 6\], but must be the same"):
        model.pruning_of_call(None, [5, 6])


def test_what_serving_engines_ask_follows_the_budget():
    counts = tiny_processor()._get_num_multimodal_tokens(video_sizes=[(4, 40, 48)], keep_tokens=5)
    assert counts["num_video_tokens"] == [20]
    counts = tiny_processor(keep_tokens=100)._get_num_multimodal_tokens(video_sizes=[(4, 40, 48)])
    assert counts["num_video_tokens"] == [4 * POOLED]
