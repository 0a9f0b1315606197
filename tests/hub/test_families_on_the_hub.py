"""Variants of every family: exported, loaded through everything that loads a model, saved, pushed, and carried to the other line
of transformers. All of this happens in processes that know nothing of this one: one loads, saves and pushes, and one of the
other line loads what it left. The tests on that line see the other direction."""

import contextlib
import io
import json
import shutil

import export
import pytest
import torch
from exporting import refused, run
from families import FAMILIES
from hub_server import Hub
from test_hub import OTHER_PYTHON, assert_same, needs_other, run_steps
from tiny import random_image, random_video, write_video
from transformers import AutoProcessor

pytestmark = [pytest.mark.hub, pytest.mark.slow]
KEEP_RATIO = 0.25


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.add_token("hf_me", "me")
        yield hub


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """Where everything of a family is, and what the code of its cards asks about."""
    folder = tmp_path_factory.mktemp(family.name)
    random_image().save(folder / "photo.jpg")
    write_video(folder / "clip.mp4", random_video(frames=12))
    return folder


@pytest.fixture(scope="module")
def base(family, folder):
    (folder / "base").mkdir()
    return family.save_stock_checkpoint(folder / "base")


@pytest.fixture(scope="module")
def variant(base, folder):
    """Exported and compared with its base."""
    arguments = [base, "--keep-ratio", KEEP_RATIO, "--output", folder / "variant"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export.main([*map(str, arguments)])
    assert "bit for bit" in printed.getvalue()
    return folder / "variant"


@pytest.fixture(scope="module")
def linked(base, folder):
    run(base, "--link", "--keep-ratio", KEEP_RATIO, "--output", folder / "linked")
    return folder / "linked"


@pytest.fixture(scope="module")
def old(family, base, folder):
    """A variant of the base as it was published, and what its export printed."""
    vicuna = family.config_class.fallback_template
    bare = published(base, folder / "published", *([] if vicuna else [()]))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(bare, "--keep-ratio", KEEP_RATIO, "--output", folder / "old")
    return folder / "old", printed.getvalue()


@pytest.fixture(scope="module")
def here(family, hub, variant, linked, folder):
    """What this line finds in the folders, one of which it saves again and pushes, and what it finds on the Hub then."""
    before = len(hub.requests)
    found = run_steps(
        hub,
        folder / "home",
        copy=("everywhere", {"repo": variant}),
        link=("everywhere", {"repo": linked}),
        again=("saved_again", {"repo": variant, "folder": folder / "again"}),
        card=("card", {"folder": variant}),
        pushed=("pushed", {"folder": variant, "repo": f"me/{family.name}"}),
    )
    assert hub.requests[before] == ("POST", "/api/repos/create")  # nothing is asked about a folder
    return found


@pytest.fixture(scope="module")
def loaded(here):
    return here["copy"]


@pytest.fixture(scope="module")
def there(family, hub, variant, here, old, folder):
    """What the other line finds in the folders and on the Hub."""
    return run_steps(
        hub,
        folder / "home-other",
        OTHER_PYTHON,
        again=("everywhere", {"repo": folder / "again"}),
        old=("everywhere", {"repo": old[0]}),
        by_id=("everywhere", {"repo": f"me/{family.name}"}),
        card=("card", {"folder": variant}),
    )


def check(family, found, expected, across_lines=False):
    """Every way of loading gives this family's classes and what `expected` gave."""
    # 5.x leaves marks around a video with timestamps that 4.57 takes away, as the stock classes do.
    kinds = 1 if across_lines and family.has_timestamps else 2

    def seen_by(fingerprint):
        cut = {"prompt": kinds, "logits": 16 * kinds, "answer": 4 * kinds}
        return {name: values[: cut[name]] if name in cut else values for name, values in fingerprint.items()}

    assert found["config"] == family.config_class.__name__
    assert found["processor"] == found["pipeline"] == family.processor_class.__name__
    fingerprints = list(expected["seen"].values())
    assert len(found["seen"]) == 3  # three Auto classes on either line
    for name, fingerprint in found["seen"].values():
        assert name == family.model_class.__name__
        assert_same(seen_by(fingerprint), seen_by(fingerprints[0][1]), KEEP_RATIO)
    assert found["weights"] == expected["weights"]


def test_a_copy_loads_through_every_auto_class(family, loaded):
    check(family, loaded, loaded)


def test_a_link_is_the_copy_without_its_weights(family, here, linked):
    assert not list(linked.glob("*.safetensors"))
    check(family, here["link"], here["copy"])


def test_the_code_of_the_card_answers(here):
    assert here["card"]["printed"]


def test_saved_and_loaded_again(here):
    assert here["again"]["weights"] == here["copy"]["weights"]
    assert_same(here["again"]["seen"], here["copy"]["seen"]["AutoModel"][1])


def test_pushed_and_loaded_by_id(family, here, loaded):
    check(family, here["pushed"], loaded)


@needs_other
@pytest.mark.parametrize("where", ["again", "by_id"])
def test_the_other_line_loads_what_this_one_saved_and_pushed(family, there, loaded, where):
    check(family, there[where], loaded, across_lines=True)


@needs_other
def test_the_other_line_runs_the_code_of_the_card_and_loads_an_old_base(family, there):
    assert there["card"]["printed"] and there["old"]["processor"] == family.processor_class.__name__


# -- bases as they are published ---------------------------------------------------------------------------------------


def published(base, folder, templates=("chat_template.jinja", "chat_template.json")):
    """The base with the files that the oldest of the published checkpoints have: no template, no file of the processor's own or
    of the videos'."""
    shutil.copytree(base, folder)
    # 4.57 writes no such file where a processor has nothing to say itself.
    file = folder / "processor_config.json"
    processor = json.loads(file.read_text()) if file.exists() else {}
    if "image_processor" in processor:  # as 5.x writes it
        (folder / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    for name in ("processor_config.json", "video_preprocessor_config.json", *templates):
        (folder / name).unlink(missing_ok=True)
    return folder


def test_an_old_base(family, old, variant):
    output, printed = old
    assert ("Vicuna" in printed) == family.config_class.fallback_template
    new = AutoProcessor.from_pretrained(variant, trust_remote_code=True)
    old = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert type(old).__name__ == family.processor_class.__name__
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where ?"}]}]
    assert family.written("USER: <image>") in old.apply_chat_template(chat)
    for index, (_, media) in enumerate(family.prompts()):
        if family.has_mrope and "videos" in media:  # which are then as large as images may be
            continue
        found, expected = (family.inputs(processor, index) for processor in (old, new))
        assert found.keys() == expected.keys()
        assert all(found[name].shape == expected[name].shape for name in found)
        # Frames are resized as images are, where nothing is said of videos.
        alike = found.keys() - {"pixel_values_videos"}
        assert all(torch.equal(found[name], expected[name]) for name in alike)


@pytest.mark.parametrize(
    "says, sampled",
    [
        ({}, (True, 8)),
        ({"do_sample_frames": False}, (True, 8)),  # which transformers writes for every class that has nothing to say
        ({"do_sample_frames": True, "num_frames": 4}, (True, 4)),
        ({"do_sample_frames": True, "fps": 2}, (True, None)),
    ],
    ids=str,
)
def test_frames_of_video_llava(says, sampled, tmp_path):
    """8 of a clip, as it was trained, where its base names no number."""
    family = next(family for family in FAMILIES if family.name == "video_llava")
    (tmp_path / "stock").mkdir()
    base = published(family.save_stock_checkpoint(tmp_path / "stock"), tmp_path / "base")
    if says:
        images = json.loads((base / "preprocessor_config.json").read_text())
        videos = {
            "video_processor_type": "VideoLlavaVideoProcessor",
            "size": images["size"],
            "crop_size": images["crop_size"],
        }
        (base / "video_preprocessor_config.json").write_text(json.dumps({**videos, **says}))
    run(base, "--output", tmp_path / "variant")
    written = json.loads((tmp_path / "variant" / "video_preprocessor_config.json").read_text())
    assert written["video_processor_type"] == "VideoLlavaVideoProcessor" and "image_processor_type" not in written
    assert (written["do_sample_frames"], written.get("num_frames")) == sampled
    processor = family.processor_class.from_pretrained(tmp_path / "variant")
    video = write_video(tmp_path / "clip.mp4", random_video(frames=12))
    frames = processor(text="<video> where ?", videos=[str(video)])["pixel_values_videos"].shape[1]
    assert frames == (sampled[1] or 2)  # 1.2 seconds


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_old_bases_of_qwen(name, tmp_path):
    """Two frames of a second, as they were trained, and no template of another family."""
    family = next(family for family in FAMILIES if family.name == name)
    (tmp_path / "stock").mkdir()
    stock = family.save_stock_checkpoint(tmp_path / "stock")
    assert "holds no chat template" in refused(published(stock, tmp_path / "bare"), "--output", tmp_path / "variant")
    run(published(stock, tmp_path / "base", ()), "--output", tmp_path / "variant")
    written = json.loads((tmp_path / "variant" / "video_preprocessor_config.json").read_text())
    assert written["video_processor_type"] == family.config_class.video_processor
    assert (written["do_sample_frames"], written["fps"]) == (True, 2)
    processor = family.processor_class.from_pretrained(tmp_path / "variant")
    video = write_video(tmp_path / "clip.mp4", random_video(frames=40))
    inputs = processor(text=family.written("<video> where ?"), videos=[str(video)])
    assert inputs["video_grid_thw"][0, 0] == 4  # pairs of frames of four seconds
