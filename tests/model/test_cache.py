"""What may be done to a cache between two calls: afterwards it gives what one pass over everything gives."""

import copy

import pytest
import torch
import transformers
from rediprune.core_cache import read_record
from tiny import random_image, random_video, tiny_model, tiny_processor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
# The text decides nothing, so that another question keeps the same tokens and one pass over everything can be the reference.
BLOCKS = {
    "compact": {"keep_ratio": 0.3, "query_weighting": "none"},
    "original": {"keep_ratio": 0.3, "query_weighting": "none", "positions": "original"},
    "sizes": {"keep_ratio": 0.3, "query_weighting": "none", "proportional_attention": True},
    "plus": {"keep_ratio": 0.3, "query_weighting": "none", "method": "rediprune_plus"},
}
PROMPTS = ["red left <video> where is", "blue <image> which way does", "how many red left <video>"]
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=BLOCKS)
def block(request):
    return BLOCKS[request.param]


@pytest.fixture(scope="module")
def model(block):
    return tiny_model(**block)


@pytest.fixture(scope="module")
def processor(block):
    return tiny_processor(**block)


def media_of(row):
    return {"images": [random_image(row)]} if "<image>" in PROMPTS[row] else {"videos": [random_video(row)]}


def one_prompt(processor, row=0, text=None):
    return processor(text=text or PROMPTS[row], **media_of(row))


def batch(processor):
    return processor(
        text=PROMPTS,
        images=[random_image(1)],
        videos=[random_video(0), random_video(2)],
        padding=True,
        padding_side="left",
    )


def placed(inputs):
    """The inputs with the positions that `generate` gives to padded rows."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def filled(model, inputs, static=False):
    cache = new_cache(model, static)
    model(**placed(inputs), past_key_values=cache)
    return cache


def new_cache(model, static=False):
    config = model.config.text_config
    return StaticCache(config=config, max_cache_len=96) if static else DynamicCache(config=config)


def words(processor, text):
    return processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def followed_by(inputs, ids, rows=None):
    """The inputs of the given rows, all of them by default, with the same tokens behind each."""
    ids = ids.expand(len(inputs["input_ids"]), -1)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1),
    }
    return placed({**inputs, **longer})


def going_on(model, cache, ids, mask):
    """Logits of new tokens (B, T) over a cache whose rows have the given mask."""
    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
    # A static cache of 4.57 does not count padding, so there `generate` passes the places, too.
    places = {} if IS_5 else {"cache_position": torch.arange(mask.shape[1])[-ids.shape[1] :]}
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **places).logits


@pytest.mark.parametrize("lazy", [False, True])
def test_cropped_to_before_the_video(model, processor, lazy):
    """The usual reuse of a common prefix: another video and question follow."""
    inputs = one_prompt(processor)
    cache = DynamicCache() if lazy else new_cache(model)
    model(**inputs, past_key_values=cache)
    cache.crop(3 - cache.get_seq_length())  # <s> red left
    other = processor(text="red left <video> how many", videos=[random_video(7)])
    expected = model(**other).logits[:, 3:]
    rest = {**other, "input_ids": other["input_ids"][:, 3:]}
    torch.testing.assert_close(model(**rest, past_key_values=cache).logits, expected, **CLOSE)


def test_cropped_to_nothing(model, processor):
    cache = filled(model, one_prompt(processor))
    cache.crop(-cache.get_seq_length())
    other = one_prompt(processor, 1)
    expected = model(**other).logits
    torch.testing.assert_close(model(**other, past_key_values=cache).logits, expected, **CLOSE)


def test_cropped_to_right_after_the_video(model, processor):
    """What was dropped at the end of the video still counts."""
    inputs = one_prompt(processor)
    cache = filled(model, inputs)
    cache.crop(-2)  # where is
    ids = words(processor, "how many star")
    shorter = {**inputs, "input_ids": inputs["input_ids"][:, :-2], "attention_mask": inputs["attention_mask"][:, :-2]}
    expected = model(**followed_by(shorter, ids)).logits[:, -3:]
    torch.testing.assert_close(going_on(model, cache, ids, shorter["attention_mask"]), expected, **CLOSE)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("how", ["as it is", "copied", "step by step"])
def test_going_on(model, processor, static, how):
    inputs, ids = batch(processor), words(processor, "how many star")
    expected = model(**followed_by(inputs, ids)).logits[:, -3:]
    cache, mask = filled(model, inputs, static), inputs["attention_mask"]
    if how == "copied":
        cache, first = copy.deepcopy(cache), cache
        going_on(model, first, ids.flip(1).expand(3, -1), mask)
    if how == "step by step":
        steps = []
        for step in range(3):
            steps.append(going_on(model, cache, ids[:, step : step + 1].expand(3, -1), mask))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        found = torch.cat(steps, dim=1)
    else:
        found = going_on(model, cache, ids.expand(3, -1), mask)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="static caches can be cropped from transformers 5.24 on")
def test_a_cropped_static_cache(model, processor):
    """It leaves what it has taken back where it was, and the record with it; and it stays at its place in memory."""
    inputs = one_prompt(processor)
    cache = filled(model, inputs, static=True)
    cache.crop(3 - cache.get_seq_length())  # <s> red left
    other = processor(text="red left <video> how many", videos=[random_video(7)])
    expected = model(**other).logits[:, 3:]
    rest = {**other, "input_ids": other["input_ids"][:, 3:]}
    torch.testing.assert_close(model(**rest, past_key_values=cache).logits, expected, **CLOSE)


def test_the_cache_by_either_name(model, processor):
    """transformers 5.24 calls it `cache`, and those before it `past_key_values`."""
    inputs, ids = one_prompt(processor), words(processor, "how many star")
    logits = []
    for name in ("past_key_values", "cache"):
        cache = new_cache(model)
        assert model(**inputs, **{name: cache}).past_key_values is cache
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        logits.append(model(input_ids=ids, attention_mask=mask, **{name: cache}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two different caches"):
        model(input_ids=ids, cache=cache, past_key_values=new_cache(model))


ROWS = {
    "select": ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
    "repeat": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    "reorder": ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
}


@pytest.mark.parametrize(("change", "static"), [*((name, False) for name in ROWS), ("reorder", True)])
def test_rows_of_a_cache(model, processor, change, static):
    rows, apply = ROWS[change]
    inputs, ids = batch(processor), words(processor, "how many star")
    expected = model(**followed_by(inputs, ids)).logits[rows, -3:]
    cache = filled(model, inputs, static)
    apply(cache)
    found = going_on(model, cache, ids.expand(len(rows), -1), inputs["attention_mask"][rows])
    torch.testing.assert_close(found, expected, **CLOSE)


KEEPS_ITS_LENGTH = pytest.mark.skipif(not IS_5, reason="a dynamic cache of 4.57 is as long as before, of zeros")


@pytest.mark.parametrize("static", [pytest.param(False, marks=KEEPS_ITS_LENGTH), True])
def test_reset(model, processor, static):
    cache = filled(model, one_prompt(processor), static)
    cache.reset()
    assert cache.get_seq_length() == 0
    other = one_prompt(processor, 1)
    expected = model(**other).logits
    torch.testing.assert_close(model(**other, past_key_values=cache).logits, expected, **CLOSE)


def test_text_and_unpruned_media_before_the_first_pruned_one(model, processor):
    """The record begins in the middle of a conversation."""
    text = processor(text="how many red")
    image = processor(text="<image> left", images=[random_image(3)], keep_ratio=1)
    video = processor(text="<video> where is the star", videos=[random_video(3)])
    cache = new_cache(model)
    parts = [text["input_ids"], image["input_ids"][:, 1:], video["input_ids"][:, 1:]]
    total = 0
    for ids, inputs in zip(parts, (text, image, video)):
        total += ids.shape[1]
        mask = torch.ones(1, total, dtype=torch.long)
        found = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, past_key_values=cache).logits
    # One pass: the text and the image as embeddings, since one call has one ratio.
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(
        **{
            **image,
            "input_ids": torch.cat(parts[:2], dim=1),
            "attention_mask": torch.ones(1, total - parts[2].shape[1]),
        }
    )
    handle.remove()
    embeds = torch.cat([seen["inputs_embeds"], model.get_input_embeddings()(parts[2])], dim=1)
    everything = {**video, "inputs_embeds": embeds, "attention_mask": torch.ones(1, total, dtype=torch.long)}
    del everything["input_ids"]
    expected = model(**everything).logits[:, -parts[2].shape[1] :]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_offloaded_caches_have_each_layer_back_in_time(model, processor, kind, monkeypatch):
    """Streams and devices are make-believe here; what counts is that no layer is used while it is away."""

    class Stream:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", Stream)
    options = {"config": model.config.text_config, "offloading": True}
    cache = DynamicCache(**options) if kind == "dynamic" else StaticCache(**options, max_cache_len=96)
    away = set()
    for name, change in (("offload", away.add), ("prefetch", away.discard)):
        monkeypatch.setattr(DynamicLayer.__mro__[1], name, lambda layer, change=change: change(id(layer)))
    layer_class = type(cache.layers[0])
    update = layer_class.update

    def checked(layer, *args, **kwargs):
        assert id(layer) not in away
        return update(layer, *args, **kwargs)

    monkeypatch.setattr(layer_class, "update", checked)
    inputs, ids = one_prompt(processor), words(processor, "how many star")
    model(**inputs, past_key_values=cache)
    mask = inputs["attention_mask"]
    found = []
    for step in range(3):
        found.append(going_on(model, cache, ids[:, step : step + 1], mask))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert away  # something was offloaded at all
    expected = model(**followed_by(inputs, ids)).logits[:, -3:]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)


def test_compact_prompts_leave_the_cache_as_the_stock_class_does(processor):
    model = tiny_model(**BLOCKS["compact"])
    cache = filled(model, one_prompt(tiny_processor(**BLOCKS["compact"])))
    assert len(cache.layers) == 2 and read_record(cache, 2) is None


def test_training_with_gradient_checkpointing_fills_no_cache(processor, block):
    """Where the layers cache nothing, nothing is recorded either."""
    model = tiny_model(**block).train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad():
        outputs = model(**one_prompt(processor), use_cache=True)
    assert outputs.past_key_values is None or read_record(outputs.past_key_values, 2) is None
