"""How long a prompt is: media become pixels and exactly as many placeholders as the model will fill."""

import copy
import functools
import itertools
import os
import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BatchFeature, LlavaNextVideoProcessor
from transformers.image_utils import is_pil_image, load_image, to_numpy_array
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.video_utils import make_batched_metadata

from .configuration_rediprune import AUTO_MAP, PruningConfig, ReDiPruneConfig
from .core_layout import check_pinpoints, check_pool_stride, image_grids, num_placeholders, video_grids
from .hub_files import code_in_place, make_portable, whole_files
from .inputs_chat import plain_messages, plain_text, plain_tools
from .inputs_download import MAX_BYTES, TIMEOUT, download, is_url
from .inputs_media import (
    check_mode,
    check_pixels,
    file_content,
    flat_images,
    flat_videos,
    is_empty,
    is_rescaled,
    read_image,
)
from .inputs_tokenizing import OneAtATime
from .inputs_video import frame_indices, read_video, stack_frames
from .inputs_words import content_words
from .vision_joint_space import question_segments

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of the three that `auto_map` names lists all that it rests on.
    from .hub_untrusted import CODE_KEYS  # noqa: F401
    from .methods_attention import CONTEXTUAL_SHARE  # noqa: F401
    from .methods_base import VisualTokens  # noqa: F401
    from .methods_baselines import Random  # noqa: F401
    from .methods_coverage import VISION_TEMPERATURE  # noqa: F401
    from .methods_distance import ReDiPrune  # noqa: F401
    from .methods_encoder import EvoPrune  # noqa: F401
    from .methods_registry import METHODS  # noqa: F401
    from .methods_relevance import SPENT  # noqa: F401
    from .ops_query import QUERY_WEIGHTINGS  # noqa: F401
    from .ops_relevance import RELEVANCES  # noqa: F401
    from .ops_selection import CANDIDATE_POOLS  # noqa: F401
    from .ops_tokens import MIN_NORM  # noqa: F401


TRANSFORMERS_4 = not hasattr(LlavaNextVideoProcessor, "_process_videos")


class ReDiPruneProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}, "common_kwargs": {"return_tensors": "pt"}}


class ReDiPruneProcessor(LlavaNextVideoProcessor):
    """
    [`LlavaNextVideoProcessor`] that writes one placeholder for each visual token that stays.

    Loaded from a repository it takes the pruning parameters from `config.json`, their only home; they are not saved with
    the processor.

    Threads can call one processor at the same time, each with its own arguments: a call keeps no state in it.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): the pruning block; the defaults when not given.
        spatial_pool_stride (`int`, defaults to 2): stride of the video pooling, as in the model's config.

    Attributes:
        download_timeout (`float`, 60): seconds that an image or a video by URL may take.
        download_max_bytes (`int`, 512 MiB): bytes that it may have.
    """

    tokenizer_class = "AutoTokenizer"  # 4.57 would take Llama's alone
    download_timeout = TIMEOUT
    download_max_bytes = MAX_BYTES

    def __init__(
        self,
        video_processor=None,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        video_token="<video>",
        image_token="<image>",
        num_additional_image_tokens=0,
        pruning=None,
        spatial_pool_stride=2,
        **kwargs,
    ):
        super().__init__(
            video_processor,
            image_processor,
            tokenizer,
            chat_template=chat_template,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            video_token=video_token,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.pruning = PruningConfig.from_value(pruning)
        check_pool_stride(spatial_pool_stride)
        self.spatial_pool_stride = spatial_pool_stride

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
        config = ReDiPruneConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs, **overrides)
        if TRANSFORMERS_4:
            # 4.57 has two image processors and would take the slow one, whose pixels differ from those of 5.x.
            kwargs.setdefault("use_fast", True)
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.pruning = config.pruning
        processor.spatial_pool_stride = config.spatial_pool_stride
        return processor

    @classmethod
    def _load_tokenizer_from_pretrained(cls, *args, **kwargs):
        # Without a config, AutoTokenizer of 5.x asks whether the code of the config may run: it is running already.
        kwargs.setdefault("config", ReDiPruneConfig())
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
            make_portable(folder, type(self).__name__, {"AutoProcessor": AUTO_MAP["AutoProcessor"]})
        return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files]

    def apply_chat_template(self, conversation, chat_template=None, tools=None, documents=None, **kwargs):
        """
        As in the stock class, and what somebody typed never becomes a placeholder: where a text of the conversation, of
        `tools` or of `documents` holds `<video>` or `<image>`, a zero width space (U+200B) follows its `<`, in the
        prompt and so in what the model reads. Media come from the parts of type `"video"` and `"image"` alone.
        """
        tokens = (self.image_token, self.video_token)
        conversation = plain_messages(conversation, tokens)
        if TRANSFORMERS_4 and kwargs.get("tokenize"):
            conversation = _contents_as_lists(conversation)
        tools, documents = plain_tools(tools, tokens), plain_text(documents, tokens)
        return super().apply_chat_template(conversation, chat_template, tools=tools, documents=documents, **kwargs)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        keep_ratio=None,
        download_timeout=None,
        download_max_bytes=None,
        **kwargs,
    ):
        """
        As in the stock class, and:

        Args:
            text: prompts in which every `<video>` and `<image>` is a placeholder, whoever wrote it;
                `apply_chat_template` is what tells them from typed text.
            images: PIL images, arrays, paths, http or https URLs or base64, each alone, in a list, or in one list for
                each prompt. Arrays are RGB of 0..255.
            videos: arrays, lists of frames, or videos as paths, http or https URLs, `bytes` or binary files, sampled as
                the video processor's config says (or `num_frames=`, `fps=`, `do_sample_frames=`); a clip with fewer
                frames gives all of them.
            keep_ratio (`float`, *optional*): keep ratio of this call, instead of the one of `config.json`. It is returned
                among the inputs, so that `model.generate(**inputs)` follows it.
            download_timeout (`float`, *optional*), download_max_bytes (`int`, *optional*): instead of the attributes.
                The limits hold for each URL with all its redirects; one to another scheme than http or https is refused.

        Returns:
            [`BatchFeature`]: the stock fields, `keep_ratio` (`float`) where it was given, and those of `question_inputs`.

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
        text = [text] if isinstance(text, str) else text
        # All that needs no medium is checked before one is read or downloaded.
        self.validate_inputs(images, text, videos)
        # A copy with its own pruning block, so that calls with different ratios cannot meet in shared state.
        caller = copy.copy(self)
        caller.pruning = self.pruning.with_keep_ratio(keep_ratio)
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
            videos, kwargs = self._sample_videos(videos, kwargs, fetch)
        outputs = caller._process(images, text, videos, kwargs)
        if keep_ratio is not None:
            outputs["keep_ratio"] = caller.pruning.keep_ratio
        if text is not None and not (images is None and videos is None):
            outputs.update(caller.question_inputs(text))
        return outputs

    def question_inputs(self, prompts: list) -> dict:
        """The questions of prompts in the forms that the pruning block asks for: `clip_inputs`, `word_inputs`, or nothing."""
        inputs = self.clip_inputs(prompts) if self.pruning.reads_clip else {}
        return {**inputs, **self.word_inputs(prompts)} if self.pruning.reads_words else inputs

    def clip_inputs(self, prompts: list) -> dict:
        """
        The questions of prompts for the text tower of the pruning block.

        Returns:
            `clip_input_ids` and `clip_attention_mask`, LongTensors (prompts, segments, tokens), see `question_segments`.
        """
        ids, mask = question_segments(self.pruning.text_tower, self._questions(prompts))
        return {"clip_input_ids": ids, "clip_attention_mask": mask}

    def word_inputs(self, prompts: list) -> dict:
        """
        The content words of the questions of prompts, tokenized by themselves.

        Returns:
            `word_input_ids`, LongTensor (prompts, tokens), with -1 after those of the shorter ones.
        """
        texts = [" ".join(content_words(question)) for question in self._questions(prompts)]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = torch.full((len(ids), max(map(len, ids))), -1)
        for row, tokens in zip(rows, ids):
            row[: len(tokens)] = torch.tensor(tokens)
        return {"word_input_ids": rows}

    def _questions(self, prompts: list) -> list:
        """Of each prompt what follows the last placeholder, without what the chat template adds to ask for an answer."""
        either_token = "|".join(map(re.escape, (self.image_token, self.video_token)))
        questions = [re.split(either_token, prompt)[-1].strip() for prompt in prompts]
        ending = self._generation_prompt()
        return [question.removesuffix(ending).strip() for question in questions]

    def _generation_prompt(self) -> str:
        """What the chat template puts after a question to ask for an answer, such as `"ASSISTANT:"`."""
        if not isinstance(self.chat_template, str):
            return ""
        chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        asked = self.apply_chat_template(chat, add_generation_prompt=True)
        return asked.removeprefix(self.apply_chat_template(chat, add_generation_prompt=False)).strip()

    def replace_image_token(self, image_inputs, image_idx, **kwargs) -> str:
        """The placeholders of one image."""
        tile_size = np.shape(image_inputs["pixel_values"][image_idx])[-1]
        image_size = [int(length) for length in image_inputs["image_sizes"][image_idx]]
        grids = image_grids(
            image_size, self.image_processor.image_grid_pinpoints, tile_size, tile_size // self.patch_size
        )
        return self.image_token * num_placeholders(grids, self.pruning, newlines=True)

    def replace_video_token(self, video_inputs, video_idx, **kwargs) -> str:
        """The placeholders of one video."""
        num_frames, *_, height, width = np.shape(video_inputs["pixel_values_videos"][video_idx])
        if height != width:
            raise ValueError(f"frames are {height}x{width} after preprocessing, but the vision tower takes squares.")
        side = height // self.patch_size
        grids = video_grids(num_frames, side, self.pruning.pooling, self.spatial_pool_stride)
        return self.video_token * num_placeholders(grids, self.pruning, newlines=False)

    def _get_num_multimodal_tokens(
        self, image_sizes=None, video_sizes=None, keep_ratio=None, **kwargs
    ) -> MultiModalData:
        """
        How many placeholders media of these sizes take: what serving engines ask before they see a medium.

        Args:
            image_sizes: (height, width) of each image.
            video_sizes: (sampled frames, height, width) of each video; frames are cropped to one size, so only the first
                counts.
            keep_ratio (`float`, *optional*): as in `__call__`.
        """
        pruning, numbers = self.pruning.with_keep_ratio(keep_ratio), {}
        if image_sizes is not None:
            tile_size = (kwargs.get("crop_size") or self.image_processor.crop_size)["height"]
            pinpoints, side = self.image_processor.image_grid_pinpoints, tile_size // self.patch_size
            grids = [image_grids(size, pinpoints, tile_size, side) for size in image_sizes]
            numbers["num_image_tokens"] = [num_placeholders(each, pruning, newlines=True) for each in grids]
            numbers["num_image_patches"] = [1] * len(grids)  # all views of an image are one entry of `pixel_values`
        if video_sizes is not None:
            side = self.video_processor.crop_size["height"] // self.patch_size
            grids = [video_grids(size[0], side, pruning.pooling, self.spatial_pool_stride) for size in video_sizes]
            numbers["num_video_tokens"] = [num_placeholders(each, pruning, newlines=False) for each in grids]
        return MultiModalData(**numbers)

    def _process(self, images, text, videos, kwargs) -> BatchFeature:
        if not TRANSFORMERS_4:
            return super().__call__(images=images, text=text, videos=videos, **kwargs)
        # transformers 4.57 sizes all videos of a call by the first one and has no hook for the count of one medium, so
        # here are the steps of 5.x.
        merged = self._merge_kwargs(
            ReDiPruneProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        image_inputs = {} if images is None else self.image_processor(images, **merged["images_kwargs"])
        video_inputs = {} if videos is None else self.video_processor(videos, **merged["videos_kwargs"])
        metadata = video_inputs.pop("video_metadata", None)
        text_inputs = {}
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        if text is not None:
            media = {
                self.image_token: (self.replace_image_token, image_inputs),
                self.video_token: (self.replace_video_token, video_inputs),
            }
            seen = {token: itertools.count() for token in media}

            def placeholders(match):
                replace, inputs = media[match.group()]
                return replace(inputs, next(seen[match.group()]))

            either_token = "|".join(map(re.escape, media))
            text = [re.sub(either_token, placeholders, sample) for sample in text]
            text_inputs = self.tokenizer(text, **merged["text_kwargs"])
            self._check_special_mm_tokens(text, text_inputs, modalities=["image", "video"])
        outputs = BatchFeature({**text_inputs, **image_inputs, **video_inputs}, tensor_type=return_tensors)
        if merged["videos_kwargs"].get("return_metadata"):
            outputs["video_metadata"] = metadata
        return outputs

    def _read_images(self, images, kwargs, fetch) -> list:
        """Every image as PIL or an array."""
        options = {**kwargs, **kwargs.get("images_kwargs", {})}
        if options.get("crop_size") is None:
            check_pinpoints(self.image_processor.image_grid_pinpoints, self.image_processor.crop_size["height"])
        rescaled = is_rescaled(self.image_processor, options)
        images, _ = flat_images(images)
        for index, image in enumerate(images):
            name = f"image {index}"
            if isinstance(image, str):
                images[index] = read_image(image, name, fetch)
            elif is_pil_image(image):
                check_mode(image, name)
            elif hasattr(image, "dtype"):
                check_pixels(image, "height, width", name, rescaled)
            else:
                raise ValueError(
                    f"{name} is of type {type(image).__name__}, but must be a PIL image, an array, or a string that is "
                    "a path, an http or https URL, or base64."
                )
        return images

    def _sample_videos(self, videos, kwargs, fetch):
        """Decoded and sampled frames of every video, and the arguments that then remain for the stock processor."""
        videos_kwargs = dict(kwargs.get("videos_kwargs", {}))
        rescaled = is_rescaled(self.video_processor, {**kwargs, **videos_kwargs})
        options = {}
        for key in ("num_frames", "fps", "do_sample_frames", "video_metadata"):
            flat, nested = kwargs.pop(key, None), videos_kwargs.pop(key, None)
            options[key] = nested if nested is not None else flat
        asked = options["num_frames"] is not None or options["fps"] is not None
        if options["do_sample_frames"] is None:
            options["do_sample_frames"] = asked or self.video_processor.do_sample_frames
        if not asked:
            options["num_frames"] = self.video_processor.num_frames
            options["fps"] = self.video_processor.fps if options["num_frames"] is None else None

        def choose(total, source_fps):
            if not options["do_sample_frames"]:
                return np.arange(total)
            return frame_indices(total, options["num_frames"], options["fps"], source_fps)

        videos, _ = flat_videos(videos)
        given = options["video_metadata"]
        metadata = [None] * len(videos) if given is None else make_batched_metadata(videos, given)
        for index, video in enumerate(videos):
            name = f"video {index}"
            videos[index], metadata[index] = _read_video(video, name, metadata[index], choose, fetch, rescaled)
        lengths = [len(video) for video in videos]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the videos of one call have {lengths} frames, but must all have the same number: sample them with "
                "num_frames=, or process them in separate calls."
            )
        options = {"do_sample_frames": False, "video_metadata": metadata}
        # 4.57 reads either `videos_kwargs` or the flat arguments, not both.
        if "videos_kwargs" in kwargs:
            options = {"videos_kwargs": {**videos_kwargs, **options}}
        return videos, {**kwargs, **options}

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """
        Refuses texts that are none, and texts that do not have one placeholder for each medium: in all, and each by
        itself where there is a list of media for each.
        """
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} was given nothing; pass text, images or videos.")
        if text is None:
            return
        if not (isinstance(text, (list, tuple)) and all(isinstance(sample, str) for sample in text)):
            raise ValueError(f"text must be a string or a list of strings, but is {text!r}")
        for row, sample in enumerate(text):
            _check_encodes(sample, row)
        for name, token, media, flat in (
            ("image", self.image_token, images, flat_images),
            ("video", self.video_token, videos, flat_videos),
        ):
            items, rows = ([], None) if is_empty(media) else flat(media)
            found = [sample.count(token) for sample in text]
            if sum(found) != len(items):
                raise ValueError(
                    f"the text has {sum(found)} {token} placeholders, but {len(items)} {name}s were passed; write one "
                    f"{token} for each {name}, where it belongs in the prompt, or in a chat a part of type {name!r}."
                )
            if rows is not None and len(text) > 1 and rows != found:
                raise ValueError(
                    f"the prompts have {found} {token} placeholders, but the lists hold {rows} {name}s; pass one list "
                    f"for each prompt with the {name}s of that prompt, or one flat list of all."
                )


def _check_encodes(text: str, row: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {row} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, which "
            'stands for no character; replace it, for example by text.encode("utf-8", "replace").decode().'
        ) from error


def _read_video(video, name: str, metadata, choose, fetch, rescaled: bool) -> tuple:
    """The chosen frames of a video of any form, as an array, and their metadata; `metadata` is what is known of it."""
    if isinstance(video, os.PathLike):
        video = os.fspath(video)
    if isinstance(video, str):
        return read_video(fetch(video), choose, repr(video)) if is_url(video) else read_video(video, choose)
    if hasattr(video, "read"):
        video = file_content(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return read_video(bytes(video), choose, name)
    if is_pil_image(video) or getattr(video, "ndim", 4) < 4:  # one frame
        video = [video]
    elif not isinstance(video, (list, tuple)) and not hasattr(video, "dtype"):
        raise ValueError(
            f"{name} is of type {type(video).__name__}, but must be a path, an http or https URL, bytes, a binary "
            "file, an array (frames, height, width, 3), or a list of frames."
        )
    if len(video) == 0:
        raise ValueError(f"{name} has no frames")
    kept = choose(len(video), metadata and metadata.fps)
    if isinstance(video, (list, tuple)):
        frames = [_frame(video[index], f"frame {index} of {name}", fetch) for index in kept]
        frames = stack_frames(frames, name)
    else:
        frames = to_numpy_array(video)[kept]  # 4.57 reads the channels of a tensor as the first dimension
    check_pixels(frames, "frames, height, width", name, rescaled)
    if metadata is None:
        (metadata,) = make_batched_metadata([frames], None)
        metadata.total_num_frames = len(video)
    metadata.frames_indices = [int(frame) for frame in kept]
    return frames, metadata


def _frame(frame, name: str, fetch) -> np.ndarray:
    if isinstance(frame, os.PathLike):
        frame = os.fspath(frame)
    if isinstance(frame, str):
        frame = read_image(frame, name, fetch)
    if is_pil_image(frame):
        check_mode(frame, name)
        return np.array(load_image(frame))
    return to_numpy_array(frame)


def _contents_as_lists(conversation):
    """Chats whose contents are lists of parts: 4.57 looks for media in every part, and in every letter of a string."""
    if isinstance(conversation, list):
        return [_contents_as_lists(item) for item in conversation]
    if not isinstance(conversation.get("content"), str):
        return conversation
    return {**conversation, "content": [{"type": "text", "text": conversation["content"]}]}


ReDiPruneProcessor.register_for_auto_class()  # so that saving copies this file and those that it imports
