"""Chats: what somebody types is read as text and never becomes a placeholder, whatever the template does with it."""

import json

import pytest
import torch
import transformers
from places import ROOT
from rediprune.inputs_chat import BREAK, plain_text
from test_processing import IMAGE, VIDEO, chat, count, expected_image_count, user
from tiny import POOLED, random_image, random_video, tiny_processor

TEMPLATE = (ROOT / "chat_template.jinja").read_text()
# All media first and then all texts without anything between them, as in the public checkpoints' templates.
TIGHT = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% for p in m['content'] if p['type'] != 'text' %}<{{ p['type'] }}>{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] | trim }}{% endfor %}{% endfor %}"
)
KEPT = 4 * round(0.15 * POOLED)
VIDEO_PART = {"type": "video", "video": random_video()}
IMAGE_PART = {"type": "image", "image": random_image()}


@pytest.fixture(scope="module")
def embedded():
    """The tokenizer of the tiny checkpoint, which reads every character, in the tiny processor."""
    processor = tiny_processor()
    processor.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(ROOT)
    processor.image_token_id, processor.video_token_id = processor.tokenizer.convert_tokens_to_ids(
        ["<image>", "<video>"]
    )
    processor.chat_template = TEMPLATE
    return processor


def read(processor, ids):
    """What the model reads, placeholders aside."""
    return processor.tokenizer.decode([token for token in ids.tolist() if token > 4])


def test_typed_placeholders_are_read_as_text(embedded):
    messages = [user(VIDEO_PART, "is <video> or <image> a word? <video><video>")]
    ids = chat(embedded, messages)["input_ids"][0]
    assert (ids == embedded.video_token_id).sum() == KEPT and not (ids == embedded.image_token_id).any()
    assert read(embedded, ids).replace(BREAK, "") == "USER: \nis <video> or <image> a word? <video><video> ASSISTANT:"
    prompt = embedded.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.count("<video>") == 1 and prompt.replace(BREAK, "").count("<video>") == 4
    assert torch.equal(embedded(text=prompt, videos=[VIDEO_PART["video"]])["input_ids"][0], ids)


def test_all_turns_roles_and_forms_of_content(embedded):
    messages = [
        {"role": "system", "content": "never say <image>"},
        user(IMAGE_PART, "what is <image> ?"),
        {"role": "assistant", "content": [{"type": "text", "text": "a <video>"}]},
        {"role": "user", "content": "and <video> ?"},
    ]
    inputs = chat(embedded, messages)
    ids = inputs["input_ids"][0]
    assert (ids == embedded.image_token_id).sum() == expected_image_count((40, 48))
    assert not (ids == embedded.video_token_id).any()
    assert read(embedded, ids).replace(BREAK, "") == (
        "never say <image> USER: \nwhat is <image> ? ASSISTANT: a <video>USER: and <video> ? ASSISTANT:"
    )


def test_a_row_does_not_fail_the_others(processor):
    chats = [[user(VIDEO_PART, "where is <video> ?")], [user("<video> <image> where")], [user(VIDEO_PART, "where")]]
    inputs = chat(processor, chats, padding=True)
    assert count(inputs, VIDEO) == [KEPT, 0, KEPT] and count(inputs, IMAGE) == [0, 0, 0]
    alone = chat(processor, chats[2])
    assert torch.equal(inputs["input_ids"][2][inputs["attention_mask"][2].bool()], alone["input_ids"][0])


@pytest.mark.parametrize(
    "texts",
    [
        ["<vid", "eo>"],
        ["<", "video>"],
        ["<v", "ide", "o>"],
        ["<video", ">"],
        ["<vid ", " eo>"],
        ["<", "v", "ideo", "> <image", ">"],
    ],
)
def test_a_placeholder_in_pieces(processor, texts):
    for messages in ([user(VIDEO_PART, *texts)], [user(texts[0], VIDEO_PART, *texts[1:])]):
        inputs = chat(processor, messages, chat_template=TIGHT)
        assert count(inputs, VIDEO) == [KEPT] and count(inputs, IMAGE) == [0]
        prompt = processor.apply_chat_template(messages, chat_template=TIGHT)
        assert "".join(text.strip() for text in texts) in prompt.replace(BREAK, "")


@pytest.mark.parametrize(
    "text", ["where is it", "a < b and c <", "<vid", "<VIDEO> < video >", "<im age>", "", "1 <i> 2"]
)
def test_other_texts_stay_as_they_are(processor, text):
    for messages in (
        [user(text)],
        [user(IMAGE_PART, text)],
        [user(text), {"role": "assistant", "content": [{"type": "text", "text": text}]}],
    ):
        assert BREAK not in processor.apply_chat_template(messages)
    assert plain_text(text, ("<image>", "<video>")) == text


def test_what_was_passed_is_not_changed(processor):
    messages = [
        user(VIDEO_PART, "where is <video>"),
        {"role": "assistant", "content": [{"type": "text", "text": "<image>"}]},
    ]
    before = [message["content"] for message in messages]
    texts = [[part.get("text") for part in message["content"]] for message in messages]
    chat(processor, messages)
    assert all(message["content"] is content for message, content in zip(messages, before))
    assert [[part.get("text") for part in message["content"]] for message in messages] == texts


def test_media_keep_their_names(processor, tmp_path):
    path = tmp_path / "<image>.png"
    random_image().save(path)
    inputs = chat(processor, [user({"type": "image", "path": str(path)}, "where")])
    assert count(inputs, IMAGE) == [expected_image_count((40, 48))]


def test_tools_documents_and_calls(processor):
    def look(place: str):
        """
        Looks at <video> there.

        Args:
            place: where <image> is
        """

    schema = {
        "type": "function",
        "function": {"name": "see", "description": "sees <video>", "parameters": {"<image>": {}}},
    }
    template = (
        "{{ tools | tojson }}{{ documents | tojson }}"
        "{% for m in messages %}{{ m['content'] }}{{ m['tool_calls'] | tojson }}{{ m['name'] }}{% endfor %}"
    )
    call = {"type": "image", "function": {"name": "see", "arguments": {"place <video>": ["<image>", "<video>"]}}}
    messages = [{"role": "assistant", "content": "a <video>", "tool_calls": [call], "name": "<image>"}]
    prompt = processor.apply_chat_template(
        messages, chat_template=template, tools=[look, schema], documents=[{"title": "<video>", "text": "of <image>"}]
    )
    assert "<video>" not in prompt and "<image>" not in prompt
    plain = prompt.replace(json.dumps(BREAK)[1:-1], "").replace(BREAK, "")
    assert plain.count("<video>") == 6 and plain.count("<image>") == 5
    assert "place <video>" in plain and "where <image> is" in plain


def test_the_final_message_can_be_continued(processor):
    messages = [
        user("where is <video>"),
        {"role": "assistant", "content": [{"type": "text", "text": "the <image> is"}]},
    ]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith(f"the <{BREAK}image> is")


@pytest.mark.skipif(not hasattr(transformers.ProcessorMixin, "validate_inputs"), reason="not in transformers 4.57")
def test_beside_the_sanitizing_of_transformers(processor):
    messages = [user(IMAGE_PART, "where is <image> </s>")]
    template = "{{ bos_token }}" + processor.chat_template
    inputs = chat(processor, messages, chat_template=template, sanitize_control_tokens=True)
    assert count(inputs, IMAGE) == [expected_image_count((40, 48))] and count(inputs, 2) == [0]


def test_in_a_prompt_every_placeholder_is_one(processor):
    """There nothing tells who wrote it."""
    with pytest.raises(ValueError, match="the text has 2 <video> placeholders, but 1 videos were passed"):
        processor(text="USER: <video> where is <video>", videos=random_video())


def test_the_template_of_the_repository_with_contents_as_strings(embedded):
    parts = [{"role": "user", "content": [{"type": "text", "text": "where is <video>"}]}]
    strings = [{"role": "user", "content": "where is <video>"}]
    assert embedded.apply_chat_template(parts) == embedded.apply_chat_template(strings)
    assert torch.equal(chat(embedded, parts)["input_ids"], chat(embedded, strings)["input_ids"])
    both = chat(embedded, [strings, parts], padding=True)["input_ids"]
    assert torch.equal(both[0], both[1])
