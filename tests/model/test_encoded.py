"""Media that are encoded once and asked about many times."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES
from rediprune.core_encoded import EncodedMedia, weights_fingerprint
from rediprune.methods_registry import METHODS
from tiny import PATCHES, POOLED, random_video, save_clip, tiny_model, tiny_processor

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
SINGLE = [name for name, method in METHODS.items() if not method.merges_in_encoder and method.inner is None]
QUESTION, OTHER = "USER : <video> which way does it move ?", "USER : <video> how many ? red"
MEDIA = ("batch_num_images", "pixel_values", "image_", "video_", "second_per", "mm_token")
GENERATE = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def video():
    return random_video(3)


def text_of(inputs):
    return {name: values for name, values in inputs.items() if not name.startswith(MEDIA)}


def no_encoder(model, monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("the vision encoder ran")

    monkeypatch.setattr(model, "encode_items", encode)
    projector = getattr(model.model, "multi_modal_projector", None)  # which some encoders use, and every question needs
    for module in model.encoder_modules():
        if module is not projector:
            monkeypatch.setattr(module, "forward", encode)


@EVERY_FAMILY
def test_every_question_is_answered_as_if_its_media_were_encoded_for_it(family, monkeypatch):
    """In batches of several media, with ratios and methods changed in between."""
    blocks = [
        {"method": "rediprune_plus", "keep_ratio": 0.2},
        {"method": "visionzip", "keep_ratio": 0.4},
        {"method": "divprune", "keep_ratio": 0.3, "scope": "item", "positions": "original"},
        {"method": "prumerge", "keep_ratio": 0.3},
        {"method": "rediprune", "keep_ratio": 1},
    ]
    blocks = [block for block in blocks if family.refusal(**block) is None]
    model = family.model()
    first = family.batch(family.processor())
    expected = []
    for block in blocks:
        model.config.pruning = block
        inputs = family.batch(family.processor(**block))
        expected.append(
            (inputs, model(**inputs).logits, model.generate(**inputs, **GENERATE), model.select_tokens(**inputs))
        )
    model.config.pruning = {}
    encoded = model.encode_media(**first, methods=[block["method"] for block in blocks], device="cpu")
    no_encoder(model, monkeypatch)
    for block, (inputs, logits, answer, items) in zip(blocks, expected):
        model.config.pruning = block
        texts = [text for text, _ in family.prompts()]
        processor, asked = family.processor(**block), text_of(inputs)
        if family.has_timestamps:
            with pytest.raises(ValueError, match="timestamps stand between the frames"):
                processor(text=texts, encoded_media=encoded, padding=True)
        else:
            asked = processor(text=texts, encoded_media=encoded, padding=True)
        assert asked.keys() == text_of(inputs).keys()
        assert all(torch.equal(asked[name], inputs[name]) for name in asked)
        torch.testing.assert_close(model(**asked, encoded_media=encoded).logits, logits, atol=2e-4, rtol=2e-4)
        assert torch.equal(model.generate(**asked, **GENERATE, encoded_media=encoded), answer)
        found = model.select_tokens(**asked, encoded_media=encoded)
        assert all(torch.equal(one.kept, other.kept) for one, other in zip(found, items))
        assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(found, items))


@EVERY_FAMILY
def test_beams_and_repeated_questions_take_the_media_of_their_row(family):
    processor, model = family.processor(keep_ratio=0.2), family.model(keep_ratio=0.2)
    inputs = family.batch(processor)
    encoded = model.encode_media(**inputs)
    options = {**GENERATE, "num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(
        model.generate(**text_of(inputs), **options, encoded_media=encoded), model.generate(**inputs, **options)
    )


@pytest.mark.parametrize("method", SINGLE)
def test_every_method_asks_what_was_encoded_for_all(method, video):
    processor, model = tiny_processor(method=method, keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs, methods=SINGLE)
    model.config.pruning.method = method
    expected = model(**inputs)
    found = model(**text_of(inputs), encoded_media=encoded)
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.video_kept_indices or (), expected.video_kept_indices or ()))


@pytest.mark.parametrize("method", ["evoprune", "evoprune_rediprune"])
def test_tokens_merged_in_the_encoder_are_asked_with_the_same_ratio_alone(method, video):
    block = {"method": method, "keep_ratio": 0.25}
    processor, model = tiny_processor(**block), tiny_model(**block)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs)
    other = processor(text=OTHER, encoded_media=encoded)
    expected = model(**processor(text=OTHER, videos=[video]))
    assert torch.equal(model(**other, encoded_media=encoded).logits, expected.logits)
    with pytest.raises(ValueError, match="made with merged={'method': .*0.25.* but this call has merged=.*0.5"):
        model(**processor(text=OTHER, encoded_media=encoded, keep_ratio=0.5), encoded_media=encoded)
    model.config.pruning.method = "divprune"
    with pytest.raises(ValueError, match="this call has merged=None"):
        model(**other, encoded_media=encoded)
    with pytest.raises(ValueError, match="merges tokens inside the vision encoder, which no other method can use"):
        model.encode_media(**inputs, methods=["divprune", method])


def test_a_cache_goes_on_with_encoded_media(video):
    """A second turn: with the media of the new turn alone, and with those of all."""
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    both = model.encode_media(**processor(text=[QUESTION, OTHER], videos=[video, random_video(4)], padding=True))
    first = processor(text=QUESTION, encoded_media=both.take(videos=[0]))
    whole = processor(text=f"{QUESTION} red {OTHER}", encoded_media=both)
    expected = model(**processor(text=f"{QUESTION} red {OTHER}", videos=[video, random_video(4)]))
    for media in (both, both.take(videos=[1])):
        turn = model.generate(
            **first, encoded_media=both.take(videos=[0]), max_new_tokens=1, return_dict_in_generate=True
        )
        answer = model.generate(
            **whole, encoded_media=media, past_key_values=turn.past_key_values, **GENERATE, return_dict_in_generate=True
        )
        assert answer.sequences.shape[1] == whole["input_ids"].shape[1] + 3
    # The media of the first turn were selected for its own question, so only a pass over everything compares.
    assert torch.equal(model(**whole, encoded_media=both).logits, expected.logits)


def test_joined_and_chosen_media_are_those_of_one_call(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    texts, videos = [QUESTION, OTHER, QUESTION], [video, random_video(4), video]
    one, other = (model.encode_media(**processor(text=QUESTION, videos=[clip])) for clip in videos[:2])
    joined = EncodedMedia.join([one, other]).take(videos=[0, 1, 0])
    assert joined.num_bytes == one.num_bytes + other.num_bytes
    asked = processor(text=texts, encoded_media=joined, padding=True)
    expected = model(**processor(text=texts, videos=videos, padding=True)).logits
    torch.testing.assert_close(model(**asked, encoded_media=joined).logits, expected, atol=2e-4, rtol=2e-4)
    model.config.pruning.video_pooling = False
    inputs = processor(text=QUESTION, videos=[video])
    with pytest.raises(ValueError, match="cannot be joined with others"):
        EncodedMedia.join([one, model.encode_media(**inputs)])


def test_what_is_held_is_the_features_and_nothing_around_them(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs)
    assert encoded.num_bytes == 4 * POOLED * 16 * 4  # four frames, 16 channels, four bytes
    unpooled = tiny_model(keep_ratio=0.25, video_pooling=False)
    encoded = unpooled.encode_media(**inputs)
    assert encoded.num_bytes == 4 * PATCHES * 16 * 4
    for signals in encoded.items[0].sets:
        assert all(values.untyped_storage().nbytes() == values.nbytes for values in signals.values())
    assert str(encoded.to("meta").device) == "meta" and str(encoded.device) == "cpu"


def test_asking_changes_neither_the_model_nor_what_was_encoded(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs)
    before, attributes = pickle.dumps(encoded), set(vars(model))
    model.generate(**text_of(inputs), encoded_media=encoded, **GENERATE)
    assert pickle.dumps(encoded) == before and set(vars(model)) == attributes


def encoder_changes():
    """(what the message names, what makes the encoder another one)."""

    def trained(model):
        for parameter in model.model.vision_tower.parameters():
            parameter += 1e-3

    return {
        "other weights": trained,
        "dtype=torch.float32, but this call has dtype=torch.float64": lambda model: model.double(),
        "vision_feature_layer=-2": lambda model: setattr(model.config, "vision_feature_layer", -1),
        "video_pooling=True": lambda model: setattr(model.config.pruning, "video_pooling", False),
    }


@pytest.mark.parametrize("named", encoder_changes())
def test_a_changed_encoder_is_an_error(named, video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs)
    encoder_changes()[named](model)
    with pytest.raises(ValueError, match=rf"{named}.*encode them again"):
        model(**text_of(inputs), encoded_media=encoded)


def test_the_layer_of_a_call_is_part_of_what_was_encoded(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs, vision_feature_layer=-1)
    expected = model(**inputs, vision_feature_layer=-1).logits
    found = model(**text_of(inputs), encoded_media=encoded, vision_feature_layer=-1).logits
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="vision_feature_layer"):
        model(**text_of(inputs), encoded_media=encoded)


def test_a_signal_that_was_not_kept_is_named_with_the_remedy(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs)
    model.config.pruning.method = "visionzip"
    with pytest.raises(ValueError, match=r"needs cls_attention, keys .*encode_media\(..., methods="):
        model(**text_of(inputs), encoded_media=encoded)
    with pytest.raises(ValueError, match="'visionzipp'"):
        model.encode_media(**inputs, methods=["visionzipp"])


def test_the_joint_space_is_kept_where_it_is_compared_in(video, tmp_path):
    block = {"method": "trim", "keep_ratio": 0.25, "text_tower": save_clip(tmp_path / "one")}
    processor, model = tiny_processor(**block), tiny_model(**block)
    inputs = processor(text=OTHER, videos=[video])
    encoded = model.encode_media(**processor(text=QUESTION, videos=[video]))
    asked = processor(text=OTHER, encoded_media=encoded)
    assert torch.equal(asked["clip_input_ids"], inputs["clip_input_ids"])
    assert torch.equal(model(**asked, encoded_media=encoded).logits, model(**inputs).logits)
    model.config.pruning.method = "divprune"  # compares elsewhere
    model(**text_of(inputs), encoded_media=encoded)
    model.config.pruning = {**block, "text_tower": save_clip(tmp_path / "other", seed=1)}
    with pytest.raises(ValueError, match="text_tower"):
        model(**asked, encoded_media=encoded)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"pixel_values_videos": torch.zeros(1, 4, 3, 32, 32)}, "encoded_media and pixels of videos were passed"),
        ({"image_sizes": torch.tensor([[40, 48]])}, "encoded_media and image_sizes were passed"),
        ({"encoded_media": {"video": 1}}, "encoded_media is a dict"),
    ],
    ids=["pixels", "sizes", "type"],
)
def test_other_media_beside_the_encoded_ones_are_refused(more, message, video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = processor(text=QUESTION, videos=[video])
    encoded = model.encode_media(**inputs)
    with pytest.raises(ValueError, match=message):
        model(**{**text_of(inputs), "encoded_media": encoded, **more})


def test_placeholders_of_other_media_are_refused(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    encoded = model.encode_media(**processor(text=QUESTION, videos=[video]))
    longer = processor(text=QUESTION, videos=[random_video(3, frames=8)], num_frames=8)
    with pytest.raises(ValueError, match="the prompt has 32 video placeholders"):
        model(**text_of(longer), encoded_media=encoded)
    with pytest.raises(ValueError, match="2 <video> placeholders .* hold 1"):
        processor(text=[QUESTION, OTHER], encoded_media=encoded, padding=True)
    with pytest.raises(ValueError, match="encoded_media and images or videos"):
        processor(text=QUESTION, videos=[video], encoded_media=encoded)
    with pytest.raises(ValueError, match="encode_media was given no pixels"):
        model.encode_media(**text_of(longer))
    with pytest.raises(ValueError, match="prefill_chunk_size=8 was given with encoded_media"):
        asked = processor(text=QUESTION, encoded_media=encoded)
        model.generate(**asked, encoded_media=encoded, prefill_chunk_size=8, **GENERATE)


def test_features_that_are_projected_already_are_refused(video):
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25)
    inputs = text_of(processor(text=QUESTION, videos=[video]))
    with pytest.raises(ValueError, match="mm_encoder_outputs hold all tokens.*encode_media"):
        model(**inputs, mm_encoder_outputs={"video": torch.zeros(64, 32)})


def test_the_fingerprint_is_of_values_names_shapes_and_dtypes():
    tower = tiny_model().model.vision_tower
    assert weights_fingerprint([tower]) == weights_fingerprint([copy.deepcopy(tower)])
    assert weights_fingerprint([tower]) != weights_fingerprint([copy.deepcopy(tower).bfloat16()])
    assert weights_fingerprint([tower]) != weights_fingerprint([tower, tower])
    assert weights_fingerprint([copy.deepcopy(tower).to("meta")]) != weights_fingerprint([tower])


def test_the_layers_after_the_tapped_one_do_not_run(video):
    """And what they would not have changed is the stock tower's, to the bit."""
    processor, model = tiny_processor(keep_ratio=0.25), tiny_model(keep_ratio=0.25, video_pooling=False)
    pixels = processor(text=QUESTION, videos=[video])["pixel_values_videos"]
    tower, ran = model.model.vision_tower, []
    expected = tower(pixels[0], output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]
    layers = getattr(tower, "vision_model", tower).encoder.layers
    hooks = [
        layer.register_forward_hook(lambda *args, index=index: ran.append(index)) for index, layer in enumerate(layers)
    ]
    (item,) = model.encode_media(pixel_values_videos=pixels).items
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1] and len(layers) == 3
    assert torch.equal(item.sets[0]["features"], expected)
