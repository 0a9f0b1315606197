"""What torch.compile makes of a forward pass, and the command that counts it."""

import pytest
import torch
from graph_breaks import as_text, count, stock_of
from tiny import make_inputs, random_video, tiny_model, tiny_processor

PRUNING = {"method": "rediprune_plus", "keep_ratio": 0.3}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return tiny_model(**PRUNING)


@pytest.fixture
def inputs():
    text = "USER : <video> where is the star ? ASSISTANT :"
    return dict(make_inputs(tiny_processor(**PRUNING), text, videos=random_video()))


def test_the_stock_class_has_the_same_weights(model):
    stock = stock_of(model)
    assert type(stock).__module__.startswith("transformers.") and type(stock) in type(model).__mro__
    for name, weight in model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], weight)


@pytest.mark.slow
def test_our_breaks_are_the_three_stages_that_are_left_out(model, inputs):
    """They stand in `forward` itself, so that each splits that one function: of four graphs the tower and the language model are two."""
    found = count(model.forward, inputs)
    own = [place for place in found["breaks"] if place["own"]]
    assert [place["file"] for place in own] == ["core_forward.py"] * 3 and sum(place["times"] for place in own) == 3
    assert all("torch.compiler.disable" in place["reason"] for place in own)
    assert found["graphs"] <= 4


@pytest.mark.slow
def test_a_compiled_pass_gives_what_an_uncompiled_one_gives(model, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager")(**inputs)
    assert torch.equal(compiled.logits, model(**inputs).logits)


def test_the_tables():
    place = {"file": "core_items.py", "line": 7, "reason": "why", "own": True, "times": 2}
    times = {"eager": 1.0, "first": 20.0, "compiled": 0.5, "logits move by": 1e-6}
    results = {
        "this": {"graphs": 3, "operations": 10, "breaks": [place], **times},
        "stock class": {"graphs": 1, "operations": 8, "breaks": [], **times},
    }
    text = as_text({"results": results})
    assert "| this | 3 | 10 |" in text and "| this | 1 | 20 | 0.5 | 1e-06 |" in text
    assert "| `core_items.py:7` | ours | 2 | why |" in text and "**stock class**\n\nno break" in text
