"""Inputs of a forward pass that do not belong together end in an error that says what to do."""

import pytest
import torch
from tiny import random_image, random_video, tiny_model, tiny_processor
from transformers import DynamicCache

VIDEO = 5  # token id


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def video_inputs(processor, text="red <video> where is the star ?"):
    return processor(text=text, videos=random_video())


def test_images_without_their_sizes(model, processor):
    inputs = processor(text="<image> where", images=random_image())
    del inputs["image_sizes"]
    for call in (model, model.select_tokens):
        with pytest.raises(ValueError, match="pixel_values of 1 images were passed without image_sizes.*pass all"):
            call(**inputs)


def test_sizes_of_other_images(model, processor):
    inputs = processor(text="<image> where <image>", images=[random_image(0), random_image(1)])
    inputs["image_sizes"] = inputs["image_sizes"][:1]
    with pytest.raises(ValueError, match="pixel_values hold 2 images, but image_sizes 1"):
        model(**inputs)


@pytest.mark.parametrize("change", [1, -1])
def test_an_attention_mask_of_another_length(model, processor, change):
    inputs = video_inputs(processor)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, length + change, dtype=torch.long)
    for call in (model, model.select_tokens):
        with pytest.raises(
            ValueError, match=rf"attention_mask has shape \(1, {length + change}\), but must be \(1, {length}\)"
        ):
            call(**inputs)


def test_an_attention_mask_of_the_new_tokens_alone(model, processor):
    cache, inputs = DynamicCache(), video_inputs(processor)
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="one entry for each token of the cache .* and of the prompt"):
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, 3), (2, 40), (40,)])
def test_a_query_mask_of_another_shape(model, processor, shape):
    inputs = video_inputs(processor)
    with pytest.raises(ValueError, match="query_mask has shape .* but must be"):
        model(**inputs, query_mask=torch.ones(shape, dtype=torch.long))


def test_a_query_mask_of_the_whole_text_over_a_cache(model, processor):
    """Its last entries are those of the new tokens."""
    cache = DynamicCache()
    before = processor(text="how many red")["input_ids"]
    model(input_ids=before, past_key_values=cache)
    inputs = video_inputs(processor)
    number = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, before.shape[1] + number, dtype=torch.long)
    mask = torch.ones(1, number, dtype=torch.long)
    mask[:, -3:] = 0
    longer = torch.cat([torch.zeros_like(before), mask], dim=1)

    def kept(query_mask):
        again = DynamicCache()
        model(input_ids=before, past_key_values=again)
        return model(**inputs, past_key_values=again, query_mask=query_mask).video_kept_indices[0]

    assert torch.equal(kept(longer), kept(mask))
    assert not torch.equal(kept(longer), kept(torch.ones_like(mask)))


@pytest.mark.parametrize("keep_ratio", [0.15, 1])
def test_placeholders_in_a_later_row_without_media(keep_ratio):
    model, processor = tiny_model(keep_ratio=keep_ratio), tiny_processor(keep_ratio=keep_ratio)
    inputs = video_inputs(processor)
    ids = inputs["input_ids"]
    for row in (
        ids,
        torch.cat([ids[:, :1], torch.full_like(ids[:, :1], VIDEO), ids[:, :1].expand(-1, ids.shape[1] - 2)], dim=1),
    ):
        rows = torch.cat([ids, row])
        with pytest.raises(ValueError, match="video placeholders .* its 1 videos give"):
            model(
                input_ids=rows, attention_mask=torch.ones_like(rows), pixel_values_videos=inputs["pixel_values_videos"]
            )


@pytest.mark.parametrize("keep_ratio", [0.15, 1])
def test_placeholders_without_any_media(keep_ratio):
    model, inputs = tiny_model(keep_ratio=keep_ratio), video_inputs(tiny_processor(keep_ratio=keep_ratio))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="video placeholders .* its 0 videos give 0 tokens"):
            call(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def test_without_pruning_nothing_was_kept_or_dropped(processor):
    inputs = processor(text="<video> where", videos=random_video(), keep_ratio=1)
    outputs = tiny_model()(**inputs)
    assert outputs.video_kept_indices is None and outputs.image_kept_indices is None
    text = tiny_model()(**processor(text="where"))
    assert text.video_kept_indices is None and text.image_kept_indices is None
