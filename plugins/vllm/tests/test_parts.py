"""The parts of the package that need no engine."""

import pytest
import torch
from rediprune_vllm.attention import wide_head
from rediprune_vllm.loading import parts_of_checkpoint
from rediprune_vllm.media_cache import MediaCache


def sets_of(size: int) -> list:
    return [{"features": torch.arange(size, dtype=torch.float32).view(1, -1, 1)}]


def test_the_medium_that_was_not_used_for_longest_goes():
    cache = MediaCache(max_bytes=3 * 40)
    for key in "abc":
        cache.put(key, sets_of(10))
    assert cache.get("a", "cpu")[0]["features"].equal(sets_of(10)[0]["features"])
    cache.put("d", sets_of(10))
    assert cache.get("b", "cpu") is None and cache.num_bytes == 3 * 40
    cache.put("large", sets_of(31))
    assert cache.get("large", "cpu") is None and cache.get("a", "cpu") is not None
    cache.put("two", sets_of(20))
    assert cache.num_bytes == 3 * 40


def test_what_is_kept_holds_no_larger_tensor():
    batch = torch.zeros(100, 10)
    cache = MediaCache(max_bytes=1000)
    cache.put("a", [{"features": batch[:1]}])
    (kept,) = cache._media.values()
    assert kept[0]["features"].untyped_storage().nbytes() == cache.num_bytes == 40


@pytest.mark.parametrize("size, wide", [(32, 64), (64, 96), (80, 96), (96, 128), (126, 128), (128, 160)])
def test_heads_with_spare_channels(size, wide):
    assert wide_head(size) == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_marks_go_through_every_dtype_whole(dtype):
    from types import SimpleNamespace

    from rediprune.core_layout import Layout, TokenGrid
    from rediprune_vllm.model import marks, read_marks

    kept = torch.tensor([0, 7, 4000, 99_999])
    item = SimpleNamespace(
        kept=kept, layout=Layout("video", (TokenGrid(1, 1, 100_000),)), token_sizes=torch.tensor([1.0, 257, 65_537, 3])
    )
    embeds = torch.zeros(4, 8, dtype=dtype)
    wide = torch.cat([embeds, marks(item, embeds)], dim=1)
    sizes, shifts = read_marks(wide[1:, 8:]).T
    assert sizes.tolist() == [257, 65_537, 3] and shifts.tolist() == [6, 3998, 99_996]


def test_names_of_every_version_of_transformers():
    names = {
        "language_model.model.layers.0.mlp.up_proj.weight": ("language_model", "model.layers.0.mlp.up_proj.weight"),
        "model.language_model.layers.0.mlp.up_proj.weight": ("language_model", "model.layers.0.mlp.up_proj.weight"),
        "language_model.lm_head.weight": ("language_model", "lm_head.weight"),
        "lm_head.weight": ("language_model", "lm_head.weight"),
        "vision_tower.vision_model.embeddings.x": ("vision", "model.vision_tower.embeddings.x"),
        "model.vision_tower.embeddings.x": ("vision", "model.vision_tower.embeddings.x"),
        "video_tower.vision_model.embeddings.x": ("vision", "model.video_tower.embeddings.x"),
        "model.multi_modal_projector.linear_1.bias": ("vision", "model.multi_modal_projector.linear_1.bias"),
        "image_newline": ("vision", "model.image_newline"),
        "model.image_newline": ("vision", "model.image_newline"),
    }
    found = [(part, name) for part, name, _ in parts_of_checkpoint((name, None) for name in names)]
    assert found == list(names.values())


def test_videos_as_they_are_passed():
    import numpy as np
    from PIL import Image
    from rediprune_vllm.processing import Parser

    parser = Parser(expected_hidden_size=None, allow_missing_mm_embeddings=False)
    count = lambda data: parser._parse_video_data(data).get_count()  # noqa: E731
    file, frames = np.zeros(9, np.uint8), np.zeros((4, 8, 8, 3), np.uint8)
    for one in (b"file", file, frames, list(frames), [Image.new("RGB", (8, 8))] * 3, (frames, {})):
        assert count(one) == 1
        assert count([one, one]) == 2
    assert count([]) == 0
    with pytest.raises(ValueError, match="content of a file"):
        parser._parse_video_data("clip.mp4")


@pytest.mark.parametrize("positions", ["original", "scaled", "compact"])
@pytest.mark.parametrize("context, most", [(64, None), (4096, None), (4096, 48)])
def test_positions_are_those_of_transformers(positions, context, most):
    """In chunks of every length, and again after a request was put off; media stand side by side, and one ends the prompt."""
    from types import SimpleNamespace

    from rediprune import core_positions
    from rediprune.core_items import MediaItem
    from rediprune.core_layout import Layout, TokenGrid
    from rediprune_vllm.model import PrunedModel, marks

    text_config = SimpleNamespace(hidden_size=8, max_position_embeddings=context)
    pruning = SimpleNamespace(resolved=lambda key: positions, max_positions=most)
    limit = min(context, most or context)
    model = SimpleNamespace(
        config=SimpleNamespace(text_config=text_config, pruning=pruning),
        code={"core_positions": core_positions},
        media_tokens=[4],
    )
    model._positions = lambda rows: PrunedModel._positions(model, rows)
    items, features, embeds, ids = [], [], [], [5, 6]
    for frames, kept, text in ((2, [1, 7, 8, 30], 0), (1, [0, 15], 3), (2, [3, 31], 0)):
        layout = Layout("video", (TokenGrid(frames, 4, 4),))
        item = MediaItem(layout, row=0, kept=torch.tensor(kept), token_sizes=torch.arange(len(kept)) + 1.0)
        where = SimpleNamespace(offset=len(ids), length=len(kept))
        unpruned = SimpleNamespace(data=torch.tensor(layout.num_unpruned))
        features.append(SimpleNamespace(mm_position=where, modality="video", data={"video_num_unpruned": unpruned}))
        plain = torch.zeros(len(kept), 8)
        embeds.append(torch.cat([plain, marks(item, plain)], dim=1))
        items.append(item)
        ids += [4] * len(kept) + [7] * text
    mask = torch.tensor([ids]) == 4
    expected, skipped = core_positions.unpruned_columns({"video": mask}, items)
    if positions == "scaled":
        room = core_positions.room_for_gaps(limit, torch.tensor([len(ids)]), skipped.sum(1))
        expected, skipped = core_positions.shrunk_columns(expected, skipped, room)
    if positions == "compact":
        expected, skipped = torch.arange(len(ids))[None], torch.zeros_like(skipped)
    sizes = torch.ones(len(ids), dtype=torch.long)
    sizes[mask[0]] = torch.cat([item.token_sizes.long() for item in items])
    flat = torch.cat(embeds)
    for chunk in range(1, len(ids) + 1):
        rows, delta = PrunedModel.get_mrope_input_positions(model, ids, features)
        for start in [*range(0, len(ids), chunk), *range(0, len(ids), chunk)]:
            before, inside = int(mask[0, :start].sum()), int(mask[0, start : start + chunk].sum())
            given = [flat[before : before + inside]] if inside else []
            found, rows, delta = PrunedModel.recompute_mrope_positions(model, ids, given, rows, start)
            assert all(embeds.shape[1] == 8 for embeds in found)
        assert rows[0].tolist() == expected[0].tolist()
        assert (rows[1] - rows[0] + 1).tolist() == sizes.tolist()
        assert delta == int(skipped.sum())
