"""The pruned forward pass and generation: the stock model at ratio 1, and the tokens that were meant at other ratios."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import transformers
from rediprune.core_cache import read_record
from rediprune.methods_registry import METHODS
from rediprune.ops_query import align_query, build_query
from rediprune.ops_selection import select_rediprune
from rediprune.ops_tokens import group_means, group_sizes, nearest_kept
from tiny import (
    IMAGE_SIZE,
    PATCHES,
    POOLED,
    TEXT_SIZES,
    by_frame,
    random_image,
    random_video,
    stock_processor,
    stock_twin,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from transformers import DynamicCache, Qwen2Config, StaticCache

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
IMAGE, VIDEO = 4, 5  # token ids
KEPT = round(0.15 * POOLED)
SIDE = 8  # patches on the side of a tile
LOOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


gradients = pytest.mark.gradients


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def stock(model):
    return stock_twin(model)


def pruned(**pruning):
    """A processor and a model of the same pruning block and the same weights as `model`."""
    return tiny_processor(**pruning), tiny_model(**pruning)


def generate(model, inputs, tokens=6, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": tokens, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


def row_of(inputs, row):
    """The prompt of one row of a padded batch, without its padding."""
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]


def seen_positions(model, inputs, **kwargs):
    """What the language model gets in a forward pass, and its outputs."""
    seen = {}

    def hook(module, args, kwargs):
        seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        outputs = model(**inputs, **kwargs)
    finally:
        handle.remove()
    return seen, outputs


MEDIA = {
    "video": ("<video> where", {"videos": 1}),
    "image": ("<image> where", {"images": 1}),
    "images": ("<image> left <image> where", {"images": 2}),
    "videos": ("<video> <video> where", {"videos": 2}),
    "mixed": ("<image> <video> which <image> way", {"images": 2, "videos": 1}),
    "batch": (
        ["<video> <image> where", "<image> how many star ?", "is <video> red"],
        {"images": 2, "videos": 2},
    ),
    "text rows": (["how many", "<video> where is the star ?", "red"], {"videos": 1}),
    "text": ("where is the star ?", {}),
}
SIZES = [(40, 48), (20, 60), (64, 30)]


def media_inputs(processor, name, side="left", **kwargs):
    text, numbers = MEDIA[name]
    if "images" in numbers:
        kwargs["images"] = [random_image(seed, SIZES[seed]) for seed in range(numbers["images"])]
    if "videos" in numbers:
        kwargs["videos"] = [random_video(seed) for seed in range(numbers["videos"])]
    return processor(text=text, padding=True, padding_side=side, **kwargs)


# -- keep ratio 1 is the stock model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("how", ["keep_ratio", "method"])
def test_unpruned_logits_are_the_stock_logits(stock, name, side, how):
    processor, model = pruned(keep_ratio=1) if how == "keep_ratio" else pruned(method="none")
    inputs = media_inputs(processor, name, side)
    ours, theirs = model(**inputs), stock(**inputs)
    assert isinstance(ours, type(theirs)) and set(ours) == set(theirs)
    assert ours.image_kept_indices is None and ours.video_kept_indices is None
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("name", MEDIA)
def test_unpruned_generation_is_the_stock_generation(model, stock, processor, name):
    inputs = media_inputs(processor, name, keep_ratio=1)
    plain = {key: value for key, value in inputs.items() if key != "keep_ratio"}
    assert torch.equal(generate(model, inputs), generate(stock, plain))


@pytest.mark.parametrize("name", ["video", "image", "batch"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_unpruned_decoding_is_the_stock_decoding(model, stock, processor, name, kwargs):
    inputs = media_inputs(processor, name, keep_ratio=1)
    plain = {key: value for key, value in inputs.items() if key != "keep_ratio"}
    ids = []
    for each, arguments in ((model, inputs), (stock, plain)):
        torch.manual_seed(0)
        ids.append(generate(each, arguments, **kwargs))
    assert torch.equal(*ids)


def test_unpruned_outputs_in_every_form(model, stock, processor):
    inputs = media_inputs(processor, "mixed", keep_ratio=1)
    plain = {key: value for key, value in inputs.items() if key != "keep_ratio"}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 6, -100)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for kwargs in (
        {"labels": labels},
        {"output_hidden_states": True},
        {"logits_to_keep": 1},
        {"return_dict": False},
        {"inputs_embeds": embeds, "input_ids": None},
        {"vision_feature_layer": -1},
        {"position_ids": torch.arange(5, 5 + labels.shape[1])[None]},
        {"attention_mask": None},
        {"use_cache": True},
    ):
        ours, theirs = model(**{**inputs, **kwargs}), stock(**{**plain, **kwargs})
        flat = [
            [x for x in (out if type(out) is tuple else out.to_tuple()) if torch.is_tensor(x)] for out in (ours, theirs)
        ]
        assert len(flat[0]) == len(flat[1]) > 0
        assert all(torch.equal(first, second) for first, second in zip(*flat)), kwargs
        if "output_hidden_states" in kwargs:
            assert all(torch.equal(first, second) for first, second in zip(ours.hidden_states, theirs.hidden_states))
        assert isinstance(ours, type(theirs))


@pytest.mark.parametrize("name", ["image", "mixed"])
def test_nothing_pruned_without_pooling_keeps_the_image_layout(stock, name):
    """`video_pooling=False` runs the own path at ratio 1 too: newlines and tile order must be the stock ones."""
    processor, model = pruned(keep_ratio=1, video_pooling=False)
    inputs = media_inputs(processor, name)
    outputs = model(**inputs)
    if name == "image":
        assert torch.allclose(outputs.logits, stock(**inputs).logits, **LOOSE)
    else:
        assert (inputs["input_ids"] == VIDEO).sum() == 4 * PATCHES
    for kept in outputs.image_kept_indices or outputs.video_kept_indices:
        assert torch.equal(kept, torch.arange(len(kept)))


# -- which tokens, and where they go ----------------------------------------------------------------------------------

BLOCKS = [
    {},
    {"keep_ratio": 0.5},
    {"keep_ratio": 0.01},
    {"video_pooling": False},
    {"positions": "original"},
    {"query_weighting": "self_attention"},
    {"query_weighting": "middle_peak"},
    {"query_weighting": "average"},
    {"query_weighting": "none"},
    {"alpha": 3.0},
    {"candidate_pool": "algorithm1", "threshold": 0.1},
    {"candidate_pool": "algorithm1", "max_candidates": 4},
    {"candidate_pool": "released", "threshold": 0.1},
    {"method": "random"},
    {"method": "uniform", "positions": "original"},
]


def features_by_hand(model, inputs, pooling):
    """Raw features of each set, images first: (sets, L, C) lists, from the tower alone."""
    config, sets = model.config, []

    def tower(pixels):
        return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer][
            :, 1:
        ]

    for pixels, size in zip(inputs.get("pixel_values", []), inputs.get("image_sizes", [])):
        height, width = size.tolist()
        best = transformers.image_processing_utils.select_best_resolution((height, width), config.image_grid_pinpoints)
        rows, columns = best[0] // IMAGE_SIZE, best[1] // IMAGE_SIZE
        views = tower(pixels[: 1 + rows * columns])
        grid = torch.cat(
            [
                torch.cat([v.unflatten(0, (SIDE, SIDE)) for v in views[1:][r * columns : (r + 1) * columns]], dim=1)
                for r in range(rows)
            ]
        )
        image = transformers.models.llava_next_video.modeling_llava_next_video.unpad_image(
            grid.permute(2, 0, 1), (height, width)
        )
        sets.append([views[0][None], image.permute(1, 2, 0).flatten(0, 1)[None]])
    for video in inputs.get("pixel_values_videos", []):
        features = tower(video)
        if pooling:
            grid = features.unflatten(1, (SIDE, SIDE))
            features = (grid[:, ::2, ::2] + grid[:, 1::2, ::2] + grid[:, ::2, 1::2] + grid[:, 1::2, 1::2]).flatten(
                1, 2
            ) / 4
        sets.append([features])
    return sets


@pytest.mark.parametrize("name", ["video", "image", "mixed", "batch"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_placeholders_hold_the_kept_features_projected(block, name):
    processor, model = pruned(**block)
    inputs = media_inputs(processor, name)
    seen, outputs = seen_positions(model, inputs)
    kept = [*(outputs.image_kept_indices or ()), *(outputs.video_kept_indices or ())]
    by_hand = features_by_hand(model, inputs, model.config.pruning.video_pooling)
    assert len(kept) == len(by_hand)
    tokens = {IMAGE: [], VIDEO: []}
    for features, indices in zip(by_hand, kept):
        assert indices.dtype == torch.long and (indices.diff() > 0).all() and indices[0] >= 0
        start = 0
        for set_features in (one for of_grid in features for one in of_grid):
            of_set = indices[(indices >= start) & (indices < start + len(set_features))] - start
            assert len(of_set) == max(1, round(model.config.pruning.keep_ratio * len(set_features)))
            token_id = VIDEO if len(features) == 1 else IMAGE
            tokens[token_id].append(model.model.multi_modal_projector(set_features[of_set]))
            start += len(set_features)
        assert indices[-1] < start
    embeds = seen["inputs_embeds"]
    table = model.get_input_embeddings()
    for token_id, parts in tokens.items():
        mask = inputs["input_ids"] == token_id
        assert mask.sum() == sum(map(len, parts))
        if parts:
            assert torch.allclose(embeds[mask], torch.cat(parts), **LOOSE)
    text = (inputs["input_ids"] != IMAGE) & (inputs["input_ids"] != VIDEO)
    assert torch.equal(embeds[text], table(inputs["input_ids"][text]))
    assert outputs.logits.isfinite().all()


@pytest.mark.parametrize("weighting", ["exponential", "self_attention", "middle_peak", "average"])
def test_the_query_is_the_text_after_the_last_placeholder(weighting):
    processor, model = pruned(query_weighting=weighting, query_max_tokens=4, alpha=2.0)
    inputs = processor(text="how many <video> where is the red star ? ASSISTANT :", videos=random_video())
    question = model.get_input_embeddings()(inputs["input_ids"][0][-4:])
    query = align_query(build_query(question, weighting)[None], 16)
    (features,) = features_by_hand(model, inputs, True)[0]
    expected = select_rediprune(features, query.expand(4, -1), KEPT, alpha=2.0)
    assert torch.equal(by_frame(model(**inputs).video_kept_indices[0]), expected)


def test_the_question_matters_and_the_text_before_does_not():
    processor, model = pruned(alpha=3.0)
    kept = {}
    for text in ("<video> where", "how many left <video> where", "<video> which star move ?"):
        kept[text] = model(**processor(text=text, videos=random_video())).video_kept_indices[0]
    first, before, other = kept.values()
    assert torch.equal(first, before) and not torch.equal(first, other)


def test_only_the_last_tokens_of_a_long_question_count():
    processor, model = pruned(query_max_tokens=5, alpha=3.0)
    tail = " where is the red star"
    texts = ["<video>" + " left" * 20 + tail, "<video>" + " how many" * 40 + tail, "<video> star" + tail[6:]]
    long, longer, short = (model(**processor(text=text, videos=random_video())).video_kept_indices[0] for text in texts)
    assert torch.equal(long, longer) and not torch.equal(long, short)


def test_an_empty_question(processor, model):
    inputs = processor(text="where <video>", videos=random_video())
    assert inputs["input_ids"][0, -1] == VIDEO
    outputs = model(**inputs)
    assert outputs.logits.isfinite().all() and outputs.video_kept_indices[0].shape == (4 * KEPT,)


def test_select_tokens_agrees_with_forward(processor, model):
    for name in ("video", "mixed", "batch"):
        inputs = media_inputs(processor, name)
        outputs, media = model(**inputs), model.select_tokens(**inputs)
        kept = [*(outputs.image_kept_indices or ()), *outputs.video_kept_indices]
        assert [medium.kind for medium in media] == sorted(medium.kind for medium in media)
        assert all(torch.equal(a, b) for a, b in itertools.zip_longest(kept, [m.kept for m in media]))
    assert [medium.row for medium in media] == [0, 1, 0, 2]
    assert not media[0].kept.requires_grad


def test_return_types(processor, model):
    inputs = media_inputs(processor, "mixed")
    outputs = model(**inputs)
    assert isinstance(outputs, transformers.utils.ModelOutput)
    assert type(outputs).__name__ == "ReDiPruneCausalLMOutputWithPast"
    assert type(outputs.image_kept_indices) is tuple and len(outputs.image_kept_indices) == 2
    assert type(outputs.video_kept_indices) is tuple and len(outputs.video_kept_indices) == 1
    flat = model(**inputs, return_dict=False)
    assert type(flat) is tuple and torch.equal(flat[0], outputs.logits)
    assert torch.equal(flat[-1][0], outputs.video_kept_indices[0])
    video = model(**media_inputs(processor, "video"))
    assert video.image_kept_indices is None and "image_kept_indices" not in video
    assert "image_kept_indices" not in model(**media_inputs(processor, "text"))
    last = model(**inputs, logits_to_keep=1)
    assert torch.allclose(last.logits, outputs.logits[:, -1:], **LOOSE)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3


def test_the_ratio_of_a_call(model):
    processor = tiny_processor()
    video = random_video()
    half = model(**processor(text="<video> where", videos=video, keep_ratio=0.5))
    assert half.video_kept_indices[0].shape == (4 * POOLED // 2,)
    reference = tiny_model(keep_ratio=0.5)(**tiny_processor(keep_ratio=0.5)(text="<video> where", videos=video))
    assert torch.equal(half.logits, reference.logits)
    assert model(**processor(text="<video> where", videos=video)).video_kept_indices[0].shape == (4 * KEPT,)
    assert model.config.pruning.keep_ratio == 0.15
    with pytest.raises(ValueError, match="'keep_ratio' is 2.0"):
        model(**processor(text="<video> where", videos=video), keep_ratio=2.0)
    as_tensor = processor(text="<video> where", videos=video, keep_ratio=0.5)
    as_tensor["keep_ratio"] = torch.tensor(as_tensor["keep_ratio"])
    assert torch.equal(model(**as_tensor).logits, half.logits)
    as_list = {**as_tensor, "keep_ratio": [0.5]}  # as pipelines with a batch size give it
    assert torch.equal(model(**as_list).logits, half.logits)
    with pytest.raises(ValueError, match=r"keep_ratio is \[0.5, 0.3\], but must be the same"):
        model(**{**as_tensor, "keep_ratio": [0.5, 0.3]})


# -- a sample is the same alone and in a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "block",
    [
        {},
        {"positions": "original"},
        {"method": "random"},
        {"video_pooling": False},
        {"proportional_attention": True},
        {"method": "rediprune_plus", "keep_ratio": 0.3},
    ],
    ids=str,
)
def test_a_sample_alone_is_the_sample_in_a_batch(block, side):
    processor, model = pruned(**block)
    texts = [
        "<video> where",
        "<image> how many red star ?",
        "<video> <image> is the star left",
        "which way ?",
    ]
    videos, images = (
        [random_video(0), random_video(1)],
        [random_image(0, SIZES[0]), random_image(1, SIZES[1])],
    )
    media = [{"videos": videos[:1]}, {"images": images[:1]}, {"videos": videos[1:], "images": images[1:]}, {}]
    batch = processor(text=texts, videos=videos, images=images, padding=True, padding_side=side)
    together = model(**batch)
    for row, text in enumerate(texts):
        alone = processor(text=text, **media[row])
        assert torch.equal(alone["input_ids"], row_of(batch, row))
        outputs = model(**alone)
        real = batch["attention_mask"][row].bool()
        assert torch.allclose(together.logits[row][real], outputs.logits[0], **LOOSE)
        if row in (0, 2):
            assert torch.equal(together.video_kept_indices[row // 2], outputs.video_kept_indices[0])
        if row in (1, 2):
            assert torch.equal(together.image_kept_indices[row - 1], outputs.image_kept_indices[0])
    if side == "left":
        ids = generate(model, batch)
        for row, text in enumerate(texts):
            assert torch.equal(ids[row], generate(model, processor(text=text, **media[row]))[0])


def test_random_selection_depends_on_seed_frame_and_question_alone():
    processor, model = pruned(method="random")
    inputs = processor(
        text=["<video> where", "<video> how many"], videos=[random_video(0), random_video(1)], padding=True
    )
    first, second = model(**inputs).video_kept_indices
    assert torch.equal(first, model(**inputs).video_kept_indices[0])
    assert len({tuple(frame.tolist()) for frame in by_frame(first)}) == 4  # every frame draws anew
    assert not torch.equal(first, second)
    alone = model(**processor(text="<video> where", videos=random_video(7))).video_kept_indices[0]
    assert torch.equal(first, alone)
    model.config.pruning.seed = 1
    assert not torch.equal(first, model(**inputs).video_kept_indices[0])


def test_uniform_selection_is_evenly_spaced():
    processor, model = pruned(method="uniform", keep_ratio=0.25)
    kept = model(**media_inputs(processor, "video")).video_kept_indices[0]
    assert by_frame(kept).tolist() == [[2, 6, 10, 14]] * 4


# -- training ---------------------------------------------------------------------------------------------------------


@gradients
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_part(processor, checkpointing):
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = media_inputs(processor, "mixed", "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 6, -100)
    labels[:, :-3] = -100
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # Beyond the tapped layer there is nothing to learn, and newlines go when tokens go.
    assert all("layers.2." in name or "post_layernorm" in name or name == "model.image_newline" for name in silent), (
        silent
    )
    assert any("vision_tower" in name for name, _ in model.named_parameters())
    assert not any("multi_modal_projector" in name or "patch_embedding" in name for name in silent)


@gradients
def test_a_loss_is_the_same_with_gradient_checkpointing(processor):
    inputs = media_inputs(processor, "video")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 6, -100)
    losses = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses.append(model(**inputs, labels=labels).loss)
    assert torch.equal(*losses)


def answered(processor, answer):
    inputs = processor(text=f"<video> where is the star ? {answer}", videos=random_video())
    labels = inputs["input_ids"].clone()
    labels[:, : -len(answer.split())] = -100
    return inputs, labels


def test_the_answer_does_not_choose_its_own_tokens():
    processor, model = pruned(alpha=3.0)
    question = model(**processor(text="<video> where is the star ?", videos=random_video())).video_kept_indices[0]
    for answer in ("left", "red red", "which way does it move"):
        inputs, labels = answered(processor, answer)
        trained = model(**inputs, labels=labels)
        assert torch.equal(trained.video_kept_indices[0], question) and trained.loss.isfinite()
        masked = model(**inputs, query_mask=labels == -100)
        assert torch.equal(masked.video_kept_indices[0], question)
        assert torch.equal(masked.logits, trained.logits)
    read_as_question = model(**inputs).video_kept_indices[0]
    assert not torch.equal(read_as_question, question)


def test_a_query_mask_goes_before_labels():
    processor, model = pruned(alpha=3.0)
    inputs, labels = answered(processor, "which way does it move")
    whole = model(**inputs).video_kept_indices[0]
    both = model(**inputs, labels=labels, query_mask=torch.ones_like(labels))
    assert torch.equal(both.video_kept_indices[0], whole)


def test_dropout_and_train_mode_do_not_change_the_selection(processor):
    model = tiny_model()
    inputs = media_inputs(processor, "video")
    reference = model(**inputs).video_kept_indices[0]
    assert torch.equal(model.train()(**inputs).video_kept_indices[0], reference)


# -- embeddings given by the caller -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_embeddings_of_the_prompt(positions):
    processor, model = pruned(positions=positions)
    inputs = media_inputs(processor, "batch")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_ids = model(**inputs)
    by_embeds = model(**{**inputs, "input_ids": None, "inputs_embeds": embeds})
    assert torch.equal(by_ids.logits, by_embeds.logits)
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    ids = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, generate(model, inputs, tokens=5))


def test_embeddings_that_are_no_placeholders(processor, model):
    inputs = media_inputs(processor, "video")
    embeds = torch.randn(1, inputs["input_ids"].shape[1], 32)
    with pytest.raises(ValueError, match="the prompt has 0 video placeholders.*give 8 tokens"):
        model(pixel_values_videos=inputs["pixel_values_videos"], inputs_embeds=embeds)


# -- positions --------------------------------------------------------------------------------------------------------


def positions_by_hand(ids, media):
    """
    Positions of one prompt: `media` lists for each medium, in prompt order, its length when nothing is pruned and the offsets
    of its kept tokens within it.
    """
    positions, position, media = [], 0, [(length, list(offsets)) for length, offsets in media]
    start = None
    for token in ids:
        if token in (IMAGE, VIDEO):
            length, offsets = media[0]
            start = position if start is None else start
            positions.append(start + offsets.pop(0))
            if not offsets:
                position, start = start + length, None
                media.pop(0)
        else:
            positions.append(position)
            position += 1
    assert not media
    return positions, position


def video_medium(kept, tokens=POOLED):
    return 4 * tokens, kept.tolist()


def image_medium(kept, size):
    crop = {(40, 48): (14, 16), (20, 60): (6, 16), (64, 30): (16, 8)}[size]  # rows and columns of tokens
    order = [("base", index) for index in range(PATCHES)]
    for row in range(crop[0]):
        order += [("tile", row * crop[1] + column) for column in range(crop[1])] + ["newline"]
    tokens = [index for index, name in enumerate(order) if name != "newline"]
    return len(order), [tokens[index] for index in kept.tolist()]


def skipped(model, outputs):
    """How many positions are skipped in each row of a prompt."""
    return read_record(outputs.past_key_values, model.config.text_config.num_hidden_layers).skipped.sum(1).long()


@pytest.mark.parametrize("mask", ["given", "none"])
def test_original_positions_by_hand(mask):
    processor, model = pruned(positions="original", keep_ratio=0.1)
    images = [random_image(seed, SIZES[seed]) for seed in range(2)]
    for text, media in (
        ("where <video> is the star", {"videos": random_video()}),
        ("<image> where", {"images": images[1]}),
        (
            "<image> red <video> blue <image><video>",
            {"images": images, "videos": [random_video(0), random_video(1)]},
        ),
        ("<image><image>", {"images": images}),
        ("where <video><video> red", {"videos": [random_video(0), random_video(1)]}),
    ):
        inputs = processor(text=text, **media)
        if mask == "none":
            del inputs["attention_mask"]
        seen, outputs = seen_positions(model, inputs)
        pairs = iter(outputs.image_kept_indices or ())
        sizes = iter(SIZES if len(outputs.image_kept_indices or ()) == 2 else SIZES[1:])
        videos = iter(outputs.video_kept_indices or ())
        in_order = [
            image_medium(next(pairs), next(sizes)) if word == "<image>" else video_medium(next(videos))
            for word in text.replace("><", "> <").split()
            if word.startswith("<")
        ]
        expected, end = positions_by_hand(inputs["input_ids"][0].tolist(), in_order)
        assert seen["position_ids"][0].tolist() == expected
        assert skipped(model, outputs).tolist() == [end - len(expected)]
        unpruned = processor(text=text, **media, keep_ratio=1)["input_ids"].shape[1]
        assert end == unpruned  # text after the media goes on where it would in the unpruned prompt


def test_original_positions_in_a_padded_batch():
    processor, model = pruned(positions="original")
    inputs = media_inputs(processor, "batch", "left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate sets them
    seen, together = seen_positions(model, inputs)
    for row in range(3):
        positions = seen["position_ids"][row][inputs["attention_mask"][row].bool()]
        assert positions[0] == 0 and (positions.diff() > 0).all()
        length = len(positions) + int(skipped(model, together)[row])
        assert positions[-1] == length - 1 or inputs["input_ids"][row, -1] in (IMAGE, VIDEO)


def test_compact_positions_are_left_to_the_stock_model(processor, model):
    seen, outputs = seen_positions(model, media_inputs(processor, "mixed"))
    assert seen["position_ids"] is None
    assert read_record(outputs.past_key_values, 2) is None


def test_gaps_are_not_read_as_packed_sequences():
    processor, model = pruned(positions="original")
    inputs = media_inputs(processor, "video")
    with_mask = model(**inputs, use_cache=False).logits
    del inputs["attention_mask"]
    assert torch.allclose(with_mask, model(**inputs, use_cache=False).logits, **LOOSE)


def test_positions_change_the_answer():
    compact, original = pruned(), pruned(positions="original")
    inputs = media_inputs(compact[0], "video")
    assert not torch.allclose(compact[1](**inputs).logits, original[1](**inputs).logits, atol=1e-2)


# -- proportional attention -------------------------------------------------------------------------------------------


def test_kept_tokens_stand_for_all_of_their_set():
    processor, model = pruned(proportional_attention=True)
    inputs = media_inputs(processor, "batch")
    media = model.select_tokens(**inputs)
    for medium in media:
        assert medium.token_sizes.shape == medium.kept.shape and (medium.token_sizes >= 1).all()
        counts = [len(kept) for kept in medium.layout.split(medium.kept)]
        totals = [size for number, size in medium.layout.sets(model.config.pruning) for _ in range(number)]
        assert [sizes.sum() for sizes in medium.token_sizes.split(counts)] == totals
    sizes = read_record(model(**inputs).past_key_values, 2).sizes
    is_visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert (sizes[~is_visual] == 1).all()
    torch.testing.assert_close(sizes.sum(1) - (~is_visual).sum(1), unpruned_tokens(media, len(sizes)))
    assert pruned()[1].select_tokens(**inputs)[0].token_sizes is None


@torch.no_grad()
@pytest.mark.parametrize("distance", ["features", "projected"])
def test_tokens_stand_for_those_that_they_are_nearest_to(distance):
    """Also for a method that measures no distances itself."""
    processor, model = pruned(method="uniform", keep_ratio=0.3, distance=distance, proportional_attention=True)
    inputs = media_inputs(processor, "video")
    (medium,) = model.select_tokens(**inputs)
    features, kept = medium.sets[0]["features"], by_frame(medium.kept)
    compared = model.model.multi_modal_projector(features) if distance == "projected" else features
    nearest = nearest_kept(compared, kept)
    assert torch.equal(medium.token_sizes, group_sizes(nearest, kept.shape[1]).flatten())
    model.config.pruning.merge_weight = 0.25
    (merged,) = model.select_tokens(**inputs)
    assert torch.equal(merged.kept, medium.kept) and torch.equal(merged.token_sizes, medium.token_sizes)
    expected = 0.75 * medium.tokens + 0.25 * group_means(features, nearest, kept.shape[1]).flatten(0, 1)
    torch.testing.assert_close(merged.tokens, expected)


def unpruned_tokens(media, rows):
    totals = torch.zeros(rows)
    for medium in media:
        totals[medium.row] += medium.layout.num_tokens
    return totals


def test_tokens_that_stand_for_their_copies():
    """Of a video of grey frames every token of a frame is the same: with one position for all, one of them is enough."""
    processor, model = pruned(method="uniform", keep_ratio=0.5, proportional_attention=True)
    frames = np.full((4, 40, 48, 3), 90, dtype=np.uint8)
    with torch.no_grad():
        tower = model.model.vision_tower
        getattr(tower, "vision_model", tower).embeddings.position_embedding.weight.zero_()

    def answer(keep_ratio):
        return last_logits(model, processor(text="<video> where", videos=frames, keep_ratio=keep_ratio))

    with_all = answer(1.0)
    # Not zero: a visual token sees those before it, and after pruning these are fewer.
    weighed = (answer(0.1) - with_all).abs().max()
    model.config.pruning.proportional_attention = False
    assert weighed < 0.1 * (answer(0.1) - with_all).abs().max()


def last_logits(model, inputs):
    inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    return model(**inputs).logits[:, -1]


def test_proportional_attention_needs_full_attention():
    processor, model = pruned(proportional_attention=True)
    inputs = media_inputs(processor, "video")
    model.config.text_config.sliding_window = 8
    with pytest.raises(ValueError, match="sliding_window=8; set proportional_attention to false"):
        model(**inputs)


@pytest.mark.parametrize("name", ["video", "mixed", "batch"])
def test_eager_attention_weighs_as_sdpa_does(name):
    processor, model = pruned(method="rediprune_plus", keep_ratio=0.3)
    inputs = media_inputs(processor, name)
    reference = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(model(**inputs).logits, reference, **LOOSE)


# -- generation -------------------------------------------------------------------------------------------------------

DECODING = [
    {"positions": "compact"},
    {"positions": "original"},
    {"method": "rediprune_plus", "keep_ratio": 0.3},
    {"positions": "original", "video_pooling": False},
    {"proportional_attention": True, "scope": "item"},
]


def full_pass(model, inputs, ids):
    """Logits of the generated tokens from one pass without a cache, in which they are no part of the question."""
    prompt = inputs["input_ids"].shape[1]
    whole = torch.cat([inputs["input_ids"], ids], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    query_mask = torch.cat([torch.ones_like(inputs["input_ids"]), torch.zeros_like(ids)], dim=1)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    outputs = model(
        input_ids=whole,
        attention_mask=mask,
        query_mask=query_mask,
        position_ids=position_ids,
        use_cache=False,
        **rest,
    )
    return outputs.logits[:, prompt - 1 : -1]


@pytest.mark.parametrize("block", DECODING, ids=str)
@pytest.mark.parametrize("name", ["video", "mixed", "batch", "text rows", "text"])
def test_cached_decoding_is_one_full_pass(block, name):
    processor, model = pruned(**block)
    inputs = media_inputs(processor, name)
    result = model.generate(
        **inputs, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
    )
    ids = result.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.allclose(torch.stack(result.logits, dim=1), full_pass(model, inputs, ids), **LOOSE)
    assert torch.equal(ids, generate(model, inputs, use_cache=False))
    assert torch.equal(ids, generate(model, inputs, cache_implementation="static"))
    assert torch.equal(
        ids, generate(model, inputs, cache_implementation="static")
    )  # the emptied cache of the last call


@pytest.mark.parametrize("block", DECODING[:3], ids=str)
@pytest.mark.parametrize("name", ["video", "images", "mixed", "batch"])
def test_beams(block, name):
    processor, model = pruned(**block)
    inputs = media_inputs(processor, name)
    beams = generate(model, inputs, num_beams=3)
    assert torch.equal(beams, generate(model, inputs, num_beams=3, use_cache=False))
    result = model.generate(
        **inputs,
        num_beams=3,
        do_sample=False,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # The score of a beam is the mean log probability of its tokens, which one full pass gives too.
    ids = result.sequences[:, inputs["input_ids"].shape[1] :]
    log_probabilities = full_pass(model, inputs, ids).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    assert torch.allclose(result.sequences_scores, log_probabilities.mean(1), **LOOSE)


@pytest.mark.parametrize("name", ["images", "videos", "mixed", "batch", "text rows"])
def test_every_sequence_of_a_prompt_sees_its_own_media(processor, model, name):
    inputs = media_inputs(processor, name)
    rows = len(inputs["input_ids"])
    one = model.generate(**inputs, do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    result = model.generate(
        **inputs,
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(result.sequences) == 2 * rows
    assert torch.allclose(result.logits[0], one.logits[0].repeat_interleave(2, 0), **LOOSE)


def test_sampling_follows_the_seed(processor, model):
    inputs = media_inputs(processor, "batch")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generate(model, inputs, do_sample=True, tokens=8))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_generation_without_a_mask(processor, model):
    for positions in ("compact", "original"):
        model = tiny_model(positions=positions)
        inputs = media_inputs(processor, "video")
        reference = generate(model, inputs)
        del inputs["attention_mask"]
        assert torch.equal(generate(model, inputs), reference)


def test_static_cache_of_layered_masks(processor):
    """Some language models get one mask for each kind of attention layer."""
    torch.manual_seed(0)
    config = tiny_config(text_config=Qwen2Config(**TEXT_SIZES))
    from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration as Model

    model = Model(config).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    inputs = media_inputs(processor, "batch")
    assert torch.equal(generate(model, inputs), generate(model, inputs, cache_implementation="static"))


def test_a_placeholder_that_the_model_generates_is_a_token_like_others(processor, model):
    inputs = media_inputs(processor, "video")
    result = generate(model, inputs, tokens=4, prefix_allowed_tokens_fn=lambda row, ids: [IMAGE, VIDEO])
    assert set(result[0].tolist()) <= {IMAGE, VIDEO}


# -- several turns over one cache -------------------------------------------------------------------------------------

TURNS = [
    ("text", "where is the star ?", {}, {}),
    (
        "image",
        "<image> how many",
        {"images": [random_image(5, SIZES[1])]},
        {"images": [random_image(5, SIZES[1])]},
    ),
    (
        "video",
        "<video> which way",
        {"videos": [random_video(0), random_video(6)]},
        {"videos": [random_video(6)]},
    ),
]


def first_turn(processor, model, **kwargs):
    inputs = processor(text="USER : <video> red ASSISTANT :", videos=random_video(0), **kwargs)
    result = model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    return inputs, result


def next_prompt(processor, result, text, media):
    """The ids of the conversation so far and of the new turn, whose media alone are passed as pixels."""
    new = processor(text=text, **media)
    new["input_ids"] = torch.cat([result.sequences, new["input_ids"][:, 1:]], dim=1)
    new["attention_mask"] = torch.ones_like(new["input_ids"])
    return new


@pytest.mark.parametrize(
    "block",
    [
        {"keep_ratio": 1},
        {"method": "uniform"},
        {"query_weighting": "none"},
        {"query_weighting": "none", "positions": "original"},
        {"method": "rediprune_plus", "query_weighting": "none", "keep_ratio": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("turn, text, all_media, new_media", TURNS, ids=[turn[0] for turn in TURNS])
def test_a_second_turn_on_a_reused_cache(block, turn, text, all_media, new_media):
    """Equal to the run without a cache wherever the selection does not hang on the newest question."""
    processor, model = pruned(**block)
    first, result = first_turn(processor, model)
    second = next_prompt(processor, result, text, new_media)
    everything = dict(second)
    if turn == "video":
        everything["pixel_values_videos"] = torch.cat([first["pixel_values_videos"], second["pixel_values_videos"]])
    else:
        everything["pixel_values_videos"] = first["pixel_values_videos"]
    uncached = generate(model, everything)
    for inputs in (second, everything):
        cache = copy.deepcopy(result.past_key_values)
        assert torch.equal(generate(model, inputs, past_key_values=cache), uncached)
    if turn != "text":
        with pytest.raises(
            ValueError,
            match="placeholders.*To continue a cache, pass the media of the new turn or of all turns",
        ):
            none = {key: value for key, value in everything.items() if key not in ("pixel_values", "image_sizes")}
            none["pixel_values_videos"] = torch.cat([first["pixel_values_videos"]] * 3)
            generate(model, none, past_key_values=copy.deepcopy(result.past_key_values))


@pytest.mark.parametrize("turn, text, all_media, new_media", TURNS, ids=[turn[0] for turn in TURNS])
def test_a_second_turn_with_the_paper_s_query(turn, text, all_media, new_media):
    """The media of the first turn stay as the first question chose them; passing them again changes nothing."""
    processor, model = pruned(positions="original")
    first, result = first_turn(processor, model)
    second = next_prompt(processor, result, text, new_media)
    kept = dict(second)
    before = first["pixel_values_videos"]
    kept["pixel_values_videos"] = torch.cat([before, second["pixel_values_videos"]]) if turn == "video" else before
    alone = generate(model, second, past_key_values=copy.deepcopy(result.past_key_values))
    again = generate(model, kept, past_key_values=copy.deepcopy(result.past_key_values))
    assert torch.equal(alone, again)
    beams = generate(model, second, past_key_values=copy.deepcopy(result.past_key_values), num_beams=1, tokens=2)
    assert torch.equal(beams, alone[:, :2])


def test_three_turns_keep_their_positions():
    processor, model = pruned(positions="original", query_weighting="none")
    _, result = first_turn(processor, model)
    second = next_prompt(processor, result, "<image> how many", {"images": random_image(5, SIZES[1])})
    cache = result.past_key_values
    result = model.generate(
        **second, past_key_values=cache, do_sample=False, max_new_tokens=4, return_dict_in_generate=True
    )
    third = next_prompt(processor, result, "where", {})
    positions = []

    def hook(module, args, kwargs):
        positions.extend(kwargs["position_ids"][0].tolist())

    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    generate(model, third, past_key_values=result.past_key_values, tokens=3)
    video, image = 4 * POOLED, PATCHES + 6 * 17
    gaps = (video - 4 * KEPT) + (image - round(0.15 * PATCHES) - round(0.15 * 6 * 16))
    start = third["input_ids"].shape[1] + gaps - 2  # the last answer token was not in the cache yet
    assert positions == list(range(start, start + 4))


def test_turns_of_a_batch():
    processor, model = pruned(method="uniform", positions="original")
    videos = [random_video(0), random_video(1)]
    first = processor(text=["<video> where", "<video> how many red"], videos=videos, padding=True)
    result = model.generate(**first, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    image = processor(text=["red red <image> red", "<image> left left left"], images=[random_image(0), random_image(1)])
    ids = torch.cat([result.sequences, image["input_ids"][:, 1:]], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(ids[:, first["input_ids"].shape[1] :])], dim=1)
    new = {"input_ids": ids, "attention_mask": mask, **{k: image[k] for k in ("pixel_values", "image_sizes")}}
    everything = {**new, "pixel_values_videos": first["pixel_values_videos"]}
    uncached = generate(model, everything)
    for inputs in (new, everything):
        assert torch.equal(generate(model, inputs, past_key_values=copy.deepcopy(result.past_key_values)), uncached)


def test_a_cache_given_by_the_caller_is_filled(processor):
    for positions in ("compact", "original"):
        model = tiny_model(positions=positions)
        inputs = media_inputs(processor, "video")
        cache = DynamicCache()
        outputs = model(**inputs, past_key_values=cache, use_cache=True)
        assert outputs.past_key_values is cache and cache.get_seq_length() == inputs["input_ids"].shape[1]
        step = model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits[:, -1]
        whole = full_pass(model, inputs, torch.tensor([[9, 9]]))[:, -1]
        assert torch.allclose(step, whole, **LOOSE)
        flat = model(**inputs, past_key_values=(cache := DynamicCache()), use_cache=True, return_dict=False)
        assert any(item is cache for item in flat)
        assert (read_record(cache, 2) is None) == (positions == "compact")


def test_an_emptied_cache_is_a_new_one():
    processor, model = pruned(positions="original")
    inputs = media_inputs(processor, "video")
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    first = model(**inputs, past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert torch.equal(model(**inputs, past_key_values=cache, use_cache=True).logits, first)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_processor_and_model_of_different_ratios(model):
    other = tiny_processor(keep_ratio=0.5)
    for name in ("video", "image", "batch"):
        inputs = media_inputs(other, name)
        kind = "image" if name == "image" else "(video|image)"
        with pytest.raises(
            ValueError, match=rf"{kind} placeholders.*tokens.*keep_ratio=0.15.*processor of this repository"
        ):
            model(**inputs)
        with pytest.raises(ValueError, match="placeholders"):
            model.generate(**inputs)
        with pytest.raises(ValueError, match="placeholders"):
            model.select_tokens(**inputs)
    with pytest.raises(
        ValueError, match=r"has 32 video placeholders \(by row: \[32\]\), but its 1 videos give 8 tokens"
    ):
        model(**media_inputs(other, "video"))


def test_stock_placeholders_on_a_pruning_model(model):
    inputs = media_inputs(stock_processor(), "video")
    with pytest.raises(ValueError, match="has 64 video placeholders .* give 8 tokens"):
        model(**inputs)


def test_pruned_placeholders_on_an_unpruned_model(processor):
    with pytest.raises(ValueError, match="has 8 video placeholders .* give 64 tokens.*keep_ratio=1"):
        tiny_model(keep_ratio=1)(**media_inputs(processor, "video"))


def test_the_ratio_got_lost(processor, model):
    inputs = media_inputs(processor, "video", keep_ratio=0.5)
    del inputs["keep_ratio"]
    with pytest.raises(ValueError, match="has 32 video placeholders .* pass all that it returns"):
        model(**inputs)


def test_a_medium_across_two_rows(processor, model):
    """The right number of placeholders in the wrong rows."""
    inputs = media_inputs(processor, "videos")
    ids = inputs["input_ids"][:, : 1 + 2 * 4 * KEPT]
    moved = torch.stack([ids[0], ids[0].masked_fill(ids[0] == VIDEO, 9)])
    moved[0, -1], moved[1, -1] = 9, VIDEO
    with pytest.raises(ValueError, match=r"has 16 video placeholders \(by row: \[15, 1\]\)"):
        model(input_ids=moved, pixel_values_videos=inputs["pixel_values_videos"])


def test_media_without_placeholders_and_placeholders_without_media(processor, model):
    inputs = media_inputs(processor, "mixed")
    with pytest.raises(ValueError, match="has 0 video placeholders"):
        model(input_ids=torch.tensor([[1, 9]]), pixel_values_videos=inputs["pixel_values_videos"])
    with pytest.raises(ValueError, match="image placeholders .* its 0 images give 0 tokens"):
        model(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values_videos"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep_ratio", [0.15, 1])
def test_pixels_that_are_not_finite(value, keep_ratio):
    processor, model = pruned(keep_ratio=keep_ratio)
    inputs = media_inputs(processor, "videos")
    inputs["pixel_values_videos"][1, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"pixels of video \[1\] hold NaN or infinity"):
        model(**inputs)
    inputs = media_inputs(processor, "images")
    inputs["pixel_values"][0, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"pixels of image \[0\] hold NaN or infinity"):
        model.generate(**inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if name != "none" and method.inner is None]
)
def test_features_that_are_not_finite(value, method):
    processor, model = pruned(method=method)
    embedding = model.model.get_submodule(
        "vision_tower.embeddings" if TRANSFORMERS_5 else "vision_tower.vision_model.embeddings"
    )
    embedding.position_embedding.weight[3] = value
    with pytest.raises(ValueError, match="NaN, infinite or too large values"):
        model(**media_inputs(processor, "video"))


def test_a_tower_that_does_not_give_patches(processor, model):
    inputs = media_inputs(processor, "video")
    with pytest.raises(ValueError, match="gives 65 tokens an image, but 64 are patches.*select_strategy='full'"):
        model(**inputs, vision_feature_select_strategy="full")


# -- types, devices, modes --------------------------------------------------------------------------------------------


def test_bfloat16_weights(processor):
    model = tiny_model().to(torch.bfloat16)
    inputs = media_inputs(processor, "batch").to(torch.bfloat16)
    outputs = model(**inputs)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.isfinite().all()
    assert generate(model, inputs).shape == (3, 6)
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


def test_float_pixels_for_bfloat16_weights(processor):
    """What a processor returns without `.to(dtype)`: the stock tower casts pixels by itself."""
    model = tiny_model().to(torch.bfloat16)
    assert model(**media_inputs(processor, "mixed")).logits.isfinite().all()


def test_autocast(processor, model):
    inputs = media_inputs(processor, "batch")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
        ids = generate(model, inputs)
    assert outputs.logits.isfinite().all() and ids.shape == (3, 6)


def test_inference_mode(processor, model):
    inputs = media_inputs(processor, "batch")
    reference = model(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, reference)
        assert torch.equal(generate(model, inputs), generate(model, inputs))


def test_eager_attention(processor):
    reference = tiny_model()
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = media_inputs(processor, "batch")
    real = inputs["attention_mask"].bool()
    assert torch.allclose(model(**inputs).logits[real], reference(**inputs).logits[real], **LOOSE)
    assert model(**inputs, output_attentions=True).attentions is not None


def test_copies_of_the_model_and_its_config(processor, model):
    inputs = media_inputs(processor, "video")
    reference = model(**inputs).logits
    copied = copy.deepcopy(model)
    copied.config.pruning.keep_ratio = 0.9
    assert model.config.pruning.keep_ratio == 0.15
    assert torch.equal(pickle.loads(pickle.dumps(tiny_model()))(**inputs).logits, reference)
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()


def test_changing_the_config_of_a_loaded_model(model):
    model = tiny_model()
    processor = tiny_processor()
    model.config.pruning.keep_ratio = processor.pruning.keep_ratio = 0.5
    assert model(**media_inputs(processor, "video")).video_kept_indices[0].shape == (4 * POOLED // 2,)


def test_a_tower_with_several_tapped_layers(processor):
    torch.manual_seed(0)
    from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration as Model

    model = Model(tiny_config(vision_feature_layer=[-2, -1])).eval()
    outputs = model(**media_inputs(processor, "mixed"))
    assert outputs.logits.isfinite().all() and outputs.video_kept_indices[0].shape == (4 * KEPT,)
    unpruned = media_inputs(processor, "mixed", keep_ratio=1)
    ratio_free = {key: value for key, value in unpruned.items() if key != "keep_ratio"}
    stock = stock_twin(model, vision_feature_layer=[-2, -1])
    assert torch.equal(model(**unpruned).logits, stock(**ratio_free).logits)


def test_a_prompt_longer_than_the_context_is_refused(processor, model):
    model.config.text_config.max_position_embeddings = 40
    fits = processor(text="<video> where", videos=random_video())
    assert model(**fits).logits.isfinite().all()
    inputs = processor(text="<video> " + "where " * 40, videos=random_video())
    length = inputs["input_ids"].shape[1]
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=f"the prompt has {length} tokens, but the language model takes at most 40"
        ):
            call(**inputs)


def test_one_frame_and_many_frames(processor, model):
    for frames in (1, 9):
        inputs = processor(text="<video> where", videos=random_video(frames=frames), do_sample_frames=False)
        assert model(**inputs).video_kept_indices[0].shape == (frames * KEPT,)


def test_the_signature_keeps_generation_from_projecting_all_tokens(processor, model):
    """5.x encodes media before `forward` where the signature has `mm_encoder_outputs`: pruning would come too late."""
    seen = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    generate(model, media_inputs(processor, "video"))
    handle.remove()
    assert seen == [4 * KEPT]


def test_frames_of_one_size_are_selected_together(processor, model, monkeypatch):
    calls = []
    method = METHODS["rediprune"]
    reduce = method.reduce
    monkeypatch.setattr(
        method, "reduce", lambda tokens, *args: calls.append(len(tokens.features)) or reduce(tokens, *args)
    )
    model(**media_inputs(processor, "videos"))
    assert calls == [2 * 4]
