"""Prefilling in chunks: the stock answer where nothing is pruned, a clear refusal where something is."""

import pytest
import torch
import transformers
from tiny import random_image, random_video, tiny_model, tiny_processor

PROMPTS = {
    "text": ("where is the star ?", {}),
    "video": ("red left <video> where is", {"videos": [random_video()]}),
    "image": ("<image> which way does it move ?", {"images": [random_image()]}),
    "both": ("<image> which <video> where", {"images": [random_image(1)], "videos": [random_video(1)]}),
}


def answer(model, inputs, **kwargs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=5, **kwargs)


@pytest.mark.parametrize("size", [3, 16, 500])
@pytest.mark.parametrize("name", PROMPTS)
def test_nothing_is_pruned(name, size):
    text, media = PROMPTS[name]
    model, processor = tiny_model(keep_ratio=1), tiny_processor(keep_ratio=1)
    inputs = processor(text=text, **media)
    assert torch.equal(answer(model, inputs, prefill_chunk_size=size), answer(model, inputs))


def test_text_alone_on_a_pruning_model():
    model, inputs = tiny_model(), tiny_processor()(text=PROMPTS["text"][0])
    assert torch.equal(answer(model, inputs, prefill_chunk_size=3), answer(model, inputs))


@pytest.mark.parametrize("name", ["video", "image", "both"])
def test_something_is_pruned(name):
    text, media = PROMPTS[name]
    model, inputs = tiny_model(keep_ratio=0.3), tiny_processor(keep_ratio=0.3)(text=text, **media)
    with pytest.raises(ValueError, match="prefill_chunk_size=4.*pruned.*prefill_chunk_size=None"):
        answer(model, inputs, prefill_chunk_size=4)


def test_a_second_turn_in_chunks():
    """Text that follows a pruned video in the cache may come in chunks."""
    settings = {"keep_ratio": 0.3, "method": "rediprune_plus"}
    model, processor = tiny_model(**settings), tiny_processor(**settings)
    inputs = processor(text="<video> where", videos=[random_video()])

    def second(**kwargs):
        first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, processor(text="how many red star ?")["input_ids"][:, 1:]], dim=1)
        new = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        return answer(model, new, **kwargs)

    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(ValueError, match="prefill_chunk_size=3 cannot go on from a cache"):
            second(prefill_chunk_size=3)
    else:
        assert torch.equal(second(prefill_chunk_size=3), second())
