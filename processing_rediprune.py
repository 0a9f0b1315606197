"""How long a prompt is: media become pixels and exactly as many placeholders as the model will fill."""

import copy
import itertools
import os
import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import BatchFeature, LlavaNextVideoProcessor
from transformers.image_utils import is_pil_image, load_image, make_flat_list_of_images, to_numpy_array
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.video_utils import make_batched_metadata, make_batched_videos

from .configuration_rediprune import AUTO_MAP, PruningConfig, ReDiPruneConfig
from .geometry_rediprune import image_grids, num_placeholders, video_grids
from .joint_space_rediprune import question_segments
from .portability_rediprune import code_in_place, make_portable, whole_files
from .video_rediprune import frame_indices, read_video
from .words_rediprune import content_words

if TYPE_CHECKING:
    # Imported by the files above. From a local folder, transformers 4.57 copies only the files that the file of the class
    # names itself, so each of the three that `auto_map` names lists all that it rests on.
    from .method_base_rediprune import Method  # noqa: F401
    from .method_cdpruner_rediprune import CDPruner  # noqa: F401
    from .method_controls_rediprune import Random  # noqa: F401
    from .method_coverage_rediprune import Scope  # noqa: F401
    from .method_divprune_rediprune import DivPrune  # noqa: F401
    from .method_evoprune_rediprune import EvoPrune  # noqa: F401
    from .method_prumerge_rediprune import PruMerge  # noqa: F401
    from .method_rediprune import ReDiPrune  # noqa: F401
    from .method_trim_rediprune import Trim  # noqa: F401
    from .method_visionzip_rediprune import VisionZip  # noqa: F401
    from .methods_rediprune import METHODS  # noqa: F401
    from .relevance_rediprune import RELEVANCES  # noqa: F401
    from .selection_rediprune import count_kept  # noqa: F401
    from .untrusted_rediprune import find_files  # noqa: F401


class ReDiPruneProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}, "common_kwargs": {"return_tensors": "pt"}}


class ReDiPruneProcessor(LlavaNextVideoProcessor):
    """
    [`LlavaNextVideoProcessor`] that writes one placeholder for each visual token that stays.

    Loaded from a repository it takes the pruning parameters from `config.json`, their only home; they are not saved with
    the processor.

    Args:
        pruning ([`PruningConfig`] or `dict`, *optional*): the pruning block; the defaults when not given.
        spatial_pool_stride (`int`, defaults to 2): stride of the video pooling, as in the model's config.
    """

    tokenizer_class = "AutoTokenizer"  # 4.57 would take Llama's alone

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
        if not hasattr(LlavaNextVideoProcessor, "_process_videos"):
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
        for key in ("pruning", "spatial_pool_stride"):
            output.pop(key, None)
        return output

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As in the stock class, but in files that transformers 4.57 and 5.x both read. Where one cannot be written, none is."""
        if push_to_hub:  # comes back here with a temporary folder
            self.push_to_hub(kwargs.pop("repo_id", None) or os.path.basename(os.path.abspath(save_directory)), **kwargs)
            kwargs = {}
        with whole_files(save_directory) as folder:
            with code_in_place(self, save_directory):
                files = super().save_pretrained(folder, **kwargs)
            make_portable(folder, type(self).__name__, {"AutoProcessor": AUTO_MAP["AutoProcessor"]})
        return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files]

    def __call__(self, images=None, text=None, videos=None, audio=None, keep_ratio=None, **kwargs):
        """
        As in the stock class, and:

        Args:
            videos: arrays, lists of frames, or paths and URLs of video files, sampled as the video processor's config says
                (or `num_frames=`, `fps=`, `do_sample_frames=`); a clip with fewer frames gives all of them.
            keep_ratio (`float`, *optional*): keep ratio of this call, instead of the one of `config.json`. It is returned
                among the inputs, so that `model.generate(**inputs)` follows it.

        Returns:
            [`BatchFeature`]: the stock fields, `keep_ratio` (`float`) where it was given, and those of `question_inputs`.

        Raises:
            FileNotFoundError: a video path that does not exist.
            OSError: the text tower cannot be reached.
            ValueError: placeholders and media differ in number; audio was given; a video cannot be decoded or is empty;
                the videos of one call have different numbers of frames.
        """
        # Harnesses pass an empty list for each modality that a sample lacks, under old names too.
        if not _is_empty(audio) or not _is_empty(kwargs.pop("audios", None)):
            raise ValueError(f"{type(self).__name__} takes images and videos, but audio was given; leave it out.")
        images = None if _is_empty(images) else self.image_processor.fetch_images(images)
        if not _is_empty(videos):
            videos, kwargs = self._sample_videos(videos, kwargs)
        else:
            videos = None
        text = [text] if isinstance(text, str) else text

        # A copy with its own pruning block, so that calls with different ratios cannot meet in shared state.
        caller = copy.copy(self)
        caller.pruning = self.pruning.with_keep_ratio(keep_ratio)
        outputs = caller._process(images, text, videos, kwargs)
        if keep_ratio is not None:
            outputs["keep_ratio"] = float(keep_ratio)
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

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, keep_ratio=None, **kwargs) -> MultiModalData:
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
        if hasattr(super(), "_process_videos"):
            return super().__call__(images=images, text=text, videos=videos, **kwargs)
        # transformers 4.57 sizes all videos of a call by the first one and has no hook for the count of one medium, so
        # here are the steps of 5.x.
        self.validate_inputs(images, text, videos)
        merged = self._merge_kwargs(ReDiPruneProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
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

    def _sample_videos(self, videos, kwargs):
        """Decoded and sampled frames of every video, and the arguments that then remain for the stock processor."""
        videos_kwargs = dict(kwargs.get("videos_kwargs", {}))
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

        videos = make_batched_videos(_plain_lists(videos))
        metadata = make_batched_metadata(videos, options["video_metadata"])

        def choose(total, source_fps):
            if not options["do_sample_frames"]:
                return np.arange(total)
            return frame_indices(total, options["num_frames"], options["fps"], source_fps)

        for index, video in enumerate(videos):
            if isinstance(video, str):
                videos[index], metadata[index] = read_video(video, choose)
                continue
            if isinstance(video, list):  # paths of frames
                video = np.stack([np.array(load_image(frame)) for frame in video])
            if len(video) == 0:
                raise ValueError(f"video {index} has no frames")
            kept = choose(len(video), metadata[index].fps)
            videos[index] = to_numpy_array(video)[kept]  # 4.57 reads the channels of a tensor as the first dimension
            metadata[index].frames_indices = [int(frame) for frame in kept]
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
        """Refuses a text that does not have one placeholder for each medium."""
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} was given nothing; pass text, images or videos.")
        if text is None:
            return
        if not (isinstance(text, (list, tuple)) and all(isinstance(sample, str) for sample in text)):
            raise ValueError(f"text must be a string or a list of strings, but is {text!r}")
        media = (
            ("image", self.image_token, [] if images is None else make_flat_list_of_images(images)),
            ("video", self.video_token, [] if videos is None else videos),
        )
        for name, token, items in media:
            found = sum(sample.count(token) for sample in text)
            if found != len(items):
                raise ValueError(
                    f"the text has {found} {token} placeholders, but {len(items)} {name}s were passed; write one {token} "
                    f"for each {name}, where it belongs in the prompt."
                )


def _is_empty(media) -> bool:
    """Whether nothing was passed: `None`, or lists of nothing."""
    return media is None or isinstance(media, (list, tuple)) and all(_is_empty(item) for item in media)


def _plain_lists(videos):
    """`videos` with paths as strings, PIL frames as RGB arrays, and lists in place of tuples and of batched arrays."""
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, (list, tuple)):
        return [_plain_lists(video) for video in videos]
    if is_pil_image(videos):
        return np.array(load_image(videos))
    return list(videos) if getattr(videos, "ndim", 0) == 5 else videos


ReDiPruneProcessor.register_for_auto_class()  # so that saving copies this file and those that it imports
