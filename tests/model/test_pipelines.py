"""`pipeline()` on a variant's folder: chats with images and videos give what `generate` gives."""

import os
import shutil

import pytest
import torch
import transformers
from export import convert_files
from huggingface_hub import constants
from tiny import random_image, random_video, save_stock_checkpoint, write_video
from transformers import AutoProcessor, TextStreamer, pipeline

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
QUESTION = "what colour is the star ?"
NEW_TOKENS = 4
TASKS = ["image-text-to-text"] + ["any-to-any"] * IS_5  # which 4.57 does not have


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = save_stock_checkpoint(tmp_path_factory.mktemp("stock"))
    # 4.57 caches the code of a local folder under the folder's name
    folder = tmp_path_factory.mktemp("variants") / f"pipelines-{os.getpid()}"
    folder.mkdir()
    convert_files(base, folder, {"keep_ratio": 0.25})
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module", params=TASKS)
def pipe(request, folder):
    return pipeline(request.param, model=folder, trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Paths of two images and two clips."""
    folder = tmp_path_factory.mktemp("media")
    paths = {}
    for index, name in enumerate(["clip", "other clip"]):
        paths[name] = str(write_video(folder / f"{index}.mp4", random_video(index, 6, (48, 64))))
    for index in range(2):
        paths[f"image{index}"] = str(folder / f"{index}.png")
        random_image(index).save(paths[f"image{index}"])
    return paths


def chat(*paths):
    """One user turn with images and videos, by their file names."""
    parts = [{"type": "video" if path.endswith("mp4") else "image", "path": path} for path in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


@torch.no_grad()
def generate(pipe, messages, keep_ratio=None):
    """The answer without the pipeline."""
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ratio = (
        {}
        if keep_ratio is None
        else {"processor_kwargs": {"keep_ratio": keep_ratio}}
        if IS_5
        else {"keep_ratio": keep_ratio}
    )
    inputs = pipe.processor.apply_chat_template(messages, **template, **ratio)
    output = pipe.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(pipe, messages, **kwargs):
    outputs = pipe(text=messages, max_new_tokens=NEW_TOKENS, return_full_text=False, **kwargs)
    return outputs[0]["generated_text"]


@pytest.mark.parametrize("names", [["image0"], ["image0", "image1"], ["clip"], ["clip", "image1"]])
def test_chat(pipe, media, names):
    messages = chat(*(media[name] for name in names))
    assert ask(pipe, messages).strip() == generate(pipe, messages).strip()


def ask_all(pipe, chats, **kwargs):
    outputs = pipe(text=chats, max_new_tokens=NEW_TOKENS, return_full_text=False, **kwargs)
    return [sample[0]["generated_text"].strip() for sample in outputs]


def test_several_chats(pipe, media):
    chats = [chat(media["image0"]), chat(media["clip"]), chat(media["image0"], media["image1"])]
    assert ask_all(pipe, chats) == [generate(pipe, one).strip() for one in chats]


# A pipeline of any model puts media of one kind and size into a batch, and 4.57 images alone.
@pytest.mark.parametrize("names", [["image0", "image1"]] + [["clip", "other clip"]] * IS_5, ids=str)
def test_a_batch_of_chats(pipe, media, names):
    chats = [chat(media[name]) for name in names]
    expected = [generate(pipe, one).strip() for one in chats]
    assert ask_all(pipe, chats, batch_size=2) == expected
    if IS_5:
        whole = ask_all(pipe, chats, batch_size=2, processor_kwargs={"keep_ratio": 1.0})
        assert whole == [generate(pipe, one, keep_ratio=1.0).strip() for one in chats]


def test_batch_of_prompts(pipe):
    """Prompts outside of a chat, two at once."""
    images = [random_image(0), random_image(1)]
    texts = [f"USER : <image> {QUESTION} ASSISTANT :"] * 2
    outputs = pipe(images=images, text=texts, max_new_tokens=NEW_TOKENS, return_full_text=False)
    alone = [
        pipe(images=image, text=text, max_new_tokens=NEW_TOKENS, return_full_text=False)[0]["generated_text"]
        for image, text in zip(images, texts)
    ]
    assert [output["generated_text"] for output in outputs] == alone


@pytest.mark.parametrize("names", [["image0"], ["image0", "image1"], ["clip"]])
def test_streaming(pipe, media, names):
    class Collector(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    pieces = []
    streamer = Collector(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = ask(pipe, chat(*(media[name] for name in names)), generate_kwargs={"streamer": streamer})
    assert len(pieces) > 1 and "".join(pieces).split() == answer.split()


def test_a_ratio_for_one_call_outside_of_a_chat(pipe):
    """Processor arguments reach the processor on both lines, and the ratio goes on to the model."""
    seen = count_placeholders(pipe, images=random_image(0), text=f"<image> {QUESTION}", keep_ratio=0.5)
    assert (
        seen["keep_ratio"] == 0.5
        and seen["image"] > count_placeholders(pipe, images=random_image(0), text="<image>")["image"]
    )


@pytest.mark.skipif(not IS_5, reason="chat pipelines of 4.57 pass no arguments to the processor")
def test_a_ratio_for_one_chat(pipe, media):
    messages = chat(media["clip"])
    answer = ask(pipe, messages, processor_kwargs={"keep_ratio": 1.0})
    assert answer.strip() == generate(pipe, messages, keep_ratio=1.0).strip()


def test_a_ratio_for_a_pipeline(pipe, media):
    """What is left for chats on 4.57: another ratio in the processor and in the model."""
    messages = chat(media["clip"])
    expected = generate(pipe, messages, keep_ratio=0.5)
    blocks = pipe.processor.pruning, pipe.model.config.pruning
    try:
        for block in blocks:
            block.keep_ratio = 0.5
        assert ask(pipe, messages).strip() == expected.strip()
    finally:
        for block in blocks:
            block.keep_ratio = 0.25


def count_placeholders(pipe, **kwargs):
    """What the model is called with."""
    seen, generate = {}, pipe.model.generate

    def record(**inputs):
        seen.update(image=int((inputs["input_ids"] == pipe.model.config.image_token_id).sum()))
        seen.update(keep_ratio=inputs.get("keep_ratio"))
        return generate(**inputs)

    pipe.model.generate = record
    try:
        pipe(max_new_tokens=1, **kwargs)
    finally:
        del pipe.model.generate
    return seen


def test_processor_of_the_pipeline_is_ours(pipe, folder):
    assert type(pipe.processor).__name__ == type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)).__name__
    assert type(pipe.processor).__name__ == "ReDiPruneProcessor"
    assert constants.HF_HUB_OFFLINE
