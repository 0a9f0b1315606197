"""One list of families x one list of checks."""

import json
import threading

import pytest
import torch
from families import FAMILIES, FRAMES, placed, row_of, stock_inputs
from rediprune.methods_base import Method
from rediprune.methods_registry import METHODS
from safetensors.torch import load_file, save_file
from tiny import PATCHES, random_image, random_video

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
MERGING = [name for name, method in METHODS.items() if method.merges_in_encoder]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
EVERY_METHOD = pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if name != "none" and method.inner is None]
)


@pytest.fixture(autouse=True)
def gradients(request):
    with torch.set_grad_enabled(request.node.get_closest_marker("gradients") is not None):
        yield


def usable(family, method):
    return family.refusal(method=method) is None


def refused(family, **pruning):
    """Where it is configured, by model and processor, with a reason and a remedy."""
    for build in (family.model, family.processor):
        with pytest.raises(ValueError, match="Choose another method|Set scope to|Leave it at None|Set it to None"):
            build(**pruning)


def pair(family, **pruning):
    return family.processor(**pruning), family.model(**pruning)


def same_as_alone(family, processor, model):
    """Logits and kept tokens of every row of the batch are those of the row alone."""
    batch = family.batch(processor)
    together, items = model(**placed(batch)), model.select_tokens(**batch)
    for row in range(len(family.prompts())):
        alone = family.inputs(processor, row)
        assert torch.equal(alone["input_ids"], row_of(batch, row))
        logits = together.logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(logits, model(**alone).logits[0], **CLOSE)
        kept = [item.kept for item in items if item.row == row]
        assert all(map(torch.equal, kept, [item.kept for item in model.select_tokens(**alone)]))


@EVERY_FAMILY
@pytest.mark.parametrize("unpruned", [{"keep_ratio": 1}, {"method": "none"}], ids=str)
def test_unpruned_is_the_stock_class_bit_for_bit(family, unpruned):
    processor, model = pair(family, **unpruned)
    stock, stock_processor = family.stock_twin(model), family.stock_processor()
    batch, expected = family.batch(processor), family.batch(stock_processor, return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert torch.equal(model(**batch).logits, stock(**expected).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), stock.generate(**expected, **options))


@EVERY_FAMILY
@EVERY_METHOD
def test_a_row_alone_is_the_row_in_a_batch(family, method):
    if not usable(family, method):
        refused(family, method=method)
        return
    same_as_alone(family, *pair(family, method=method, keep_ratio=0.2))


@EVERY_FAMILY
@pytest.mark.parametrize(
    "block", [{"positions": "original"}, {"proportional_attention": True}, {"scope": "video"}], ids=str
)
def test_a_row_alone_is_the_row_in_a_batch_with(family, block):
    if family.refusal(**block):
        refused(family, **block)
        return
    same_as_alone(family, *pair(family, keep_ratio=0.2, **block))


@EVERY_FAMILY
@EVERY_METHOD
def test_kept_tokens_are_those_of_the_encoder_at_the_placeholders(family, method):
    if not usable(family, method):
        return
    processor, model = pair(family, method=method, keep_ratio=0.2)
    for index in range(len(family.prompts())):
        inputs = family.inputs(processor, index)
        outputs, items = model(**inputs), model.select_tokens(**inputs)
        assert outputs.logits.isfinite().all()
        for kind in family.kinds:
            of_kind = [item for item in items if item.kind == kind]
            kept = getattr(outputs, f"{kind}_kept_indices") or ()
            assert len(kept) == len(of_kind) and all(map(torch.equal, kept, [item.kept for item in of_kind]))
            token = getattr(model.config, f"{kind}_token_id")
            assert sum(map(len, kept)) == (inputs["input_ids"] == token).sum()
        for item in items:
            features = torch.cat([signals["features"].flatten(0, 1) for signals in item.sets])
            assert len(item.tokens) == len(item.kept) and item.tokens.isfinite().all()
            if type(METHODS[method]).reduce is Method.reduce and method not in MERGING and method != "rediprune_plus":
                assert torch.equal(item.tokens, features[item.kept])


@EVERY_FAMILY
def test_all_tokens_on_the_way_of_pruning_are_the_stock_model(family):
    """A ratio just below 1 prunes nothing away but the newlines after rows of tiles, where there are any."""
    processor, model = pair(family, method="uniform", keep_ratio=0.9999)
    stock = family.stock_twin(model)
    for index in range(len(family.prompts())):
        inputs = family.inputs(processor, index)
        layouts = [item.layout for item in model.select_tokens(**inputs)]
        if all(layout.num_unpruned == layout.num_tokens for layout in layouts):
            expected = stock(**stock_inputs(family, inputs)).logits
            torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
            assert model.config.pruning.prunes


@EVERY_FAMILY
def test_generation_is_the_forward_pass_step_by_step(family):
    """With a cache, with a static one, without one, and with beams of one."""
    processor, model = pair(family, keep_ratio=0.2, positions="original", proportional_attention=True)
    batch = family.batch(processor)
    # A random model may generate placeholders, which no medium fills where there is no cache.
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [4, 5]}
    expected = model.generate(**batch, use_cache=False, **options)
    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 1, "num_return_sequences": 1}):
        assert torch.equal(model.generate(**batch, **how, **options), expected), how
    for row in range(len(expected)):
        alone = model.generate(**family.inputs(processor, row), **options)
        assert torch.equal(alone[0, -4:], expected[row, -4:])


@EVERY_FAMILY
def test_beams_keep_the_media_of_their_row(family):
    processor, model = pair(family, keep_ratio=0.2)
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    together = model.generate(**family.batch(processor), **options)
    for row in range(len(together)):
        alone = model.generate(**family.inputs(processor, row), **options)
        assert torch.equal(alone[0, -3:], together[row, -3:])


@EVERY_FAMILY
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_second_turn_over_the_cache(family, positions):
    """The text does not decide, so that one pass over both turns is the reference."""
    pruning = {"keep_ratio": 0.2, "query_weighting": "none", "positions": positions}
    if family.refusal(**pruning):
        refused(family, **pruning)
        return
    processor, model = pair(family, **pruning)
    text, media = family.prompts()[0]
    first = processor(text=text, **media)
    both = processor(text=family.written(f"{text} red <image> how many"), images=[*media["images"], random_image(9)])
    cache = model(**first, use_cache=True).past_key_values
    length = first["input_ids"].shape[1]
    names = [name for name in both if name.startswith(("pixel", "image"))]
    new = {name: both[name][len(first[name]) :] for name in names}
    new |= {"input_ids": both["input_ids"][:, length:], "attention_mask": both["attention_mask"]}
    found = model(**new, past_key_values=cache).logits
    torch.testing.assert_close(found, model(**both).logits[:, length:], **CLOSE)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if not family.has_mrope], ids=lambda family: family.name
)
def test_original_positions_are_those_of_the_unpruned_prompt(family):
    pruning = {"method": "uniform", "positions": "original", "keep_ratio": 0.25}
    processor, model = pair(family, **pruning)
    seen = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    for index in range(len(family.prompts())):
        inputs = family.inputs(processor, index)
        (model(**inputs), model.select_tokens(**inputs))
        positions = seen["position_ids"][0].tolist()
        unpruned = family.inputs(processor, index, keep_ratio=1)["input_ids"].shape[1]
        assert positions == sorted(set(positions)) and positions[0] == 0
        ends_in_text = inputs["input_ids"][0, -1] not in (4, 5)
        assert (positions[-1] == unpruned - 1) == bool(ends_in_text)


@EVERY_FAMILY
def test_threads(family):
    processor, model = pair(family, keep_ratio=0.2)
    requests = [family.inputs(processor, index) for index in range(len(family.prompts()))] * 2
    alone = [model(**request).logits for request in requests]
    found, barrier = [None] * len(requests), threading.Barrier(len(requests))

    def run(index):
        with torch.no_grad():
            barrier.wait()
            found[index] = model(**requests[index]).logits

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(requests))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(map(torch.equal, alone, found))


@pytest.mark.gradients
@EVERY_FAMILY
def test_training(family):
    processor, model = pair(family, method="rediprune_plus", scope="frame", keep_ratio=0.2)
    batch = family.batch(processor)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for part in family.parts(model):
        gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.abs().sum() > 0 for gradient in gradients)


@EVERY_FAMILY
def test_saved_and_loaded_again(family, tmp_path):
    """Also with the names of weights that the public checkpoints have."""
    pruning = {"keep_ratio": 0.3}
    processor, model = pair(family, **pruning)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == family.config_class.auto_map_of_class() and saved["pruning"]["keep_ratio"] == 0.3
    batch = family.batch(processor)
    expected = model(**batch).logits
    assert torch.equal(family.model_class.from_pretrained(tmp_path)(**batch).logits, expected)
    ids = family.batch(family.processor_class.from_pretrained(tmp_path))["input_ids"]
    assert torch.equal(ids, batch["input_ids"])
    base = family.save_stock_checkpoint(tmp_path / "base")
    assert torch.equal(family.model_class.from_pretrained(base, pruning=pruning)(**batch).logits, expected)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if "llava" in family.name], ids=lambda family: family.name
)
def test_towers_named_as_5x_names_them(family, tmp_path):
    """A model that was made from a config and saved by 5.x has one level less than the public checkpoints."""
    processor, model = pair(family, keep_ratio=0.3)
    path = family.save_stock_checkpoint(tmp_path) / "model.safetensors"
    weights = {name.replace("_tower.vision_model.", "_tower."): weight for name, weight in load_file(path).items()}
    assert not any("vision_model" in name for name in weights)
    save_file(weights, path, {"format": "pt"})
    batch = family.batch(processor)
    loaded = family.model_class.from_pretrained(tmp_path, pruning={"keep_ratio": 0.3})
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@EVERY_FAMILY
def test_media_that_the_family_does_not_take(family):
    processor, model = pair(family, keep_ratio=0.2)
    if "video" in family.kinds:
        return
    with pytest.raises(ValueError, match="takes no videos"):
        processor(text=family.written("<image> where"), videos=[random_video()], images=[random_image()])
    inputs = family.inputs(processor, 0)
    with pytest.raises(ValueError, match="takes no videos"):
        model(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 32, 32))


@EVERY_FAMILY
def test_a_count_that_does_not_fit(family):
    processor, model = pair(family, keep_ratio=0.2)
    inputs = family.inputs(processor, 0)
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :1], inputs["input_ids"]], dim=1)
    inputs["input_ids"][0, 0] = model.config.image_token_id
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="image placeholders"):
        model(**inputs)


def test_video_llava_keeps_cls_as_a_token():
    (family,) = [family for family in FAMILIES if family.name == "video_llava"]
    processor, model = pair(family, method="uniform", keep_ratio=0.1)
    inputs = family.inputs(processor, 2)
    (item,) = model.select_tokens(**inputs)
    assert item.layout.num_tokens == FRAMES * (1 + PATCHES)
    assert [len(kept) for kept in item.layout.split(item.kept)] == [round(0.1 * (1 + PATCHES))] * FRAMES
    everything = family.inputs(processor, 2, keep_ratio=1)
    stock = stock_inputs(family, everything)
    assert torch.equal(model(**everything).logits, family.stock_twin(model)(**stock).logits)
