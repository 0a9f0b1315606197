"""Relevance in CLIP's joint space: against a plain computation from a CLIP checkpoint, and from loading to generating."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hub_server import Hub
from places import SUPPORT
from rediprune.configuration_rediprune import PruningConfig, ReDiPruneConfig
from rediprune.inputs_text_tower import TOKENIZER_FILES, question_segments
from rediprune.modeling_rediprune_llava import ReDiPruneLlavaNextVideoForConditionalGeneration as Model
from rediprune.ops_relevance import clip_relevance
from rediprune.processing_rediprune import ReDiPruneProcessor
from rediprune.vision_joint_space import JointSpace
from safetensors.torch import load_file
from tiny import WORDS, random_image, random_video, save_clip, shown, tiny_config, tiny_model, tiny_processor
from transformers import AutoTokenizer, CLIPModel

SHORT, LONG = "what colour is the star ?", "which way does the red star move left right " * 3
METHODS = pytest.mark.parametrize("method", ["cdpruner", "trim"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pair(text_tower, **pruning):
    pruning = {"method": "cdpruner", "keep_ratio": 0.25, "text_tower": text_tower, **pruning}
    return tiny_model(**pruning), tiny_processor(**pruning)


def ask(processor, *questions, kind="video"):
    media = [random_video(1), random_video(2)] if kind == "video" else [random_image(1), random_image(2, (30, 90))]
    text = [f"USER : <{kind}> {question}" for question in questions]
    return processor(text=text, padding=True, **{f"{kind}s": media[: len(questions)]})


def text_vectors(text_tower, question):
    """Unit vectors of the segments of a question: 10 words between the two ends of a text tower that reads 12 tokens."""
    clip, tokenizer, words = (
        CLIPModel.from_pretrained(text_tower),
        AutoTokenizer.from_pretrained(text_tower),
        question.split(),
    )
    parts = [" ".join(words[start : start + 10]) for start in range(0, len(words), 10)]
    return torch.cat(
        [
            F.normalize(
                clip.text_projection(clip.text_model(**tokenizer(part, return_tensors="pt")).pooler_output), dim=-1
            )
            for part in parts
        ]
    )


def patch_vectors(text_tower, model, pixels):
    """(N, P, D) in the joint space, before any pooling."""
    clip = CLIPModel.from_pretrained(text_tower)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    return clip.visual_projection(clip.vision_model.post_layernorm(states))


# -- the relevance -----------------------------------------------------------------------------------------------------


def test_the_sign_is_minus():
    tokens = torch.tensor([[[2.0, 0], [0, 3], [-1, 0], [0, 0]]])
    assert clip_relevance(tokens, torch.tensor([[1.0, 0]])).tolist() == [[-1, 0, 1, 0]]


@METHODS
@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("question", [SHORT, LONG])
def test_videos_equal_a_plain_computation(method, pooling, question, text_tower):
    model, processor = pair(text_tower, method=method, video_pooling=pooling)
    inputs = ask(processor, question)
    (tokens,) = shown(model, inputs)
    patches = patch_vectors(text_tower, model, inputs["pixel_values_videos"][0])
    if pooling:
        patches = patches.unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    cosines = F.normalize(patches, dim=-1) @ text_vectors(text_tower, question).T
    assert cosines.shape[-1] == (1 if question == SHORT else 3)
    torch.testing.assert_close(tokens.relevance, -cosines.mean(-1))


def test_images_equal_a_plain_computation(text_tower):
    model, processor = pair(text_tower)
    inputs = ask(processor, SHORT, kind="image")
    base = next(tokens for tokens in shown(model, inputs) if tokens.relevance.shape[1] == 64)
    patches = patch_vectors(text_tower, model, inputs["pixel_values"][0][:1])
    expected = -(F.normalize(patches, dim=-1) @ text_vectors(text_tower, SHORT)[0])
    torch.testing.assert_close(base.relevance, expected)


@pytest.mark.parametrize("method", ["rediprune", "rediprune_plus", "evoprune_rediprune"])
def test_other_methods_may_ask_for_it(method, text_tower):
    """Also for tokens that were merged inside the vision tower."""
    model, processor = pair(text_tower, method=method, relevance="clip")
    for kind in ("video", "image"):
        for tokens in shown(model, ask(processor, SHORT, kind=kind)):
            expected = F.normalize(tokens.joint, dim=-1) @ -text_vectors(text_tower, SHORT)[0]
            torch.testing.assert_close(tokens.relevance, expected)
    model, processor = pair(text_tower, method=method)
    assert "clip_input_ids" not in ask(processor, SHORT)


def test_of_several_tapped_layers_the_last_is_compared(text_tower):
    model, processor = pair(text_tower, method="rediprune", relevance="clip")
    inputs = ask(processor, SHORT)
    both = shown_at(model, inputs, [-1, -2])
    assert both.features.shape[-1] == 32 and torch.equal(both.joint, shown_at(model, inputs, -2).joint)


def shown_at(model, inputs, layer):
    model.config.vision_feature_layer = layer
    return shown(model, inputs)[0]


@METHODS
@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_sample_does_not_depend_on_its_batch(method, kind, text_tower):
    model, processor = pair(text_tower, method=method)
    for questions in ([SHORT, LONG], [LONG, SHORT], [SHORT, ""]):
        batch = ask(processor, *questions, kind=kind)
        first = model.select_tokens(**batch)[0]
        alone = ask(processor, questions[0], kind=kind)
        (medium,) = model.select_tokens(**alone)
        assert torch.equal(first.kept, medium.kept)
        # Neither do words under the mask, nor segments that are all padding.
        ids, mask = (F.pad(alone[name], (0, 0, 0, 2)) for name in ("clip_input_ids", "clip_attention_mask"))
        alone.update(clip_input_ids=ids.masked_fill(mask == 0, 7), clip_attention_mask=mask)
        (padded,) = model.select_tokens(**alone)
        assert torch.equal(padded.kept, medium.kept)


def test_an_empty_question_has_no_relevance(text_tower):
    model, processor = pair(text_tower)
    for questions in (("",), ("", LONG)):
        first, *second = shown(model, ask(processor, *questions))  # a video for each question
        assert not first.relevance.any() and all(tokens.relevance.all() for tokens in second)


@METHODS
def test_half_precision(method, text_tower):
    model, processor = pair(text_tower, method=method)
    model = model.to(torch.bfloat16)
    inputs = ask(processor, SHORT).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        (tokens,) = shown(model, inputs)
    assert tokens.joint.dtype == tokens.relevance.dtype == torch.float32
    assert model(**inputs).logits.isfinite().all()


# -- the question ------------------------------------------------------------------------------------------------------


def test_segments(text_tower):
    tokenizer = AutoTokenizer.from_pretrained(text_tower)
    ids, mask = question_segments(text_tower, [SHORT, LONG, ""])
    assert ids.shape == mask.shape == (3, 3, 12) and mask.sum(-1).tolist() == [[8, 0, 0], [12, 12, 9], [0, 0, 0]]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row, number in ((0, 0), (1, 0), (1, 1), (1, 2)):
        segment = ids[row, number][mask[row, number].bool()].tolist()
        assert segment[0] == start and segment[-1] == end and not {start, end} & set(segment[1:-1])
    words = [
        word for part in ids[1] for word in tokenizer.decode(part, skip_special_tokens=True).split() if word in WORDS
    ]
    assert words == LONG.split()


@pytest.mark.parametrize(
    "prompt, question",
    [
        ("USER: <video>\nwhere is it ? ASSISTANT:", "where is it ?"),  # the chat template asks with these words
        ("USER: where is it ? <video>\nASSISTANT:", ""),
        ("<image> what ? <video> where ?", "where ?"),
        ("<video> which ASSISTANT: is it", "which ASSISTANT: is it"),
    ],
)
def test_what_is_asked(prompt, question, text_tower):
    found = pair(text_tower)[1].clip_inputs([prompt])
    ids, mask = question_segments(text_tower, [question])
    assert torch.equal(found["clip_input_ids"], ids) and torch.equal(found["clip_attention_mask"], mask)


def test_a_chat_gives_what_its_prompt_gives(text_tower):
    processor = pair(text_tower)[1]
    content = [{"type": "video", "video": random_video(1)}, {"type": "text", "text": SHORT}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert torch.equal(inputs["clip_input_ids"], question_segments(text_tower, [SHORT])[0])


def test_ids_are_there_where_they_are_needed(text_tower):
    video = {"text": f"<video> {SHORT}", "videos": random_video()}
    needs = lambda call=video, tower=text_tower, **pruning: "clip_input_ids" in pair(tower, **pruning)[1](**call)  # noqa: E731
    assert needs() and needs(method="trim") and needs({**video, "keep_ratio": 0.5}, keep_ratio=1.0)
    assert not needs({**video, "keep_ratio": 1.0}) and not needs(keep_ratio=1.0) and not needs({"text": SHORT})
    assert not needs({"videos": random_video()}) and not needs(query_weighting="none") and not needs(method="mmtok")
    assert not needs(method="rediprune") and not needs(relevance="projected") and not needs(tower=None)


def test_missing_ids(text_tower):
    model, processor = pair(text_tower)
    inputs = ask(processor, SHORT)
    for change in (
        {"clip_input_ids": None},
        {"clip_attention_mask": None},
        {"clip_input_ids": inputs["clip_input_ids"][:0]},
    ):
        for call in (model, model.select_tokens):
            with pytest.raises(
                ValueError, match="relevance='clip'.*needs clip_input_ids.*processor of this repository"
            ):
                call(**{**inputs, **change})


# -- the model ---------------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    "mode", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_generates(method, mode, text_tower):
    """A batch as each of its samples alone, and from ids as the pruned prompt says."""
    model, processor = pair(text_tower, method=method)
    options = {"max_new_tokens": 4, "do_sample": False, **mode}
    questions, copies = [SHORT, LONG], mode.get("num_return_sequences", 1)
    batch = model.generate(**ask(processor, *questions), **options)[:, -4:]
    kept = model.select_tokens(**ask(processor, *questions))
    assert batch.shape == (2 * copies, 4) and not torch.equal(kept[0].kept, kept[1].kept)
    alone = model.generate(**ask(processor, SHORT), **options)[:, -4:]
    assert torch.equal(batch[:copies], alone)
    logits = model(**ask(processor, SHORT)).logits[0, -1]
    if not mode.get("num_beams"):
        assert alone[0, 0] == logits.argmax()


def test_training_reaches_the_vision_tower_and_not_the_text_tower(text_tower):
    model, processor = pair(text_tower, method="trim")
    inputs = ask(processor, SHORT)
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.vision_tower.parameters())
    assert all(p.grad is None for p in model.joint_space().parts.parameters())


def test_the_text_tower_is_not_saved(text_tower, tmp_path):
    model, processor = pair(text_tower)
    model.save_pretrained(tmp_path / "before")
    inputs, names = ask(processor, SHORT), set(model.state_dict())
    logits, space = model(**inputs).logits, model.joint_space()
    assert model.joint_space() is space and set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "after")
    processor.save_pretrained(tmp_path / "after")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert set(weights[0]) == set(weights[1])
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert config["pruning"]["text_tower"] == text_tower
    for path in (tmp_path / "after").glob("*.json"):
        assert "clip_tokenizer" not in path.read_text()
    again = Model.from_pretrained(tmp_path / "after").eval()
    inputs = ask(ReDiPruneProcessor.from_pretrained(tmp_path / "after"), SHORT)
    assert torch.equal(again(**inputs).logits, logits)


def test_another_tower_is_loaded_when_it_is_set(text_tower, tmp_path):
    model, processor = pair(text_tower)
    inputs = ask(processor, SHORT)
    (before,) = shown(model, inputs)
    model.config.pruning.text_tower = save_clip(tmp_path, seed=1)
    (after,) = shown(model, inputs)
    assert not torch.allclose(before.relevance, after.relevance)


# -- where the checkpoint is ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_through_the_auto_classes_with_a_folder_beside_the_weights(tmp_path):
    """Relative to the variant, whatever the working directory; saved elsewhere it names the same folder."""
    folder = tmp_path / f"tower_{os.getpid()}"
    save_clip(folder / "clip")
    pruning = {"method": "cdpruner", "keep_ratio": 0.3}
    model, processor = tiny_model(**pruning, text_tower="./clip"), tiny_processor(**pruning)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded, processor = Model.from_pretrained(folder).eval(), ReDiPruneProcessor.from_pretrained(folder)
    assert loaded.config.pruning.text_tower == processor.pruning.text_tower == str(folder / "clip")
    inputs = ask(processor, SHORT)
    torch.save({"inputs": dict(inputs), "logits": loaded(**inputs).logits}, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SUPPORT / "load_fresh.py", folder, tmp_path / "inputs.pt", tmp_path / "report.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    again = json.loads((tmp_path / f"{folder.name}_again" / "config.json").read_text())
    assert again["pruning"]["text_tower"] == str(folder / "clip")


def test_an_argument_is_relative_to_the_variant(text_tower, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    block = {"text_tower": "../elsewhere"}
    config = ReDiPruneConfig.from_pretrained(tmp_path, pruning=block)
    assert config.pruning.text_tower == str(tmp_path.parent / "elsewhere") and block == {"text_tower": "../elsewhere"}
    whole = ReDiPruneConfig.from_pretrained(tmp_path, pruning=PruningConfig(text_tower=text_tower))
    assert whole.pruning.text_tower == text_tower


@pytest.mark.hub
@pytest.mark.slow
def test_a_hub_id_may_name_a_revision(text_tower, tmp_path):
    """All files are of one commit, and none is asked for but those of CLIP's tokenizer and the weights."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    script = """
import code_package
from rediprune.inputs_text_tower import find_tower, question_segments
from rediprune.vision_joint_space import JointSpace
for place in ("me/clip", "me/clip@main"):
    print(find_tower(place)[1]["revision"])
try:
    find_tower("me/clip@nowhere")
except OSError:
    print(find_tower("me/clip@v1")[1]["revision"])
ids, mask = question_segments("me/clip@v1", ["where is the star ?"])
print(JointSpace("me/clip@v1", 16).place_questions(ids, mask).sum().item())
"""
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in Path(text_tower).iterdir()}
        first = hub.add_repository("me/clip", {**files, "evil.py": b"", "pytorch_model.bin": b""})
        hub.repositories["me/clip"].branches["v1"] = first
        second = hub.add_repository("me/clip", {"config.json": files["config.json"]})  # without weights
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=SUPPORT)
        asked = {Path(path).name for _, path in hub.requests if "/resolve/" in path}
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[:3] == [second, second, first]
    expected = JointSpace(text_tower, 16).place_questions(*question_segments(text_tower, ["where is the star ?"]))
    assert float(done.stdout.split()[3]) == expected.sum().item()
    assert asked <= {*TOKENIZER_FILES, "config.json", "model.safetensors"}


def refused(text_tower):
    """The messages of model and processor, of one type."""
    model, processor = pair(text_tower)
    with pytest.raises((OSError, ValueError)) as of_processor:
        ask(processor, SHORT)
    ids = torch.ones(1, 1, 12, dtype=torch.long)
    inputs = ask(tiny_processor(method="cdpruner", keep_ratio=0.25), SHORT)
    inputs.update(clip_input_ids=ids, clip_attention_mask=ids)
    with pytest.raises(of_processor.type) as of_model:
        model(**inputs)
    assert str(of_model.value) == str(of_processor.value)
    return of_model.type, str(of_model.value)


def test_offline_and_not_in_the_cache():
    for text_tower in ("me/clip", "me/clip@v1"):
        kind, message = refused(text_tower)
        assert kind is OSError and f"text_tower='{text_tower}' cannot be loaded" in message and "cache" in message


def test_a_folder_that_does_not_exist(tmp_path):
    kind, message = refused(str(tmp_path / "nowhere"))
    assert kind is OSError and "there is no folder" in message and "text_tower" in message


def test_a_checkpoint_that_is_no_clip(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    kind, message = refused(str(tmp_path))
    assert kind is ValueError and "'rediprune_llava_next_video', but must be a whole CLIP" in message
    (tmp_path / "config.json").unlink()
    assert "text_tower" in refused(str(tmp_path))[1]


def test_a_clip_of_another_width(tmp_path):
    with pytest.raises(
        ValueError, match="'text_tower' is .*takes features of width 20, but .* gives 16; set it to the CLIP"
    ):
        JointSpace(save_clip(tmp_path, width=20), 16)


def test_a_clip_with_missing_tensors(tmp_path):
    from safetensors.torch import save_file

    save_clip(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors of a whole CLIP, such as text_projection.weight"):
        JointSpace(str(tmp_path), 16)


def test_a_folder_is_not_pushed(text_tower, tmp_path):
    """Nobody else would find the text tower."""
    model = pair(text_tower)[0]
    for push in (
        lambda: model.push_to_hub("me/name"),
        lambda: model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/name"),
        lambda: model.config.push_to_hub("me/name"),
    ):
        with pytest.raises(ValueError, match="text_tower=.*nobody who loads it from the Hub"):
            push()
