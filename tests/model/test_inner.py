"""Pruning inside the language model: the authors' own results, and that cache, batch, padding, beams and turns change nothing."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from places import GOLDEN
from rediprune.core_inner import InnerCall, read_inner, two_part_forward
from rediprune.hub_versions import CACHE_NAME, CROPS_TO_LENGTH
from rediprune.methods_base import InnerTokens
from rediprune.methods_block import PruningConfig
from rediprune.methods_registry import INNER_METHODS
from rediprune.ops_inner import dart_tokens
from safetensors.torch import load_file
from tiny import random_image, random_video
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

CASES = json.loads((GOLDEN / "inner_methods.json").read_text())
ONE_D = [family for family in FAMILIES if not family.has_mrope]
BLOCKS = {
    "fastv": {"method": "fastv", "keep_ratio": 0.3, "inner_layer": 1},
    "dart": {"method": "dart", "keep_ratio": 0.3, "inner_layer": 2},
    "vtw": {"method": "vtw", "inner_layer": 2},
    "two stages": {
        **{"method": "rediprune_plus", "keep_ratio": 0.6, "relevance_layer": 1},
        **{"inner_method": "fastv", "inner_layer": 2, "inner_keep_ratio": 0.2},
    },
    "weighed": {"method": "dart", "keep_ratio": 0.3, "inner_layer": 1, "proportional_attention": True},
    "holitom": {"method": "none", "inner_method": "holitom", "inner_layer": 2, "inner_keep_ratio": 0.4},
}
QUESTIONS = ("USER: <video>\nwhat colour is the star? ASSISTANT:", "USER: <video>\nhow many? ASSISTANT:")


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "inner_methods.safetensors")


def golden_cases(name):
    return pytest.mark.parametrize("case", CASES[name], ids=lambda case: case["id"])


def fields(golden, case, *names):
    """Inputs in fp32, results as they are."""
    found = [golden[f"{case['id']}.{name}"] for name in names]
    return [values.float() if values.dtype == torch.float16 else values for values in found]


# -- the authors' own functions ---------------------------------------------------------------------------------------------


def whole_prompt(case, kept) -> list:
    """Places in the prompt of what stays: the text, and kept tokens of the visual run."""
    visual = range(case["start"], case["start"] + case["N"])
    return [place for place in range(case["n"]) if place not in visual or place - case["start"] in kept]


@pytest.mark.parametrize("case", [*CASES["fastv"], *CASES["flashvid_inner"]], ids=lambda case: case["id"])
def test_fastv_and_what_flashvid_does_inside(golden, case):
    attention, expected = fields(golden, case, "attention", "kept")
    of_run = attention.mean(0)[case["start"] : case["start"] + case["N"]]
    kept = INNER_METHODS["fastv"].select(InnerTokens(None, attention=of_run), case["num_kept"], None)
    assert whole_prompt(case, kept.tolist()) == expected.tolist()


@golden_cases("holitom_inner")
def test_holitom_inside(golden, case):
    hidden, attention, kept, after = fields(golden, case, "hidden", "attention", "kept", "hidden_after")
    run = slice(case["start"], case["start"] + case["N"])
    shown = InnerTokens(hidden[run], attention=attention.mean(0)[run])
    found, states = INNER_METHODS["holitom"].reduce(shown, case["num_kept"], None)
    assert whole_prompt(case, found.tolist()) == kept.tolist()
    visual = [place in range(run.start, run.stop) for place in kept.tolist()]
    torch.testing.assert_close(states, after[visual], atol=1e-4 * after.abs().max().item(), rtol=0)


@golden_cases("dart")
def test_dart(golden, case):
    state, keys, expected = fields(golden, case, "state", "keys", "kept_ascending")
    norms, run = keys.abs().sum((0, 2)), slice(case["start"], case["start"] + case["N"])
    text = slice(run.stop, None)
    shown = (norms[run], state[run], norms[text], state[text])
    kept = dart_tokens(*shown, len(expected), case["pivots_visual"], case["pivots_text"])
    assert (kept + case["start"]).tolist() == expected.tolist()


@golden_cases("in_llm")
def test_a_whole_language_model(golden, case):
    """Logits through the prefill and three steps of decoding."""
    sizes = {key: value for key, value in CASES["tiny_llama"].items() if key != "architecture"}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    weights = {name.removeprefix("weights."): values for name, values in golden.items() if name.startswith("weights.")}
    model.load_state_dict({name: values.float() for name, values in weights.items()})
    embeds, next_ids, expected, lengths, kept = fields(
        golden, case, "inputs_embeds", "next_ids", "logits", "cache_lengths", "kept"
    )
    pivots = {f"dart_{kind}_pivots": case[f"pivots_{kind}"] for kind in ("visual", "text") if "pivots_visual" in case}
    inner = {"inner_method": case["method"], "inner_layer": case["K"]}
    ratio = {} if case["method"] == "vtw" else {"inner_keep_ratio": 0.5}
    is_visual = torch.zeros(1, case["n"], dtype=torch.bool)
    is_visual[:, case["start"] : case["start"] + case["N"]] = True
    is_text = torch.arange(case["n"])[None] >= case["start"] + case["N"]
    number = len(kept) - (case["n"] - case["N"])
    call = InnerCall(PruningConfig(method="none", **inner, **ratio, **pivots), is_visual, is_text, [number])
    cache, position, states, logits = DynamicCache(), 0, embeds[None], []
    for step in range(4):
        positions = torch.arange(position, position + states.shape[1])[None]
        shared = (cache, None, None, None, call if step == 0 else None, lambda values: values)
        states, places, _ = two_part_forward(model.model, states, positions, *shared)
        if step == 0:
            assert places[0].tolist() == kept.tolist()
            assert [layer.get_seq_length() for layer in cache.layers[: len(lengths)]] == lengths.tolist()
        position += positions.shape[1]
        logits.append(model.lm_head(states[0, -1]))
        states = model.get_input_embeddings()(next_ids[step : step + 1])[None] if step < 3 else None
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-5, rtol=1e-5)


# -- in the models ------------------------------------------------------------------------------------------------------------


def build(family, seed=0, **block):
    """A model with four language layers, and its processor."""
    model = deep_model(family, seed, **block)
    return model, family.processor(**block)


def deep_model(family, seed=0, **block):
    torch.manual_seed(seed)
    config = family.config(pruning=block)
    values = {**config.text_config.to_dict(), "num_hidden_layers": 4}
    if values.get("layer_types"):
        values["layer_types"] = ["full_attention"] * 4
    config.text_config = type(config.text_config)(**values)
    model = family.model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.generation_config.suppress_tokens = [*range(6)]  # placeholders, and what else is no word
    return model


@pytest.fixture(params=[family for family in ONE_D if "video" in family.kinds], ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(params=BLOCKS)
def block(request):
    return BLOCKS[request.param]


def prompt(processor, rows=(0,), **kwargs):
    media = {"videos": [random_video(seed=row, frames=4) for row in rows]}
    return processor(text=[QUESTIONS[row] for row in rows], **media, padding=True, return_tensors="pt", **kwargs)


def answers(model, inputs, **kwargs):
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", ONE_D, ids=lambda family: family.name, indirect=True)
def test_what_keeps_all_is_the_stock_class(family):
    model, processor = build(family, method="fastv", keep_ratio=1.0)
    inputs = prompt_of(family, processor)
    stock = model.stock_forward(**inputs, **{CACHE_NAME: None}).logits
    assert torch.equal(model(**inputs).logits, stock)
    model.config.pruning = {"method": "none", "inner_method": "fastv", "inner_layer": 1, "inner_keep_ratio": 0.9999}
    torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-4, rtol=1e-4)


def prompt_of(family, processor):
    if "video" in family.kinds:
        return prompt(processor)
    text = QUESTIONS[0].replace("<video>", "<image>")
    return processor(text=text, images=[random_image()], return_tensors="pt")


def test_counts_and_lengths(family, block):
    model, processor = build(family, **block)
    inputs = prompt(processor, (0, 1))
    outputs = model(**inputs)
    pruning, whole = model.config.pruning, prompt(processor, (0, 1), keep_ratio=1.0)
    unpruned = int((whole["input_ids"] == model.config.video_token_id).sum(1)[0])
    assert [len(kept) for kept in outputs.inner_kept_indices] == [pruning.inner_count(unpruned)] * 2
    first, number = pruning.first_inner_layer(4), inputs["input_ids"].shape[1]
    there = int((inputs["input_ids"] == model.config.video_token_id).sum(1)[0])
    lengths = [layer.get_seq_length() for layer in outputs[CACHE_NAME].layers[:4]]
    assert lengths == [number] * first + [number - there + pruning.inner_count(unpruned)] * (4 - first)


@pytest.mark.parametrize("name", ["weighed", "two stages"])
def test_those_that_stay_stand_for_those_that_leave(name):
    family = next(family for family in ONE_D if family.name == "llava_next_video")
    model, processor = build(family, **BLOCKS[name])
    inputs, whole = prompt(processor, (0, 1)), prompt(processor, (0, 1), keep_ratio=1.0)
    record = read_inner(model(**inputs)[CACHE_NAME], 4)
    totals = (record.sizes * record.visible).sum(1)
    assert totals.tolist() == whole["attention_mask"].sum(1).tolist()  # each token of the unpruned prompt once
    assert (record.sizes >= 1).all() and record.sizes.max() > 1


def test_decoding_with_a_cache_is_a_forward_pass_that_drops_the_same(family, block):
    model, processor = build(family, **block)
    inputs = prompt(processor, (0, 1))
    kwargs = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found, expected = (model.generate(**inputs, **kwargs, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-3, rtol=2e-3)


def test_a_row_of_a_padded_batch_is_that_row_alone(family, block):
    model, processor = build(family, **block)
    inputs = prompt(processor, (0, 1))
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    both = model(**inputs, position_ids=places)
    for row in (0, 1):
        alone = model(**prompt(processor, (row,)))
        torch.testing.assert_close(both.logits[row, -1], alone.logits[0, -1], atol=2e-3, rtol=2e-3)
    together = answers(model, prompt(processor, (0, 1)))
    assert together == [answers(model, prompt(processor, (row,)))[0] for row in (0, 1)]


def test_rows_with_unequal_numbers_of_visual_tokens(block):
    family = next(family for family in ONE_D if family.name == "llava_next_video")
    model, processor = build(family, **block)
    text = [QUESTIONS[0], QUESTIONS[1].replace("<video>", "<video> <video>")]
    videos = [random_video(seed=seed, frames=4) for seed in range(3)]
    both = processor(text=text, videos=videos, padding=True, return_tensors="pt")
    one, two = (
        processor(text=text[row], videos=videos[part], return_tensors="pt")
        for row, part in ((0, slice(1)), (1, slice(1, 3)))
    )
    assert answers(model, both) == [answers(model, one)[0], answers(model, two)[0]]


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams(family, block, kwargs):
    model, processor = build(family, **block)
    inputs = prompt(processor, (0, 1))
    assert answers(model, inputs, **kwargs) == answers(model, inputs, use_cache=False, **kwargs)


def test_an_assistant_model_changes_nothing(block):
    family = next(family for family in ONE_D if family.name == "llava_next_video")
    model, processor = build(family, **block)
    inputs = prompt(processor)
    assert answers(model, inputs, assistant_model=deep_model(family, 1, **block)) == answers(model, inputs)


def going_on(model, processor, cache, inputs, text, **kwargs):
    """The next turn, behind what the cache holds: ids and mask of the whole conversation."""
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], ids], dim=1)
    rest = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.generate(**rest, **{CACHE_NAME: cache}, max_new_tokens=4, do_sample=False, **kwargs)[0, ids.shape[1] :]


def test_a_second_turn_sees_what_the_first_left(family, block):
    """With the cache of the first turn, in one pass or token by token, copied or not."""
    model, processor = build(family, **block)
    inputs = prompt(processor)
    cache = model(**inputs)[CACHE_NAME]
    text = "USER: how many? ASSISTANT:"
    once = going_on(model, processor, copy.deepcopy(cache), inputs, text)
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for token in ids[0, :-1]:
        model(input_ids=token.view(1, 1), **{CACHE_NAME: cache})
    inputs = {"input_ids": torch.cat([inputs["input_ids"], ids[:, :-1]], dim=1)}
    assert going_on(model, processor, cache, inputs, ":").tolist() == once.tolist()


def test_cropped_caches(family, block):
    """Behind the media a crop takes back what followed; into them there is none."""
    model, processor = build(family, **block)
    inputs = prompt(processor)
    cache = model(**inputs)[CACHE_NAME]
    fresh, number = copy.deepcopy(cache), inputs["input_ids"].shape[1]
    expected = going_on(model, processor, fresh, inputs, "USER: where? ASSISTANT:")
    for places in (number, -3) if CROPS_TO_LENGTH else (-3,):
        model(input_ids=torch.tensor([[7, 8, 9]]), **{CACHE_NAME: cache})
        cache.crop(places)
        found = going_on(model, processor, copy.deepcopy(cache), inputs, "USER: where? ASSISTANT:")
        assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3 - number)


@pytest.mark.gradients
def test_training_reads_labels_of_the_tokens_that_reach_the_end(block):
    family = next(family for family in ONE_D if family.name == "llava_next_video")
    with torch.no_grad():
        model, processor = build(family, **block)
    inputs = prompt(processor)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    outputs = model(**inputs, labels=labels, use_cache=False)
    expected = F.cross_entropy(outputs.logits[0, -4:-1], labels[0, -3:])
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.model.language_model.layers)


def test_attention_kernels_agree(block, attention="eager"):
    family = next(family for family in ONE_D if family.name == "llava_next_video")
    model, processor = build(family, **block)
    inputs = prompt(processor, (0, 1))
    expected = model(**inputs).logits[:, -5:]
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(**inputs).logits[:, -5:], expected, atol=1e-3, rtol=1e-3)


def test_hidden_states_of_both_parts(block):
    family = next(family for family in ONE_D if family.name == "llava_next_video")
    model, processor = build(family, **block)
    outputs = model(**prompt(processor), output_hidden_states=True)
    first, lengths = model.config.pruning.first_inner_layer(4), [states.shape[1] for states in outputs.hidden_states]
    assert len(lengths) == 5 and lengths[0] == lengths[first - 1] and lengths[-1] == outputs.logits.shape[1]
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


# -- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "fastv", "inner_method": "dart", "inner_keep_ratio": 0.1}, "itself a stage inside"),
        ({"inner_layer": 2}, "inner_method, which is None"),
        ({"inner_method": "fastv"}, "inner_keep_ratio is None .* set it to a share"),
        ({"inner_method": "vtw", "inner_keep_ratio": 0.1}, "leave it out"),
        ({"inner_method": "fast"}, "'inner_method' is 'fast', but must be one of 'fastv'"),
        ({"inner_method": "fastv", "inner_keep_ratio": 0.1, "inner_layer": 0}, "'inner_layer' is 0"),
    ],
)
def test_bad_blocks(values, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**values)


def test_calls_that_need_all_tokens(family):
    model, processor = build(family, method="fastv", keep_ratio=0.3)
    inputs = prompt(processor)
    with pytest.raises(ValueError, match="asks for output_attentions"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="gives logits_to_keep as a tensor"):
        model(**inputs, logits_to_keep=torch.tensor([0]))
    with pytest.raises(ValueError, match="need a DynamicCache .* StaticCache|an expanded attention_mask"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    model.config.pruning = {"method": "vtw", "inner_layer": 4}
    with pytest.raises(ValueError, match="inner_layer is 4 for 'vtw', but the language model has 4 layers"):
        model(**inputs)


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.has_mrope], ids=lambda each: each.name)
@pytest.mark.parametrize("block", [{"method": "fastv"}, {"inner_method": "vtw"}], ids=str)
def test_positions_of_three_numbers(family, block):
    with pytest.raises(ValueError, match="positions of one number alone"):
        family.config(pruning=block)
