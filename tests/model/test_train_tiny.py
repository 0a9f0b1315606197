"""Training sees exactly what inference sees: the same tokens, positions and visual embeddings, packed or not."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_world import IMAGE_SIZES, object_map, sample_image, sample_video
from train_tiny import (
    EOS,
    IMAGE,
    VIDEO,
    Packer,
    build_image_processor,
    build_model,
    build_tokenizer,
    first_turn,
    frames_to_pixels,
    image_to_pixels,
    later_turn,
    project,
    view_maps,
)

pytestmark = pytest.mark.slow  # the vocabulary of its fixtures is counted from thousands of generated questions


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, seed=0).eval()


def test_the_checkpoint_stays_small(model):
    assert sum(p.numel() for p in model.parameters()) < 2.5e6


def test_pieces_are_cut_as_the_whole_chat_is(tokenizer):
    packer = Packer(tokenizer)
    a, b = sample_video(0).questions[:2]
    chat = f"USER: {VIDEO * 3}{first_turn(a)} {a.answer}{EOS}{later_turn(b)} {b.answer}{EOS}"
    (row,) = packer(packer.prefix(VIDEO, 3), [[a, b]], np.array([False, True])).ids.tolist()
    assert row == tokenizer.encode(chat).ids


def test_every_word_is_one_token_and_every_text_survives(tokenizer):
    for seed in range(50):
        for question in sample_video(seed).questions:
            text = first_turn(question)
            assert len(tokenizer.encode(text, add_special_tokens=False).ids) == len(text.split()) + text.count(",") + 3
    assert tokenizer.decode(tokenizer.encode("Wo ist der grüne Würfel? 🙂").ids) == "Wo ist der grüne Würfel? 🙂"


@torch.no_grad()
def test_a_packed_question_gets_the_logits_of_a_lone_one(tokenizer, model):
    scene = sample_video(1)
    pixels = frames_to_pixels(scene.frames)
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    visual = project(model, model.model.vision_resampler(features)[None])
    packer = Packer(tokenizer)
    prefix = packer.prefix(VIDEO, visual.shape[1])
    pack = packer(prefix, [list(scene.questions)])
    embeds = model.get_input_embeddings()(pack.ids)
    embeds = embeds.masked_scatter((pack.ids == model.config.video_token_id)[..., None], visual)
    packed = model.model.language_model(
        inputs_embeds=embeds, attention_mask=pack.mask(), position_ids=pack.position, use_cache=False
    ).last_hidden_state[0]
    for i, question in enumerate(scene.questions):
        ids = torch.tensor([prefix + packer.encode(first_turn(question))])
        alone = model.model(input_ids=ids, pixel_values_videos=pixels[None]).last_hidden_state[0, -1]
        last = (pack.owner[0] == i).nonzero()[0, 0] - 1
        torch.testing.assert_close(packed[last], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_images_are_put_together_as_the_stock_model_does(model, size):
    scene = next(s for s in map(sample_image, range(100)) if s.frames.shape[1:3] == size)
    pixels = image_to_pixels(build_image_processor(), scene)
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    stock = model.model.get_image_features(pixels[None], torch.tensor([size]))
    stock = getattr(stock, "pooler_output", stock)[0]
    torch.testing.assert_close(project(model, features[None], size)[0], stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_object_maps_of_views_lie_where_the_pixels_lie(size):
    scene = next(s for s in map(sample_image, range(100)) if s.frames.shape[1:3] == size)
    objects = object_map(scene)
    marked = np.repeat((objects > 0)[..., None] * np.uint8(255), 3, -1)
    pixels = build_image_processor()(Image.fromarray(marked), return_tensors="pt")["pixel_values"][0]
    maps = np.stack(view_maps(objects))
    assert maps.shape == (3, 96, 96)
    assert ((pixels[:, 0].numpy() > 0) == (maps > 0)).mean() > 0.99


def test_a_pack_hides_other_chats_and_padding(tokenizer):
    packer = Packer(tokenizer)
    scenes = [sample_image(0), sample_image(1)]
    pack = packer(packer.prefix(IMAGE, 4), [list(scenes[0].questions), list(scenes[1].questions)[:2]])
    mask, segment = pack.mask()[:, 0], pack.segment
    query, key = segment[:, :, None], segment[:, None]
    assert not mask[(key != 0) & (key != query)].any()
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()
