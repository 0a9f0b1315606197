"""Every way to generate: at ratio 1 what the stock class gives, pruned what a stock class gives that is handed the pruned
prompt as embeddings. Takes the place of transformers' `GenerationTesterMixin`, which the source archive on PyPI lacks.

Left out, as transformers itself has them no more and loads their code from the Hub: contrastive search, group beam search,
constrained beam search, DoLa.
"""

import copy

import pytest
import torch
import transformers
from tiny import random_image, random_video, stock_twin, tiny_model, tiny_processor
from transformers import CompileConfig, DynamicCache

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
IMAGE, VIDEO = 4, 5  # token ids
NEW_TOKENS = 6

MEDIA = {
    "video": ("USER : <video> where is the star ? ASSISTANT :", {"videos": 1}),
    "image": ("USER : <image> how many ? ASSISTANT :", {"images": 1}),
    "batch": (["<image> what colour ?", "USER : <video> <image> which way does it move ?"], {"images": 2, "videos": 1}),
}
BLOCKS = {
    "all": {"keep_ratio": 1},
    "pruned": {"keep_ratio": 0.3},
    "skip": {"keep_ratio": 0.15, "video_pooling": False},
    "original": {"keep_ratio": 0.3, "positions": "original"},
    "plus": {"keep_ratio": 0.3, "method": "rediprune_plus"},
}
# Those whose prompt a stock class can be handed: it knows no other positions than compact ones.
COMPACT = ["all", "pruned", "skip"]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "minimal length": {"min_new_tokens": 4, "eos_token_id": list(range(6, 40))},
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=BLOCKS)
def block(request):
    return request.param


@pytest.fixture(scope="module")
def model(block):
    return ready(tiny_model(**BLOCKS[block]))


@pytest.fixture(scope="module", params=MEDIA)
def inputs(request, block):
    return prompt(tiny_processor(**BLOCKS[block]), request.param)


@pytest.fixture(scope="module", params=["video", "image"])
def single(request, block):
    """A prompt of one row, which is all that assisted generation and streamers take."""
    return prompt(tiny_processor(**BLOCKS[block]), request.param)


def ready(model):
    model.generation_config.eos_token_id = -1  # 4.57 looks up prompts only where there is one
    return model


def prompt(processor, name, **kwargs):
    text, numbers = MEDIA[name]
    media = {
        "images": [
            random_image(seed, size) for seed, size in enumerate([(40, 48), (20, 60)][: numbers.get("images", 0)])
        ],
        "videos": [random_video(seed) for seed in range(numbers.get("videos", 0))],
    }
    return processor(text=text, padding=True, **{kind: items for kind, items in media.items() if items}, **kwargs)


def new_tokens(model, inputs, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def pruned_prompt(model, inputs):
    """The prompt as the language model gets it: embeddings, with the kept visual tokens in their places, and the mask."""
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return {"inputs_embeds": seen["inputs_embeds"], "attention_mask": inputs["attention_mask"]}


# -- the stock class is the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", COMPACT, indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_decoding_is_that_of_the_stock_class(model, inputs, block, mode):
    stock = stock_twin(model)
    found = new_tokens(model, inputs, **MODES[mode])
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **MODES[mode]}
    torch.manual_seed(0)
    # Handed embeddings, it gives the new tokens alone, as many as with ids.
    expected = stock.generate(**pruned_prompt(model, inputs), **kwargs)
    assert torch.equal(found, expected)
    if block == "all":
        assert torch.equal(found, new_tokens(stock, inputs, **MODES[mode]))


@pytest.mark.parametrize("block", COMPACT, indirect=True)
@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling"])
def test_scores_logits_states_and_attentions(inputs, block, mode):
    """Their values are those of the stock class, and their lengths those of the pruned prompt."""
    model = ready(tiny_model(**BLOCKS[block]))
    stock = stock_twin(model)
    for each in (model, stock):
        each.set_attn_implementation("eager")
    asked = dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions"), True
    )
    kwargs = {**asked, "do_sample": False, "max_new_tokens": NEW_TOKENS, **MODES[mode]}
    results = []
    for each, arguments in ((model, inputs), (stock, pruned_prompt(model, inputs))):
        torch.manual_seed(0)
        results.append(each.generate(**arguments, **kwargs))
    ours, theirs = results
    assert type(ours) is type(theirs) and set(ours) == set(theirs)
    for name in ("scores", "logits"):
        assert len(ours[name]) == NEW_TOKENS
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours[name], theirs[name]))
    length, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"]) * kwargs.get("num_beams", 1)
    layers = model.config.text_config.num_hidden_layers
    for step, (states, attentions) in enumerate(zip(ours.hidden_states, ours.attentions)):
        queries, keys = (length, length) if step == 0 else (1, length + step)
        assert [tuple(state.shape) for state in states] == [(rows, queries, 32)] * (layers + 1)
        assert [tuple(attention.shape) for attention in attentions] == [(rows, 4, queries, keys)] * layers
        for name, values in (("hidden_states", states), ("attentions", attentions)):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(values, theirs[name][step]))
    for layer in ours.past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (rows, 2, length + NEW_TOKENS - 1, 8)


def test_without_media(model):
    stock = stock_twin(model)
    inputs = tiny_processor(**model.config.pruning.to_dict())(text=["how many", "where is the star ?"], padding=True)
    for mode in MODES.values():
        assert torch.equal(new_tokens(model, inputs, **mode), new_tokens(stock, inputs, **mode))


# -- every way gives what plain generation gives -----------------------------------------------------------------------


@pytest.mark.parametrize("assistant", ["the same", "another"])
def test_an_assistant_model_changes_nothing(model, single, block, assistant):
    """The candidates that it proposes are no part of the question, although they are in the first pass."""
    helper = copy.deepcopy(model) if assistant == "the same" else ready(tiny_model(seed=3, **BLOCKS[block]))
    # Trained models propose no placeholders; these random ones do, and then the stock class fails as well.
    options = {"bad_words_ids": [[IMAGE], [VIDEO]]}
    expected = new_tokens(model, single, **options)
    assert torch.equal(new_tokens(model, single, assistant_model=helper, **options), expected)


def test_prompt_lookup_without_placeholders(model, single):
    """Candidates copied from the prompt must not be placeholders: without `bad_words_ids` the stock class fails, too."""
    options = {"bad_words_ids": [[IMAGE], [VIDEO]]}
    found = new_tokens(model, single, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(found, new_tokens(model, single, **options))


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_no_cache(model, inputs, kwargs):
    assert torch.equal(new_tokens(model, inputs, use_cache=False, **kwargs), new_tokens(model, inputs, **kwargs))


@pytest.mark.parametrize("cache", [None, "static"])
def test_embeddings_of_the_unfilled_prompt(model, inputs, cache):
    """`inputs_embeds` with media: the placeholders are found by their embeddings."""
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": cache}
    found = model.generate(inputs_embeds=embeds, **rest, **kwargs)
    assert torch.equal(found, new_tokens(model, inputs))


@pytest.mark.slow
def test_compiled_decoding_is_one_graph(model, inputs):
    """Nothing in a step of decoding breaks the graph, so `fullgraph` passes; the backend does not matter for that."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True  # generate compiles by itself on accelerators alone
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = new_tokens(model, inputs)
    found = new_tokens(copy.deepcopy(model), inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_going_on_from_a_cache(model, inputs):
    """Half of the answer, then the other half with the cache of the first."""
    first = model.generate(
        **inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, past_key_values=DynamicCache()
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(first.sequences), 3, dtype=torch.long)], dim=1)
    rest = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
    assert torch.equal(new_tokens(model, rest, max_new_tokens=3), new_tokens(model, inputs)[:, 3:])


def test_going_on_from_a_cache_with_embeddings(model, inputs):
    """The same with the whole text as embeddings, which `generate` cuts to what the cache does not hold."""
    table = model.get_input_embeddings()
    first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(first.sequences), 3, dtype=torch.long)], dim=1)
    rest = {"attention_mask": mask, "past_key_values": first.past_key_values}
    found = model.generate(inputs_embeds=table(first.sequences), **rest, do_sample=False, max_new_tokens=3)
    assert torch.equal(found, new_tokens(model, inputs)[:, 3:])


@pytest.mark.skipif(
    not IS_5, reason="generate of 4.57 stays at the last of them in every step, of the stock class, too"
)
def test_positions_of_the_caller_are_those_of_the_pruned_prompt(model, inputs):
    found = new_tokens(model, {**inputs, "position_ids": positions(inputs)})
    assert torch.equal(found, new_tokens(model, inputs))


def test_prompt_lookup_ends_with_the_end(model, single):
    """At the first token that ends an answer, although more candidates may have been right."""
    options = {"bad_words_ids": [[IMAGE], [VIDEO]]}
    plain = new_tokens(model, single, **options)[0]
    found = new_tokens(model, single, prompt_lookup_num_tokens=3, eos_token_id=int(plain[2]), **options)[0]
    first = plain.tolist().index(int(plain[2]))
    assert torch.equal(found, plain[: first + 1])


def test_left_padding_changes_nothing(model, block):
    processor = tiny_processor(**BLOCKS[block])
    for name in ("video", "image"):
        inputs = prompt(processor, name)
        padded = {**inputs}
        for key, value in {"input_ids": 0, "attention_mask": 0}.items():
            padded[key] = torch.nn.functional.pad(inputs[key], (5, 0), value=value)
        assert torch.equal(new_tokens(model, padded), new_tokens(model, inputs))
        logits = [model(**each, position_ids=positions(each)).logits[:, -1] for each in (inputs, padded)]
        assert torch.allclose(*logits, atol=1e-4)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


def test_a_streamer_sees_every_token(model, single):
    class Collector:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append(tokens.flatten())

        def end(self):
            self.seen.append(None)

    collector = Collector()
    expected = new_tokens(model, single, streamer=collector)
    sent, *tokens, end = collector.seen
    assert torch.equal(sent, single["input_ids"][0]) and end is None
    assert torch.equal(torch.cat(tokens), expected[0])


@pytest.mark.parametrize("block", COMPACT, indirect=True)
def test_a_cache_that_is_quantised(model, inputs):
    """Its answers are others than plain ones, but those of the stock class."""
    pytest.importorskip("optimum.quanto")
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4}
    options = {"cache_implementation": "quantized", "cache_config": config}
    expected = stock_twin(model).generate(
        **pruned_prompt(model, inputs), **options, do_sample=False, max_new_tokens=NEW_TOKENS
    )
    assert torch.equal(new_tokens(model, inputs, **options), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves the cache between an accelerator and the CPU")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_a_cache_that_is_offloaded(block, inputs, implementation):
    model, inputs = ready(tiny_model(**BLOCKS[block])).cuda(), inputs.to("cuda")
    assert torch.equal(new_tokens(model, inputs, cache_implementation=implementation), new_tokens(model, inputs))
