"""The text tower of a CLIP checkpoint that `text_tower` names: where it is, and questions as its tokenizer cuts them."""

import functools
from contextlib import contextmanager

import torch
from transformers import CLIPConfig, CLIPTokenizerFast

from .hub_untrusted import find_files, link_files, names_folder, read_config
from .inputs_tokenizing import OneAtATime

SEGMENT = 77  # tokens that a CLIP text tower reads at once
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@contextmanager
def errors_about_tower(text_tower: str):
    """Turns an OSError inside into one that names the text tower, and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the CLIP checkpoint of pruning key text_tower={text_tower!r} cannot be loaded. Set it to the Hub id or folder of "
            "one that can be reached (offline: that is in the local cache; private: log in with `hf auth login`), or to None, "
            f"which compares in the language model's space. {error}"
        ) from error


def find_tower(text_tower: str) -> tuple:
    """
    Where the checkpoint of `text_tower` is, a folder or `"id@revision"`.

    Returns:
        The folder or Hub id, `{"revision": ...}` for the latter, and the [`CLIPConfig`].

    Raises:
        OSError: it cannot be reached.
        ValueError: it is no CLIP.
    """
    source, hub = text_tower, {}
    if not names_folder(text_tower):
        source, _, revision = text_tower.partition("@")
        hub["revision"] = revision or "main"
    values, commit = read_config(source, **hub)
    if values.get("model_type") != CLIPConfig.model_type:
        raise ValueError(
            f"pruning key 'text_tower' is {text_tower!r}, a model of type {values.get('model_type')!r}, but must be a whole "
            f"CLIP ({CLIPConfig.model_type!r}), such as 'openai/clip-vit-large-patch14-336'"
        )
    return source, hub if commit is None else {"revision": commit}, CLIPConfig.from_dict(values)


@functools.lru_cache(maxsize=8)
def load_tokenizer(text_tower: str):
    """
    The tokenizer of a text tower, loaded once in a process: CLIP's own class, which runs no code of the checkpoint.

    Raises:
        OSError: it cannot be reached, or has no tokenizer of CLIP's.
        ValueError: it is no CLIP.
    """
    with errors_about_tower(text_tower):
        source, hub, _ = find_tower(text_tower)
        files = find_files(source, list(TOKENIZER_FILES), **hub)
        if not ("tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys()):
            raise OSError(f"there is no tokenizer.json and no vocab.json with merges.txt in {source!r}")
        return OneAtATime(CLIPTokenizerFast.from_pretrained(link_files(files)))


def question_segments(text_tower: str, questions: list) -> tuple:
    """
    Questions as the text tower reads them: a long one in segments, each with a start and an end of its own.

    CLIP reads the meaning of a text off its end token, so a segment without one would have none.

    Returns:
        ids and mask (B, M, T), LongTensors. Segments that a question does not need are all padding; an empty one needs none.
    """
    tokenizer = load_tokenizer(text_tower)
    length = min(SEGMENT, tokenizer.model_max_length)
    segments = [[] for _ in questions]
    found = tokenizer(questions, truncation=True, max_length=length, return_overflowing_tokens=True)
    for row, ids in zip(found["overflow_to_sample_mapping"], found["input_ids"]):
        if questions[row]:
            segments[row].append(ids)
    ids = torch.zeros(len(questions), max(1, *map(len, segments)), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, parts in enumerate(segments):
        for number, part in enumerate(parts):
            ids[row, number, : len(part)] = torch.tensor(part)
            mask[row, number, : len(part)] = 1
    return ids, mask
