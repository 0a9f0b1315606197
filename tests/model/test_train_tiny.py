"""Training sees exactly what inference sees: the same tokens, positions and visual embeddings, packed or not."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_world import IMAGE_SIZES, object_map, sample_image, sample_video
from train_tiny import FAMILIES
from training.answers import evaluate_generation
from training.exporting import export
from training.llava_next_video import VIDEO, LlavaNextVideo
from training.muon import Muon, orthogonal
from training.packing import Packer
from training.pixels import build_image_processor, frames_to_pixels, image_to_pixels, view_maps
from training.runs import Optimizers, Run
from training.tokenizing import EOS, first_turn, later_turn

family = LlavaNextVideo()
pytestmark = pytest.mark.slow  # the vocabulary of its fixtures is counted from thousands of generated questions


@pytest.fixture(scope="module")
def tokenizer():
    return family.build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return family.build_model(tokenizer, seed=0).eval()


def test_the_checkpoint_stays_small(model):
    assert sum(p.numel() for p in model.parameters()) < 2.5e6


def test_pieces_are_cut_as_the_whole_chat_is(tokenizer):
    packer = Packer(tokenizer)
    a, b = sample_video(0).questions[:2]
    chat = f"USER: {VIDEO * 3}{first_turn(a)} {a.answer}{EOS}{later_turn(b)} {b.answer}{EOS}"
    (row,) = packer(family.prefix(packer, "video", 3), [[a, b]], np.array([False, True])).ids.tolist()
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
    visual = family.project(model, model.model.vision_resampler(features)[None])
    packer = Packer(tokenizer)
    prefix = family.prefix(packer, "video", visual.shape[1])
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
    torch.testing.assert_close(family.project(model, features[None], size)[0], stock, atol=1e-4, rtol=1e-4)


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
    pack = packer(family.prefix(packer, "image", 4), [list(scenes[0].questions), list(scenes[1].questions)[:2]])
    mask, segment = pack.mask()[:, 0], pack.segment
    query, key = segment[:, :, None], segment[:, None]
    assert not mask[(key != 0) & (key != query)].any()
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_folder_answers_in_the_stock_class(name, tmp_path):
    """Of each family, with random weights: every question about a scene of each kind gets an answer, right or wrong."""
    chosen = FAMILIES[name]()
    tokenizer = chosen.build_tokenizer()
    model = chosen.build_model(tokenizer, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    export(chosen, model, tokenizer, tmp_path / "export")
    result = evaluate_generation(chosen, tmp_path / "export", 1)
    assert result["video"]["questions"] == len(sample_video(0).questions) and result["image"]["questions"] > 0


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    def train(folder, steps_at_once):
        layer, run = None, Run(folder, 0)
        for steps in steps_at_once:
            torch.manual_seed(0)
            layer = torch.nn.Linear(4, 4)
            optimizer = Optimizers(layer.parameters(), 0.1, [layer.weight])
            for step, _ in run.steps("stage", 1000, 0.1, {"layer": layer}, optimizer):
                optimizer.update(layer(torch.full((1, 4), 1.0 + step % 3)).square().sum())
                if step + 1 == steps:
                    break
        return layer.weight

    # The checkpoint of step 250 is what the second run starts from.
    whole, resumed = train(tmp_path / "a", [400]), train(tmp_path / "b", [300, 400])
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 9), (1, 9, 4)])
def test_muon_brings_all_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    given, made = torch.linalg.svd(matrices, full_matrices=False), orthogonal(matrices)
    values = torch.diagonal(given.U.mT @ made @ given.Vh.mT, dim1=1, dim2=2)  # in the directions of the given ones
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))


def test_muon_steps_as_torch_does():
    """But for what bfloat16 rounds away."""
    torch.manual_seed(0)
    start = torch.randn(16, 24)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        gradient = torch.randn(16, 24)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()
