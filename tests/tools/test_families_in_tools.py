"""The tools that show what was kept, with every family."""

import argparse

import numpy as np
import pytest
import torch
from ask import visual_tokens
from drawing.overlay import draw_overlay
from drawing.pictures import patches_of, pictures_of
from drawing.trace import PreparedMedia, ratio_grid, trace
from families import FAMILIES
from media import add_media_arguments, read_media
from PIL import Image
from places import ROOT
from repository import FeatureMemory
from tiny import IMAGE_SIZE, PATCH_SIZE, random_video

MEDIA = {"image": "image-1.png", "video": "video-1.mp4"}
CASES = [pytest.param(family, kind, id=f"{family.name}-{kind}") for family in FAMILIES for kind in family.kinds]


def prepared(family, kind, **pruning):
    parser = argparse.ArgumentParser()
    add_media_arguments(parser)
    args = parser.parse_args([f"--{kind}", str(ROOT / "samples" / MEDIA[kind])])
    model, processor = family.model(**pruning), family.processor(**pruning)
    FeatureMemory(model)
    return model, processor, PreparedMedia(args, model, processor, read_media(args))


@torch.no_grad()
@pytest.mark.parametrize("family, kind", CASES)
def test_an_overlay_shows_every_kept_patch(family, kind, tmp_path):
    model, processor, media = prepared(family, kind, keep_ratio=0.3)
    inputs = media.inputs("where is it", processor.pruning)
    (item,) = model.select_tokens(**inputs)
    assert visual_tokens(processor, inputs) == len(item.kept)
    (pictures,) = pictures_of(model, processor, inputs, [item.layout])
    grids = [grid for grid in item.layout.grids for _ in range(grid.frames)]
    for (_, picture), grid, patches in zip(pictures, grids, patches_of(item.layout), strict=True):
        assert len(patches) == grid.height * grid.width
        crop = item.layout.crop if grid is item.layout.grids[-1] else None
        size = (IMAGE_SIZE, IMAGE_SIZE) if crop is None else (PATCH_SIZE * crop.height, PATCH_SIZE * crop.width)
        size = (2 * PATCH_SIZE * grid.height, 2 * PATCH_SIZE * grid.width) if family.has_mrope else size
        assert picture.dtype == np.uint8 and picture.shape[:2] == size
    draw_overlay(model, processor, inputs, "caption", tmp_path / "kept.png")
    assert Image.open(tmp_path / "kept.png").size[0] > 200


@torch.no_grad()
@pytest.mark.parametrize("family, kind", CASES)
@pytest.mark.parametrize("method", ["rediprune", "divprune"])
def test_a_trace_has_the_masks_of_what_is_kept(family, kind, method):
    scope = {"scope": "frame"} if family.refusal(method=method) else {}
    model, processor, media = prepared(family, kind, method=method, **scope)
    ratios = ratio_grid(model, media, processor.pruning, [0.25], 4)
    item = trace(model, media, "where is it", method, processor.pruning, ratios)
    assert [picture.picture.shape[0] // grid[0] for picture, grid in zip(media.panels(), item.grids, strict=True)]
    assert item.num_tokens == sum(height * width for height, width in item.grids)
    assert item.masks[-1].all()
    (kept,) = model.select_tokens(**media.inputs("where is it", processor.pruning.with_budget(0.25)))
    patches = torch.cat(patches_of(kept.layout))
    assert item.masks[item.step(0.25)].tolist() == torch.isin(patches, kept.kept).tolist()
    assert item.counts[item.step(0.25)] == len(kept.kept)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.has_mrope], ids=lambda family: family.name)
def test_patches_are_put_together_to_the_picture_that_they_were_cut_from(family):
    processor, model = family.processor(), family.model()
    frames = random_video(1, frames=4, size=(40, 48))
    inputs = processor(
        text=family.written("<image> <video>"), images=[Image.fromarray(frames[0])], videos=[frames], keep_ratio=1
    )
    layouts = [item.layout for item in model.select_tokens(**inputs)]
    (image,), video = pictures_of(model, processor, inputs, layouts)
    assert np.abs(image[1].astype(int) - frames[0]).max() <= 1
    assert [label for label, _ in video] == ["frame 1", "frame 2"]
    for (_, picture), frame in zip(video, frames[::2]):  # the first one of each pair
        assert np.abs(picture.astype(int) - frame).max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("family, kind", [case for case in CASES if case.values[0].has_mrope])
def test_pictures_of_any_size_are_encoded_once(family, kind):
    """Three questions about two pictures, one of them twice, under two methods: as without the memory, in one pass of the tower."""
    processor = family.processor(keep_ratio=0.3)
    first, second = (random_video(seed, 4, (56, 56)) for seed in (0, 1))
    media = (
        [first, second, first] if kind == "video" else [Image.fromarray(frames[0]) for frames in (first, second, first)]
    )
    texts = [family.written(f"<{kind}> {text}") for text in ("where ?", "what colour ?", "how many ?")]
    inputs = processor(text=texts, **{f"{kind}s": media}, padding=True, return_tensors="pt")

    def selected(model):
        found = []
        for method in ("rediprune", "uniform"):
            model.config.pruning.method = method
            found += [(item.kept, item.tokens) for item in model.select_tokens(**inputs)]
        return found

    model, passes = family.model(keep_ratio=0.3), []
    alone = selected(model)
    model.model.visual.register_forward_hook(lambda *args: passes.append(1))
    memory = FeatureMemory(model)
    remembered = selected(model)
    assert len(passes) == 1
    for (kept, tokens), (expected, expected_tokens) in zip(remembered, alone, strict=True):
        assert torch.equal(kept, expected)
        torch.testing.assert_close(tokens, expected_tokens)
    with memory.switched_off():
        selected(model)
    assert len(passes) == 3
