"""Every method inside the model: counts, batches, positions, loading, and the stock model at ratio 1."""

import pytest
import torch
from rediprune.methods_registry import METHODS
from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration as Model
from rediprune.ops_relevance import (
    RELEVANCES,
    attention_affinity,
    attention_relevance,
    read_question,
    stack_affinity,
    word_affinity,
)
from tiny import random_image, random_video, stock_twin, tiny_model, tiny_processor

QUESTIONS = ["what colour is the star ?", "which way does the red star on the left of blue move ?"]
EVERY_METHOD = pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.inner is None])
EVERY_KIND = pytest.mark.parametrize("kind", ["video", "image"])


def media_of(kind):
    if kind == "video":
        return [random_video(1), random_video(2)]
    return [random_image(1), random_image(2, (30, 90))]  # of different tile grids, both with padding


def inputs_of(processor, kind, samples=(0, 1), **options):
    text = [f"USER : <{kind}> {QUESTIONS[index]} ASSISTANT :" for index in samples]
    media = media_of(kind)
    return processor(text=text, padding=True, **{f"{kind}s": [media[index] for index in samples]}, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


@EVERY_METHOD
@EVERY_KIND
def test_answers(method, kind, checkpoint):
    """Loaded by name it answers about a batch, with the same answer for a sample alone and both kinds of positions."""
    for positions in ("compact", "original"):
        pruning = {"method": method, "keep_ratio": 0.25, "positions": positions}
        model, processor = Model.from_pretrained(checkpoint, pruning=pruning).eval(), tiny_processor(**pruning)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        answers = model.generate(**inputs_of(processor, kind), max_new_tokens=3, do_sample=False)[:, -3:]
        for sample in (0, 1):
            inputs = inputs_of(processor, kind, [sample])
            alone = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
            assert torch.equal(alone[0], answers[sample])


@EVERY_METHOD
@EVERY_KIND
@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("keep_ratio", [0.02, 0.3, 0.7])
def test_kept_tokens(method, kind, pooling, keep_ratio):
    """The same tokens alone and beside a longer question, as many as the processor said; a text that is not used changes none."""
    pruning = {"method": method, "keep_ratio": keep_ratio, "video_pooling": pooling}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    batch = model.select_tokens(**inputs_of(processor, kind))
    for sample, medium in enumerate(batch):
        (alone,) = model.select_tokens(**inputs_of(processor, kind, [sample]))
        assert torch.equal(medium.kept, alone.kept) and medium.tokens.isfinite().all()
        if not METHODS[method].merges_in_encoder:
            assert (medium.kept.diff() > 0).all()
        assert len(medium.layout.columns(medium.kept)) == len(medium.tokens)


@EVERY_METHOD
@EVERY_KIND
def test_ratio_1_is_the_stock_model(method, kind):
    model, processor = tiny_model(method=method, keep_ratio=1.0), tiny_processor(method=method, keep_ratio=1.0)
    inputs = inputs_of(processor, kind)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock_twin(model)(**inputs).logits)


@EVERY_METHOD
@EVERY_KIND
def test_half_precision(method, kind):
    pruning = {"method": method, "keep_ratio": 0.25}
    model, processor = tiny_model(**pruning).to(torch.bfloat16), tiny_processor(**pruning)
    inputs = inputs_of(processor, kind).to(torch.bfloat16)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@EVERY_METHOD
def test_gradient_reaches_the_vision_tower(method):
    pruning = {"method": method, "keep_ratio": 0.25}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    inputs = inputs_of(processor, "video")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameters in (model.model.vision_tower.parameters(), model.model.multi_modal_projector.parameters()):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert gradients and any(gradient.abs().sum() > 0 for gradient in gradients)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind, shapes", [("video", [(1, 13)]), ("image", [(1, 35)])])
def test_joint_methods_count_all_tokens_of_a_medium(kind, shapes):
    pruning = {
        "method": "divprune",
        "keep_ratio": 0.2,
    }  # of 4 * 16 tokens; of 64 and of 2 tiles of 64 less their padding
    (medium,) = tiny_model(**pruning).select_tokens(**inputs_of(tiny_processor(**pruning), kind, [0]))
    total = medium.layout.num_tokens
    assert medium.kept.shape == (round(0.2 * total),)
    assert medium.kept.max() < total and (medium.layout.columns(medium.kept).diff() > 0).all()


def test_encoder_ratio_changes_the_composed_method():
    kept = []
    for ratio in (0.3, 1.0):
        pruning = {
            "method": "evoprune_rediprune",
            "keep_ratio": 0.25,
            "encoder_keep_ratio": ratio,
            "video_pooling": False,
        }
        model = tiny_model(**pruning)
        kept.append(model.select_tokens(**inputs_of(tiny_processor(**pruning), "video"))[0].kept)
    assert kept[0].shape == kept[1].shape and not torch.equal(*kept)


def test_merging_in_the_encoder_needs_a_layer():
    pruning = {"method": "evoprune", "keep_ratio": 0.25}
    model = tiny_model(**pruning)
    with pytest.raises(ValueError, match="vision_feature_layer is 0"):
        model(**inputs_of(tiny_processor(**pruning), "video"), vision_feature_layer=0)


# -- relevance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "relevance" in method.required_signals])
def test_the_question_moves_the_selection(method, text_tower):
    for relevance in RELEVANCES:
        pruning = {"method": method, "keep_ratio": 0.25, "relevance": relevance, "alpha": 5.0, "text_tower": text_tower}
        model, processor = tiny_model(**pruning), tiny_processor(**pruning)
        media = {"videos": [random_video(1)] * 2, "padding": True}
        ask = lambda *questions: model.select_tokens(  # noqa: E731
            **processor(text=[f"USER : <video> {question}" for question in questions], **media)  # noqa: B023
        )
        first, second = ask(*QUESTIONS)
        assert not torch.equal(first.kept, second.kept), relevance
        first, second = ask(QUESTIONS[0], QUESTIONS[0])
        assert torch.equal(first.kept, second.kept)


@pytest.mark.parametrize("relevance", RELEVANCES)
@pytest.mark.parametrize("method", ["rediprune", "cdpruner", "trim", "mmtok"])
def test_a_prompt_without_question(method, relevance, text_tower):
    pruning = {"method": method, "keep_ratio": 0.25, "relevance": relevance, "text_tower": text_tower}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    texts = ["USER : <video>", f"USER : <video> {QUESTIONS[0]}"]
    media = model.select_tokens(**processor(text=texts, videos=media_of("video"), padding=True))
    assert [medium.kept.shape for medium in media] == [(16,), (16,)]


def decoder_layer(kind):
    """A first layer with grouped keys; with biases (Qwen2) or norms of q and k (Qwen3)."""
    from transformers import AutoConfig, AutoModel

    options = dict(
        hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    config = AutoConfig.for_model(kind, vocab_size=8, head_dim=8, **options)
    layer = AutoModel.from_config(config).layers[0].eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_attention_affinity_equals_slow_reference(kind):
    torch.manual_seed(0)
    layer, words, tokens = decoder_layer(kind), torch.randn(3, 32), torch.randn(2, 10, 32)
    attention, norm = layer.self_attn, layer.input_layernorm
    rows = attention_affinity(layer, words, tokens)
    identity = lambda values: values  # noqa: E731
    q_norm, k_norm = getattr(attention, "q_norm", identity), getattr(attention, "k_norm", identity)
    assert (kind == "qwen3") == (q_norm is not identity) and (kind == "qwen2") == (attention.q_proj.bias is not None)
    for n, t in [(0, 0), (0, 2), (1, 1)]:
        best = torch.zeros(10)
        for head in range(4):
            query = q_norm(attention.q_proj(norm(words[t])).view(4, 8)[head])
            keys = k_norm(attention.k_proj(norm(tokens[n])).view(10, 2, 8)[:, head // 2])
            best = torch.maximum(best, (keys @ query / 8**0.5).softmax(0))
        torch.testing.assert_close(rows[n, t], best)
    relevance = attention_relevance(rows)
    assert relevance.shape == (2, 10) and relevance.amin(1).tolist() == [0, 0]
    torch.testing.assert_close(relevance.amax(1), torch.ones(2))


def test_word_affinity():
    words, tokens = torch.eye(3)[:2], torch.eye(3)[None] * 5
    rows = word_affinity(words, tokens)
    torch.testing.assert_close(rows, torch.eye(3)[None, :2].double())  # exp(-1 / 0.02) is nothing
    stacked = stack_affinity([rows, rows[:, :1]])
    assert stacked.shape == (2, 2, 3) and stacked[1, 1].tolist() == [0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_question_is_read_alone(attention):
    """As the language model itself would, if the prompt were the question."""
    model = tiny_model().model.language_model
    model.set_attn_implementation(attention)
    words = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    states = model(inputs_embeds=words[None], output_hidden_states=True).hidden_states
    for depth in (0, 1):
        torch.testing.assert_close(read_question(model, words, depth), states[depth][0])
    assert read_question(model, words[:0], 1).shape == (0, 32)
    with pytest.raises(ValueError, match="relevance_layer=2 must be below 2"):
        read_question(model, words, 2)


def test_relevance_layers_differ():
    kept = []
    for layer in (0, 1):
        pruning = {
            "method": "rediprune",
            "keep_ratio": 0.25,
            "relevance": "attention",
            "relevance_layer": layer,
            "alpha": 9.0,
        }
        model = tiny_model(**pruning)
        kept.append(model.select_tokens(**inputs_of(tiny_processor(**pruning), "video"))[0].kept)
    assert not torch.equal(*kept)


@pytest.mark.parametrize("scope, video, image", [("frame", 4, 2), ("video", 1, 2), ("item", 1, 1)])
def test_scope(scope, video, image):
    """How many sets share a budget: of 4 frames, and of a base view with tiles."""
    pruning = {"scope": scope, "keep_ratio": 0.25}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    of = lambda kind: model.select_tokens(**inputs_of(processor, kind, [0]))[0]  # noqa: E731
    for kind, expected in (("video", video), ("image", image)):
        assert sum(number for number, _ in of(kind).layout.sets(model.config.pruning)) == expected
