"""Chats: what somebody types is text, whatever it looks like. Only an image or a video becomes a placeholder."""

import re

from transformers.utils import get_json_schema

BREAK = "\u200b"  # a zero width space: after the first character of a placeholder it leaves text that reads the same
MEDIA = ("image", "video", "audio")


def plain_messages(conversation, tokens):
    """
    A chat, or a list of chats, whose texts hold no placeholder of `tokens`: a `BREAK` follows the first character.

    The media parts of a message are left as they are; all else in it is text, names and arguments of tools included.
    """
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (list, tuple)):
        return [plain_messages(item, tokens) for item in conversation]
    if not isinstance(conversation, dict):
        return conversation
    return {
        key: _plain_content(value, tokens) if key == "content" else plain_text(value, tokens)
        for key, value in conversation.items()
    }


def _plain_content(content, tokens):
    if not isinstance(content, (list, tuple)):
        return plain_text(content, tokens)
    is_media = [isinstance(part, dict) and part.get("type") in MEDIA for part in content]
    last = len(content) - 1
    return [
        part if is_media[place] else plain_text(part, tokens, goes_on=place < last)
        for place, part in enumerate(content)
    ]


def plain_tools(tools, tokens):
    """Tools as schemas without placeholder tokens; a function becomes its schema."""
    if tools is None:
        return None
    return plain_text([get_json_schema(tool) if callable(tool) else tool for tool in tools], tokens)


def plain_text(value, tokens, goes_on: bool = False):
    """
    Strings, also those in lists and dictionaries, without placeholder tokens.

    Args:
        value: what a template can render.
        tokens: the placeholders.
        goes_on: more text follows in the same message. A template may write the two without anything between them, so
            the beginning of a placeholder at the end counts, too.
    """
    if isinstance(value, str):
        literal = "|".join(map(re.escape, tokens))
        if goes_on:
            beginnings = {token[:length] for token in tokens for length in range(1, len(token))}
            literal += rf"|(?:{'|'.join(map(re.escape, beginnings))})(?=\s*$)"
        return re.sub(literal, lambda found: found[0][0] + BREAK + found[0][1:], value)
    if isinstance(value, (list, tuple)):
        return [plain_text(item, tokens, goes_on) for item in value]
    if isinstance(value, dict):
        return {plain_text(key, tokens): plain_text(item, tokens, goes_on) for key, item in value.items()}
    return value


def contents_as_lists(conversation):
    """Chats whose contents are lists of parts: 4.57 looks for media in every part, and in every letter of a string."""
    if isinstance(conversation, list):
        return [contents_as_lists(item) for item in conversation]
    if not isinstance(conversation.get("content"), str):
        return conversation
    return {**conversation, "content": [{"type": "text", "text": conversation["content"]}]}
