"""CLIP's joint space of text and pictures, of the checkpoint that `text_tower` names: what CDPruner and TRIM compare in.

Shapes: B questions in M segments of T tokens; N sets of L tokens; C the width of the vision tower, D that of the joint space.
"""

import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from .hub_untrusted import find_files, link_files, names_folder, read_config, weight_files
from .inputs_tokenizing import OneAtATime
from .ops_tokens import MIN_NORM

SEGMENT = 77  # tokens that a CLIP text tower reads at once
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@contextmanager
def tower_explained(text_tower: str):
    """Says of an OSError inside that it is about the text tower."""
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
    with tower_explained(text_tower):
        source, hub, _ = find_tower(text_tower)
        files = find_files(source, list(TOKENIZER_FILES), **hub)
        if not ("tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys()):
            raise OSError(f"there is no tokenizer.json and no vocab.json with merges.txt in {source!r}")
        return OneAtATime(CLIPTokenizerFast.from_pretrained(link_files(files)))


def question_segments(text_tower: str, questions: list) -> tuple:
    """
    Questions as the text tower reads them: a long one in segments, each with a start and an end of its own.

    CLIP says what a text means at its end token, so a segment that is merely cut off would mean nothing.

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


class JointSpace:
    """
    The parts of a CLIP checkpoint that lead into its joint space, in fp32; on the device of what it is given.

    The last norm of the vision tower is the checkpoint's, as the projection after it is: the two were trained together. A
    LLaVA taps its own tower before that norm, which nothing there has trained.

    Not an `nn.Module`, so that a model which has one neither saves nor counts its weights.

    Args:
        text_tower (`str`): as in [`PruningConfig`].
        width (`int`): of the vision tower whose features come in.

    Raises:
        OSError: the checkpoint cannot be reached, or has no safetensors weights.
        ValueError: it is no whole CLIP, or its vision tower is of another width.
    """

    def __init__(self, text_tower: str, width: int):
        self.text_tower = text_tower
        with tower_explained(text_tower):
            source, hub, config = find_tower(text_tower)
            if config.vision_config.hidden_size != width:
                raise ValueError(
                    f"pruning key 'text_tower' is {text_tower!r}, whose visual_projection takes features of width "
                    f"{config.vision_config.hidden_size}, but the model's vision tower gives {width}; set it to the CLIP "
                    "checkpoint that this vision tower was made from, or to None"
                )
            clip, info = CLIPModel.from_pretrained(
                link_files(weight_files(source, **hub)),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise ValueError(
                f"pruning key 'text_tower' is {text_tower!r}, which lacks {len(names)} tensors of a whole CLIP, such as "
                f"{names[0]}; set it to a complete checkpoint"
            )
        parts = {
            "text_model": clip.text_model,
            "text_projection": clip.text_projection,
            "visual_norm": clip.vision_model.post_layernorm,
            "visual_projection": clip.visual_projection,
        }
        self.parts = torch.nn.ModuleDict(parts).eval().requires_grad_(False)

    @torch.no_grad()
    def place_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, L, C) of the vision tower, any floating dtype, in the joint space: (N, L, D) fp32, not normalized."""
        parts = self.parts.to(features.device)
        with torch.autocast(features.device.type, enabled=False):
            return parts["visual_projection"](parts["visual_norm"](features.float()))

    @torch.no_grad()
    def place_questions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Questions, from `question_segments`, in the joint space: (B, D) fp32, the mean of the unit vectors of their segments.

        The cosine of a token with a question is the mean of those with its segments, which is its product with this vector.
        An empty question is zero.
        """
        parts, there = self.parts.to(ids.device), mask.any(-1)
        vectors = torch.zeros(*there.shape, parts["text_projection"].out_features, device=ids.device)
        if there.any():
            with torch.autocast(ids.device.type, enabled=False):
                states = parts["text_model"](input_ids=ids[there], attention_mask=mask[there]).pooler_output
                vectors[there] = F.normalize(parts["text_projection"](states), dim=-1, eps=MIN_NORM)
        return vectors.sum(1) / there.sum(1, keepdim=True).clamp_min(1)
