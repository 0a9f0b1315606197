"""Prompts: media become pixels and as many placeholders as tokens stay, and the question travels with each medium."""

import hashlib
import os
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from .checks import POSITIONS
from .repository import class_of, part_of, plain_config

BUDGET = ("keep_ratio", "keep_tokens")
OPTIONS = (*BUDGET, "num_frames", "fps", "do_sample_frames")  # of a request, in `mm_processor_kwargs`
QUESTION = "question_of_prompt"  # among them, set here alone: the token ids of the question


class Info(BaseProcessingInfo):
    """The variant, as vLLM asks about it."""

    def __init__(self, ctx):
        super().__init__(ctx)
        self.check_options(ctx.get_mm_config().mm_processor_kwargs or {})

    @cached_property
    def processor(self):
        """The processor of the variant, with the pruning block of the engine, which `--hf-overrides` may have changed."""
        model_config = self.ctx.model_config
        processor_class = class_of(model_config, "AutoProcessor")
        processor = processor_class.from_pretrained(model_config.model, revision=model_config.revision)
        processor.set_pruning(self.config.pruning.to_dict())
        return processor

    @cached_property
    def model_class(self):
        """The model class of the variant."""
        return class_of(self.ctx.model_config, "AutoModelForImageTextToText")

    @cached_property
    def config(self):
        """The config of the variant, with the token ids of its placeholders."""
        return plain_config(self.model_class, self.ctx.model_config.hf_config)

    @property
    def kinds(self) -> tuple:
        """Of media."""
        return self.processor.layout_class.kinds

    def token_id(self, kind: str) -> int:
        """Of the placeholder of a kind of media."""
        return getattr(self.config, f"{kind}_token_id")

    def check_options(self, options) -> dict:
        """
        Options of the engine or of a request.

        Raises:
            ValueError: another one than those of `OPTIONS`. With more a request could choose the size of pictures.
        """
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"mm_processor_kwargs has {', '.join(map(repr, unknown))}, but takes {', '.join(OPTIONS)} alone; all else is set "
                "in the files of the variant."
            )
        return dict(options)

    def get_supported_mm_limits(self):
        return dict.fromkeys(self.kinds)

    def get_data_parser(self):
        return Parser(expected_hidden_size=None, allow_missing_mm_embeddings=False)


class Parser(MultiModalDataParser):
    """Media as vLLM hands them on; videos as files (bytes, or uint8 of one dimension), arrays or lists of frames."""

    def _parse_video_data(self, data):
        if data is None:
            return None
        if isinstance(data, (str, os.PathLike)):  # whose content could change while vLLM knows it by its name
            raise ValueError(
                f"the video is {str(data)!r}, but must be the content of a file, or frames; read it first."
            )
        is_frame = lambda value: hasattr(value, "getbands") or getattr(value, "ndim", 0) == 3  # noqa: E731
        is_one = (
            isinstance(data, (bytes, tuple)) or getattr(data, "ndim", 0) in (1, 4) or len(data) and is_frame(data[0])
        )
        return VideoProcessorItems([data] if is_one else list(data))


class DummyInputs(BaseDummyInputsBuilder[Info]):
    """The media that need most memory, for vLLM to measure before it serves."""

    def get_dummy_text(self, mm_counts) -> str:
        placeholders = self.info.processor.placeholders
        return "".join(placeholders[kind] * number for kind, number in mm_counts.items())

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options) -> dict:
        processor = self.info.processor
        side = self.info.config.vision_config.image_size
        pinpoints = getattr(self.info.config, "image_grid_pinpoints", None) or [(side, side)]
        height, width = max(pinpoints, key=lambda size: size[0] * size[1])
        data = {}
        if mm_counts.get("image"):
            data["image"] = self._get_dummy_images(
                width=width, height=height, num_images=mm_counts["image"], overrides=mm_options.get("image")
            )
        if mm_counts.get("video"):
            number = (self.info.ctx.get_mm_config().mm_processor_kwargs or {}).get("num_frames")
            number = number or processor.video_processor.num_frames or 32
            data["video"] = self._get_dummy_videos(
                width=side,
                height=side,
                num_frames=number,
                num_videos=mm_counts["video"],
                overrides=mm_options.get("video"),
            )
        return data


class Processor(BaseMultiModalProcessor[Info]):
    """The processor of the variant, one medium after the other; the question is the text after the last of them."""

    def get_dummy_inputs(self, seq_len, mm_counts, mm_options):
        """Media unpruned where a prompt can hold them, since a request may ask for that: vLLM makes room for what it sees here."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        options = {"keep_ratio": 1.0}
        numbers = [
            int(self._process(kind, medium, options)["num_tokens"])
            for kind, items in inputs.mm_data_items.items()
            for medium in items.get_all()
        ]
        fits = sum(numbers) <= self.info.ctx.model_config.max_model_len
        return replace(inputs, hf_processor_mm_kwargs=options) if fits else inputs

    def apply(self, inputs, timing_ctx):
        """
        As in vLLM.

        Raises:
            ValueError: placeholders and media differ in number, or the prompt is too long before pruning.
        """
        counts = inputs.mm_data_items.get_all_counts()
        ids = {kind: self.info.token_id(kind) for kind in self.info.kinds}
        for kind, token_id in ids.items():
            found, given = inputs.prompt.count(token_id), counts.get(kind, 0)
            if found != given:
                token = self.info.processor.placeholders[kind]
                raise ValueError(
                    f"the prompt has {found} {token} placeholders, but {given} {kind}s were passed; write one {token} for each "
                    f"{kind}. In a chat, a placeholder stands for itself where it is a part of type {kind!r}."
                )
        is_medium = np.isin(inputs.prompt, list(ids.values()))
        question = inputs.prompt[int(is_medium.nonzero()[0][-1]) + 1 :] if is_medium.any() else []
        options = self.info.check_options(self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs))
        # Names that clients give to their media could be given twice: media are told apart by their content.
        inputs = replace(inputs, hf_processor_mm_kwargs={**options, QUESTION: question}, mm_uuid_items=None)
        outputs = super().apply(inputs, timing_ctx)
        self._check_length(outputs)
        return outputs

    def _check_length(self, outputs) -> None:
        """Refuses a prompt whose unpruned length is out of range, where tokens keep the positions that they had there."""
        if self.info.config.pruning.resolved("positions") != "original":
            return
        total = len(outputs["prompt_token_ids"])
        for kind, items in outputs["mm_kwargs"].items():
            for item in items:
                if item is not None:  # of an item that the engine has already there is no more than its name
                    total += int(item[f"{kind}_num_unpruned"].data) - int(item[f"{kind}_num_tokens"].data)
        if total > POSITIONS:
            raise ValueError(
                f"the prompt has {total} tokens before pruning, but may have {POSITIONS}; send fewer or shorter media."
            )
        positions = part_of(self.info.model_class, "core_positions")
        positions.warn_beyond_context(self.info.config.text_config, torch.tensor([[0, total - 1]]))

    def _apply_hf_processor_main(self, mm_items, hf_kwargs) -> BatchFeature:
        options = dict(hf_kwargs)
        question = options.pop(QUESTION)
        fields = {}
        for kind, items in mm_items.items():
            for medium in items.get_all():
                item = {**self._process(kind, medium, options), **self._read(question)}
                for name, value in item.items():
                    fields.setdefault(f"{kind}_{name}", []).append(value)
        return BatchFeature(fields)

    def _process(self, kind: str, medium, options: dict) -> dict:
        """
        The fields of one medium that do not depend on the question.

        Raises:
            ValueError: those of the variant's processor; pixels that are not finite, or not of the tower's size.
        """
        processor = self.info.processor
        if isinstance(medium, tuple):  # frames, and what vLLM knows of them
            medium = medium[0]
        if kind == "video" and getattr(medium, "ndim", 0) == 1:
            medium = medium.tobytes()
        token = processor.placeholders[kind]
        budget = {name: options[name] for name in BUDGET if name in options}
        frames = {name: value for name, value in options.items() if name not in BUDGET and kind == "video"}
        inputs = processor(text=[token], **{f"{kind}s": [medium]}, **budget, **frames)
        if kind == "video":
            pixels = inputs["pixel_values_videos"][0]
        else:
            pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))[
                0
            ]  # the second is Video-LLaVA's name
        part_of(self.info.model_class, "core_items").check_pixels({kind: pixels[None]})
        side = self.info.config.vision_config.image_size
        if tuple(pixels.shape[-2:]) != (side, side):
            raise ValueError(
                f"a {kind} has {pixels.shape[-2]}x{pixels.shape[-1]} pixels after preprocessing, but the vision tower takes "
                f"{side}x{side}; set crop_size in the preprocessor's config to that of the checkpoint."
            )
        pruning = processor.pruning.with_budget(**budget)
        size = [int(length) for length in inputs["image_sizes"][0]] if "image_sizes" in inputs else None
        frame = processor._frame_size(side)
        layouts = processor.layout_class
        layout = layouts.video(frame, len(pixels), pruning) if kind == "video" else layouts.image(frame, size)
        return {
            "pixels": pixels.to(self.info.ctx.model_config.dtype),
            "image_size": torch.tensor(size or [0, 0]),
            "media_key": torch.tensor(list(_digest(pixels))),
            "keep_ratio": torch.tensor(pruning.keep_ratio or 0.0, dtype=torch.float64),
            "keep_tokens": torch.tensor(pruning.keep_tokens or 0),
            "num_tokens": torch.tensor(layout.num_placeholders(pruning)),
            "num_unpruned": torch.tensor(layout.num_unpruned),
        }

    def _read(self, question: list) -> dict:
        """The fields of one medium that are the question: its token ids, and what the pruning block reads it with beside."""
        text = self.info.get_tokenizer().decode(question, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        read = self.info.processor.question_inputs([text])
        nothing = torch.zeros(1, 0, dtype=torch.long)
        return {
            "question": torch.tensor(question, dtype=torch.long),
            "words": read.get("word_input_ids", nothing)[0],
            "clip_ids": read.get("clip_input_ids", nothing)[0],
            "clip_mask": read.get("clip_attention_mask", nothing)[0],
        }

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        kinds = [(name, kind) for name in hf_inputs for kind in self.info.kinds if name.startswith(f"{kind}_")]
        return {
            name: MultiModalFieldConfig.batched(kind, keep_on_cpu=not name.endswith("_pixels")) for name, kind in kinds
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        def placeholders(kind):
            token_id = self.info.token_id(kind)
            return lambda index: [token_id] * int(out_mm_kwargs[kind][index][f"{kind}_num_tokens"].data)

        return [
            PromptReplacement(modality=kind, target=[self.info.token_id(kind)], replacement=placeholders(kind))
            for kind in mm_items
        ]


def _digest(pixels: torch.Tensor) -> bytes:
    """What the tower is shown, in 32 bytes."""
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=32).digest()
