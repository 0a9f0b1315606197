"""Every backbone as a small random model beside its stock class: one list for all checks (`tests/model/test_families.py`)."""

import inspect
import json
import re
from dataclasses import dataclass

import torch
import transformers
from rediprune import configuration_rediprune as configuration
from rediprune import modeling_rediprune_llava, modeling_rediprune_qwen
from rediprune import processing_rediprune as processing
from safetensors.torch import save_file
from tiny import (
    CHAT_TEMPLATE,
    IMAGE_SIZE,
    PATCH_SIZE,
    PATCHES,
    PINPOINTS,
    TEXT_SIZES,
    public_name,
    random_image,
    random_video,
    tiny_config,
    tiny_tokenizer,
)

FRAMES = 4


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        name: the stock `model_type`.
        kinds: the media that it takes.
    """

    has_mrope = has_timestamps = False

    name: str
    kinds: tuple

    @property
    def config_class(self):
        return configuration.CONFIGS[self.name]

    @property
    def model_class(self):
        name = self.config_class.model_class
        return next(
            getattr(module, name)
            for module in (modeling_rediprune_llava, modeling_rediprune_qwen)
            if hasattr(module, name)
        )

    @property
    def processor_class(self):
        return getattr(processing, self.config_class.processor_class)

    @property
    def stock_config_class(self):
        return next(cls for cls in self.config_class.__mro__ if cls.__module__.startswith("transformers."))

    @property
    def stock_model_class(self):
        return next(cls for cls in self.model_class.__mro__ if cls.__module__.startswith("transformers."))

    @property
    def stock_processor_class(self):
        return next(cls for cls in self.processor_class.__mro__ if cls.__module__.startswith("transformers."))

    @property
    def tiles_images(self):
        return "next" in self.name or self.lists_images

    @property
    def lists_images(self):
        """Whether images are given in lists, one for each prompt, since it counts how many are in one."""
        return self.name == "llava_onevision"

    @property
    def image_processor_class(self):
        if self.lists_images:
            return transformers.LlavaOnevisionImageProcessor
        if "next" in self.name:
            return transformers.LlavaNextImageProcessor
        return transformers.VideoLlavaImageProcessor if self.name == "video_llava" else transformers.CLIPImageProcessor

    @property
    def video_processor_class(self):
        if self.name == "video_llava":
            return transformers.VideoLlavaVideoProcessor
        if self.name == "llava_onevision":
            return transformers.LlavaOnevisionVideoProcessor
        return transformers.LlavaNextVideoVideoProcessor

    # -- builders

    def config(self, cls=None, **kwargs):
        return tiny_config(cls or self.config_class, **kwargs)

    def model(self, seed=0, **pruning):
        """A random model with weights large enough that its tokens differ and its logits are not flat."""
        torch.manual_seed(seed)
        model = self.model_class(self.config(pruning=pruning)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        return model

    def stock_twin(self, model):
        """The stock class with the same weights."""
        twin = self.stock_model_class(self.config(self.stock_config_class)).eval()
        twin.load_state_dict(model.state_dict())
        twin.generation_config = model.generation_config
        return twin

    def processor(self, cls=None, **pruning):
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        parts = {"tokenizer": tiny_tokenizer(), "image_processor": self._image_processor(size)}
        if "video" in self.kinds:
            parts["video_processor"] = self._video_processor(size)
        options = {"pruning": pruning} if cls is None else {}
        if self.name == "llava_onevision":
            options |= {"num_image_tokens": PATCHES, "vision_feature_select_strategy": "full"}
            options |= {"vision_aspect_ratio": self.config().vision_aspect_ratio}
        else:
            options |= {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": "default"}
            options |= {"num_additional_image_tokens": 1}
        return (cls or self.processor_class)(**parts, chat_template=CHAT_TEMPLATE, **options)

    def stock_processor(self):
        """The stock class around the same parts; 4.57 takes a tokenizer of Llama's class alone."""
        stock = self.stock_processor_class
        return self.processor(type(stock.__name__, (stock,), {"tokenizer_class": "AutoTokenizer"}))

    def _image_processor(self, size):
        pinpoints = {"image_grid_pinpoints": PINPOINTS} if self.tiles_images else {}
        if self.name == "llava_onevision":
            return self.image_processor_class(size=size, **pinpoints)
        return self.image_processor_class(size={"shortest_edge": IMAGE_SIZE}, crop_size=size, **pinpoints)

    def _video_processor(self, size):
        options = {"do_center_crop": True, "do_sample_frames": True, "num_frames": FRAMES}
        return self.video_processor_class(size=size, crop_size=size, **options)

    def save_stock_checkpoint(self, folder, seed=0):
        """A stock checkpoint with random weights, named as in the public ones, whichever transformers writes it."""
        model = self.stock_twin(self.model(seed))
        model.generation_config.max_new_tokens = 4
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        self.publish_config(folder / "config.json")
        model.generation_config.save_pretrained(folder)
        self.stock_processor().save_pretrained(folder)
        weights = {self.public_name(name): weight.clone() for name, weight in model.state_dict().items()}
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder

    def publish_config(self, path):
        """Brings a config.json into the form of the public checkpoints."""

    def public_name(self, name):
        """A tensor's name in the public checkpoints of the family, from its name in the module tree."""
        return public_name(name)

    def refusal(self, **pruning):
        """Why the family cannot prune so; `None` where it can."""
        try:
            self.config_class.check_method(configuration.PruningConfig(**pruning))
        except ValueError as error:
            return str(error)

    def parts(self, model):
        """The parts of a model that are trained: its towers, its projector and its language model."""
        towers = {id(tower): tower for tower in (model.tower_of(kind)[0] for kind in self.kinds)}.values()
        return [*towers, model.model.multi_modal_projector, model.model.language_model]

    # -- prompts

    def written(self, text):
        """A text with the family's own placeholders for `<image>` and `<video>`."""
        return text

    def prompts(self):
        """(text, media) of prompts with every kind of media that the family takes, of several shapes."""
        prompts = [("USER : <image> what colour is the star ?", {"images": [random_image(0)]})]
        prompts.append(("<image> left <image> where", {"images": [random_image(1), random_image(2, (60, 20))]}))
        if "video" in self.kinds:
            prompts.append(("USER : <video> which way does it move ?", {"videos": [random_video(3)]}))
            media = {"images": [random_image(4)], "videos": [random_video(5)]}
            prompts.append(("red <video> blue <image> how many", media))
        return [(self.written(text), media) for text, media in prompts]

    def inputs(self, processor, index, **kwargs):
        text, media = self.prompts()[index]
        if self.lists_images and "images" in media:
            media = {**media, "images": [media["images"]]}
        return processor(text=text, **media, **kwargs)

    def batch(self, processor, **kwargs):
        """All prompts in one batch, padded on the left, as the tokenizer says."""
        prompts = self.prompts()
        media = {"images": [], "videos": []}
        for _, of_row in prompts:
            for kind, items in of_row.items():
                media[kind] += items
        if self.lists_images:
            rows = [of_row.get("images", []) for _, of_row in prompts]
            # The stock class of 4.57 miscounts where a row has none.
            media["images"] = rows if isinstance(processor, self.processor_class) else [row for row in rows if row]
        media = {kind: items for kind, items in media.items() if items}
        return processor(text=[text for text, _ in prompts], **media, padding=True, **kwargs)


FAMILIES = [
    Family("llava", ("image",)),
    Family("llava_next", ("image",)),
    Family("llava_next_video", ("image", "video")),
    Family("llava_onevision", ("image", "video")),
    Family("video_llava", ("image", "video")),
]


MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_TEMPLATE = CHAT_TEMPLATE.replace(
    "<{{ part['type'] }}>\n", "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
)


class QwenFamily(Family):
    """Qwen2.5-VL and Qwen3-VL: patches of 4 pixels, merged in squares of 2, and frames of videos in pairs."""

    has_mrope = True

    @property
    def has_timestamps(self):
        """Between the frames of a video."""
        return self.name == "qwen3_vl"

    @property
    def image_processor_class(self):
        return getattr(transformers, "Qwen2VLImageProcessorFast", None) or transformers.Qwen2VLImageProcessor

    @property
    def video_processor_class(self):
        return getattr(transformers, self.config_class.video_processor)

    def config(self, cls=None, **kwargs):
        cls = cls or self.config_class
        words = tiny_tokenizer(MARKS).get_vocab()
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        vision = dict(
            depth=3,
            hidden_size=16,
            intermediate_size=32,
            num_heads=2,
            patch_size=PATCH_SIZE,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=TEXT_SIZES["hidden_size"],
        )
        vision |= (
            {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
            if self.name == "qwen2_5_vl"
            else {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        )
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
        text = {**TEXT_SIZES, "max_position_embeddings": 2048, "rope_scaling": rope, "head_dim": 8}
        return cls(
            vision_config=vision, text_config=text, **{name: words[mark] for name, mark in zip(names, MARKS)}, **kwargs
        )

    def processor(self, cls=None, **pruning):
        size = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 36}
        options = {"patch_size": PATCH_SIZE, "merge_size": 2, "temporal_patch_size": 2}
        frames = {"shortest_edge": size["shortest_edge"], "longest_edge": size["longest_edge"] * FRAMES}
        return (cls or self.processor_class)(
            image_processor=self.image_processor_class(size=size, **options),
            video_processor=self.video_processor_class(
                size=frames, do_sample_frames=True, fps=None, num_frames=FRAMES, **options
            ),
            tokenizer=tiny_tokenizer(MARKS),
            chat_template=QWEN_TEMPLATE,
            **({"pruning": pruning} if cls is None else {}),
        )

    def written(self, text):
        return re.sub(r"<(image|video)>", r"<|vision_start|><|\1_pad|><|vision_end|>", text)

    def publish_config(self, path):
        """As older transformers wrote it, and of Qwen2.5-VL without a block for the language model."""
        values = json.loads(path.read_text())
        text = values.pop("text_config")
        rope = text.pop("rope_parameters", None)
        if rope is not None:
            text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        if self.name == "qwen2_5_vl":
            text["rope_scaling"] = {"type": "mrope", "mrope_section": text["rope_scaling"]["mrope_section"]}
            values = {**text, **values}
        else:
            values["text_config"] = text
        path.write_text(json.dumps(values))

    def public_name(self, name):
        if self.name == "qwen3_vl":
            return name
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def parts(self, model):
        return [model.model.visual, model.model.visual.merger, model.model.language_model]


FAMILIES += [
    QwenFamily("qwen2_5_vl", ("image", "video")),
    QwenFamily("qwen3_vl", ("image", "video")),
]


def row_of(batch, row):
    """The ids of one row of a batch without its padding, (1, T)."""
    return batch["input_ids"][row][batch["attention_mask"][row].bool()][None]


def placed(inputs):
    """The inputs with the positions that `generate` gives to padded rows."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def stock_inputs(family, inputs):
    """The inputs without what only this repository's models take."""
    names = inspect.signature(family.stock_model_class.forward).parameters
    return {name: values for name, values in inputs.items() if name in names}
