"""What every processor does: media become pixels and exactly as many placeholders as the model will fill."""

import copy
import functools
import itertools
import os
import re

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from .configuration_rediprune import PruningConfig
from .core_layout import FrameSize, are_tiled, check_pinpoints
from .hub_files import code_in_place, make_portable, whole_files
from .hub_versions import TRANSFORMERS_4
from .inputs_chat import contents_as_lists, plain_messages, plain_text, plain_tools
from .inputs_download import MAX_BYTES, TIMEOUT, download
from .inputs_media import flat_images, is_empty
from .inputs_questions import QuestionInputsMixin
from .inputs_reading import check_lengths, check_prompts, check_text, read_images, sample_videos
from .inputs_tokenizing import OneAtATime
from .inputs_video import frame_indices


class PrunedProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}, "common_kwargs": {"return_tensors": "pt"}}


def side_of_pictures(part, crop_size=None) -> int:
    """Pixels on the side of the squares that an image or video processor makes, or that it would with another `crop_size`."""
    return (crop_size or getattr(part, "crop_size", None) or part.size)["height"]


class PrunedProcessorMixin(QuestionInputsMixin):
    """
    For processor classes, before the stock class: one placeholder for each visual token that stays.

    Loaded from a repository it takes the pruning parameters from `config.json`, their only home; they are not saved with
    the processor.

    Threads can call one processor at the same time, each with its own arguments: a call keeps no state in it.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): the pruning block; the defaults when not given.

    Attributes:
        config_class: the config whose pruning block it takes.
        layout_class: the arithmetic that it shares with its model, such as `LlavaLayouts`.
        download_timeout (`float`, 60): seconds that an image or a video by URL may take.
        download_max_bytes (`int`, 512 MiB): bytes that it may have.
    """

    config_class = layout_class = None
    tokenizer_class = "AutoTokenizer"  # 4.57 would take Llama's alone
    frame_indices, check_lengths = staticmethod(frame_indices), staticmethod(check_lengths)  # of videos
    processing_kwargs = PrunedProcessorKwargs  # of 4.57
    download_timeout = TIMEOUT
    download_max_bytes = MAX_BYTES

    def set_pruning(self, pruning) -> None:
        pruning = PruningConfig.from_value(pruning)
        self.config_class.check_method(pruning)
        self.pruning = pruning

    @property
    def placeholders(self) -> dict:
        """For each kind of media its token."""
        return {kind: getattr(self, f"{kind}_token") for kind in self.layout_class.kinds}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, pruning=None, **kwargs):
        """
        As in the stock class; `pruning={...}` is merged over the block of the repository's `config.json`.

        Raises:
            OSError: no `config.json` beside the processor's files.
        """
        hub_keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if key in kwargs}
        overrides = {} if pruning is None else {"pruning": pruning}
        config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs, **overrides)
        if TRANSFORMERS_4:
            # 4.57 has two image processors and would take the slow one, whose pixels differ from those of 5.x.
            kwargs.setdefault("use_fast", True)
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.pruning = config.pruning
        processor.take_sizes(config)
        return processor

    def take_sizes(self, config) -> None:
        """Takes from the model's config what it says about the numbers of visual tokens."""
        if hasattr(config, "spatial_pool_stride"):
            self.spatial_pool_stride = config.spatial_pool_stride

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args, **kwargs):
        # Without a config, AutoTokenizer of 5.x asks whether the code of the config may run: it is running already.
        kwargs.setdefault("config", cls.config_class())
        return super()._load_tokenizer_from_pretrained(*args, **kwargs)

    def to_dict(self, *args, **kwargs):
        output = super().to_dict(*args, **kwargs)
        for key in ("pruning", "spatial_pool_stride", "download_timeout", "download_max_bytes"):
            output.pop(key, None)
        return output

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As in the stock class, but in files that both transformers lines read. Where one cannot be written, none is."""
        if push_to_hub:  # comes back here with a temporary folder
            self.push_to_hub(kwargs.pop("repo_id", None) or os.path.basename(os.path.abspath(save_directory)), **kwargs)
            kwargs = {}
        with whole_files(save_directory) as folder:
            with code_in_place(self, save_directory):
                files = super().save_pretrained(folder, **kwargs)
            make_portable(folder, type(self).__name__, {"AutoProcessor": f"processing_rediprune.{type(self).__name__}"})
        return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files]

    def apply_chat_template(self, conversation, chat_template=None, tools=None, documents=None, **kwargs):
        """
        As in the stock class, and what somebody typed never becomes a placeholder: where a text of the conversation, of
        `tools` or of `documents` holds `<video>` or `<image>`, a zero width space (U+200B) follows its `<`, in the
        prompt and so in what the model reads. Media come from the parts of type `"video"` and `"image"` alone. The sound
        of a video is not heard: `load_audio_from_video`, with which `transformers serve` asks for it, does nothing.
        """
        kwargs.pop("load_audio_from_video", None)
        tokens = tuple(self.placeholders.values())
        conversation = plain_messages(conversation, tokens)
        if TRANSFORMERS_4 and kwargs.get("tokenize"):
            conversation = contents_as_lists(conversation)
        tools, documents = plain_tools(tools, tokens), plain_text(documents, tokens)
        return super().apply_chat_template(conversation, chat_template, tools=tools, documents=documents, **kwargs)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        keep_ratio=None,
        keep_tokens=None,
        encoded_media=None,
        download_timeout=None,
        download_max_bytes=None,
        **kwargs,
    ):
        """
        As in the stock class, and:

        Args:
            text: prompts in which every `<video>` and `<image>` is a placeholder, whoever wrote it;
                `apply_chat_template` is what tells them from typed text.
            images: PIL images, arrays, paths, http, https or data URLs or base64, each alone, in a list, or in one list
                for each prompt. Arrays are RGB of 0..255.
            videos: arrays, lists of frames, or videos as paths, http, https or data URLs, `bytes` or binary files,
                sampled as the video processor's config says (or `num_frames=`, `fps=`, `do_sample_frames=`); a clip with
                fewer frames gives all of them.
            keep_ratio (`float`, *optional*) or keep_tokens (`int`, *optional*): budget of this call, instead of the one of
                `config.json`. It is returned among the inputs, so that `model.generate(**inputs)` follows it.
            encoded_media ([`EncodedMedia`], *optional*): what `model.encode_media` returned for the media of the prompts,
                instead of the media: for `model.generate(**inputs, encoded_media=encoded_media)`.
            download_timeout (`float`, *optional*), download_max_bytes (`int`, *optional*): instead of the attributes.
                The limits hold for each URL with all its redirects; one to another scheme than http or https is refused.
                What data URLs and base64 stand for is limited, too.

        Returns:
            [`BatchFeature`]: the stock fields, `keep_ratio` (`float`) or `keep_tokens` (`int`) where it was given, and those of `question_inputs`.

        Raises:
            FileNotFoundError: a video path that does not exist.
            OSError: the text tower or a URL cannot be reached; a `TimeoutError` where the time was not enough.
            ValueError: placeholders and media differ in number, or, in lists for each prompt, do so for one of them;
                audio was given; a medium cannot be decoded, is empty, or is no 8-bit RGB; a URL is of another scheme,
                or too large; the videos of one call have different numbers of frames; a text cannot be encoded.
        """
        # Harnesses pass an empty list for each modality that a sample lacks, under old names too.
        if not is_empty(audio) or not is_empty(kwargs.pop("audios", None)):
            raise ValueError(f"{type(self).__name__} takes images and videos, but audio was given; leave it out.")
        for kind, media in (("image", images), ("video", videos)):
            if not is_empty(media) and kind not in self.layout_class.kinds:
                raise ValueError(f"{type(self).__name__} takes no {kind}s, but some were given; leave them out.")
        text = [text] if isinstance(text, str) else text
        # All that needs no medium is checked before one is read or downloaded.
        if encoded_media is None:
            self.validate_inputs(images, text, videos)
        elif not (is_empty(images) and is_empty(videos)):
            raise ValueError("encoded_media and images or videos were given; pass one of them.")
        # A copy with its own pruning block, so that calls with different ratios cannot meet in shared state.
        caller = copy.copy(self)
        caller.pruning = self.pruning.with_budget(keep_ratio, keep_tokens)
        caller.tokenizer = OneAtATime(self.tokenizer)
        fetch = functools.partial(
            download,
            timeout=self.download_timeout if download_timeout is None else download_timeout,
            max_bytes=self.download_max_bytes if download_max_bytes is None else download_max_bytes,
        )
        images = None if is_empty(images) else self._read_images(images, kwargs, fetch)
        if is_empty(videos):
            videos = None
        else:
            videos, kwargs = sample_videos(videos, self.video_processor, kwargs, fetch, self.frame_indices)
            self.check_lengths(videos)
        if encoded_media is None:
            outputs = caller._process(images, text, videos, kwargs)
        else:
            outputs = caller._process_encoded(text, encoded_media, kwargs)
        if caller.pruning is not self.pruning:
            name = "keep_ratio" if keep_tokens is None else "keep_tokens"
            outputs[name] = getattr(caller.pruning, name)
        if text is not None and not (images is None and videos is None and encoded_media is None):
            outputs.update(caller.question_inputs(text))
        return outputs

    def _frame_size(self, pixels: int) -> FrameSize:
        """Of pictures whose side has so many pixels after preprocessing."""
        pinpoints = getattr(self.image_processor, "image_grid_pinpoints", None)
        stride = getattr(self, "spatial_pool_stride", None)
        return FrameSize(pixels, pixels // self.patch_size, pinpoints, stride)

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        """The placeholders of one image."""
        pixels = image_inputs.get("pixel_values", image_inputs.get("pixel_values_images"))  # 4.57's name in Video-LLaVA
        sizes, numbers = image_inputs.get("image_sizes"), image_inputs.get("batch_num_images")
        size = None if sizes is None else [int(length) for length in sizes[image_idx]]
        if numbers is not None and not are_tiled(numbers)[image_idx]:
            size = (0, 0)
        height, width = np.shape(pixels[image_idx])[-2:]
        if height != width:
            raise ValueError(f"images are {height}x{width} after preprocessing, but the vision tower takes squares.")
        layout = self.layout_class.image(self._frame_size(width), size)
        return self.image_token * layout.num_placeholders(self.pruning)

    def replace_video_token(self, video_inputs, video_idx, **kwargs) -> str:
        """The placeholders of one video."""
        num_frames, *_, height, width = np.shape(video_inputs["pixel_values_videos"][video_idx])
        if height != width:
            raise ValueError(f"frames are {height}x{width} after preprocessing, but the vision tower takes squares.")
        layout = self.layout_class.video(self._frame_size(width), num_frames, self.pruning)
        return self.video_token * layout.num_placeholders(self.pruning)

    def _get_num_multimodal_tokens(
        self, image_sizes=None, video_sizes=None, keep_ratio=None, keep_tokens=None, **kwargs
    ) -> MultiModalData:
        """
        How many placeholders media of these sizes take: what serving engines ask before they see a medium.

        Args:
            image_sizes: (height, width) of each image.
            video_sizes: (sampled frames, height, width) of each video; frames are cropped to one size, so only the first
                counts.
            keep_ratio (`float`, *optional*), keep_tokens (`int`, *optional*): as in `__call__`.
        """
        pruning, numbers = self.pruning.with_budget(keep_ratio, keep_tokens), {}
        if image_sizes is not None:
            frame = self._frame_size(side_of_pictures(self.image_processor, kwargs.get("crop_size")))
            layouts = [self.layout_class.image(frame, size) for size in image_sizes]
            numbers["num_image_tokens"] = [layout.num_placeholders(pruning) for layout in layouts]
            numbers["num_image_patches"] = [1] * len(layouts)  # all views of an image are one entry of `pixel_values`
        if video_sizes is not None:
            frame = self._frame_size(side_of_pictures(self.video_processor))
            layouts = [self.layout_class.video(frame, size[0], pruning) for size in video_sizes]
            numbers["num_video_tokens"] = [layout.num_placeholders(pruning) for layout in layouts]
        return MultiModalData(**numbers)

    def _read_images(self, images, kwargs, fetch) -> list:
        options = {**kwargs, **kwargs.get("images_kwargs", {})}
        if hasattr(self.image_processor, "image_grid_pinpoints") and options.get("crop_size") is None:
            check_pinpoints(self.image_processor.image_grid_pinpoints, side_of_pictures(self.image_processor))
        flat = read_images(images, self.image_processor, kwargs, fetch)
        numbers = flat_images(images)[1] if "batch_num_images" in self.image_processor.model_input_names else None
        if numbers is None:
            return flat
        # In lists as they were given: one that is alone in its list is tiled. 4.57 cannot read an empty list.
        images = iter(flat)
        rows = [list(itertools.islice(images, number)) for number in numbers]
        return [row for row in rows if row] if TRANSFORMERS_4 else rows

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Refuses texts that do not have one placeholder for each medium; see `check_prompts`."""
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} was given nothing; pass text, images or videos.")
        if text is not None:
            media = {"image": images, "video": videos}
            check_prompts(text, {kind: (token, media[kind]) for kind, token in self.placeholders.items()})

    def _process_encoded(self, text, encoded_media, kwargs) -> BatchFeature:
        """The text inputs of prompts about encoded media."""
        check_text(text)
        layouts = {
            token: [layout for layout in encoded_media.layouts if layout.kind == kind]
            for kind, token in self.placeholders.items()
        }
        for token, of_kind in layouts.items():
            found = [sample.count(token) for sample in text]
            if sum(found) != len(of_kind):
                raise ValueError(
                    f"the text has {sum(found)} {token} placeholders (by prompt: {found}), but encoded_media hold {len(of_kind)}; "
                    "encode exactly the media of these prompts, or choose them with encoded_media.take(images=[...], videos=[...])."
                )
        waiting = {token: iter(of_kind) for token, of_kind in layouts.items()}

        def placeholders(match):
            token = match.group()
            return token * next(waiting[token]).num_placeholders(self.pruning)

        either_token = "|".join(map(re.escape, layouts))
        text = [re.sub(either_token, placeholders, sample) for sample in text]
        merged = self._merge_kwargs(PrunedProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        text_inputs = self.tokenizer(text, **merged["text_kwargs"])
        self._check_special_mm_tokens(text, text_inputs, modalities=list(self.placeholders))
        return BatchFeature(text_inputs, tensor_type=return_tensors)

    def about_videos(self, metadata: list) -> dict:
        """Of 4.57: what the model is told of sampled videos, from the `VideoMetadata` of each, beside their pixels."""
        return {}

    def written(self, kind: str) -> str:
        """Of 4.57: a regular expression for what the placeholders of a medium take the place of."""
        return re.escape(self.placeholders[kind])

    def _process(self, images, text, videos, kwargs) -> BatchFeature:
        if not TRANSFORMERS_4:
            # Some stock classes return lists by default, and some of them mix both.
            given = (kwargs, *(options for options in kwargs.values() if isinstance(options, dict)))
            if not any("return_tensors" in options for options in given):
                kwargs = {**kwargs, "return_tensors": "pt"}
            return super().__call__(images=images, text=text, videos=videos, **kwargs)
        # transformers 4.57 sizes all videos of a call by the first one and has no hook for the count of one medium, so
        # here are the steps of 5.x.
        merged = self._merge_kwargs(self.processing_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        image_inputs = {} if images is None else self.image_processor(images, **merged["images_kwargs"])
        given, text_inputs, video_inputs = merged["videos_kwargs"].get("video_metadata"), {}, {}
        if videos is not None:
            video_inputs = {**self.video_processor(videos, **merged["videos_kwargs"]), **self.about_videos(given)}
        metadata = video_inputs.pop("video_metadata", None)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        merged["text_kwargs"].pop("return_mm_token_type_ids", None)  # which tell what the ids of the tokens tell
        if text is not None:
            of_kind = {
                "image": (self.replace_image_token, image_inputs),
                "video": (self.replace_video_token, {**video_inputs, "video_metadata": given}),
            }
            seen = {kind: itertools.count() for kind in self.placeholders}

            def placeholders(match):
                replace, inputs = of_kind[match.lastgroup]
                return replace(inputs, next(seen[match.lastgroup]))

            either = "|".join(f"(?P<{kind}>{self.written(kind)})" for kind in self.placeholders)
            text = [re.sub(either, placeholders, sample) for sample in text]
            text_inputs = self.tokenizer(text, **merged["text_kwargs"])
            self._check_special_mm_tokens(text, text_inputs, modalities=list(self.placeholders))
        outputs = BatchFeature({**text_inputs, **image_inputs, **video_inputs}, tensor_type=return_tensors)
        if merged["videos_kwargs"].get("return_metadata"):
            outputs["video_metadata"] = metadata
        return outputs
