"""
Workarounds for single versions of transformers, outside the model and processor classes.

The comment at each of them has its versions, its reason, and when it can go.
"""

import sys
from dataclasses import fields
from inspect import signature

import torch
import transformers
from transformers import modeling_outputs
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import ProcessorMixin

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    get_checkpoint_conversion_mapping = register_checkpoint_conversion_mapping = None

try:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
except ImportError:
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES = None

TESTED = "4.57.6 to 5.24.0"

# Versions: 4.57, whose processors have no hook for the placeholders of one medium.
# Reason: there, processors do themselves what those of 5.x do.
# Until: 4.57 is no longer supported.
TRANSFORMERS_4 = not hasattr(ProcessorMixin, "_process_videos")

# Versions: below 5.24.
# Reason: 5.24 renamed the cache, in arguments and outputs alike, from `past_key_values`.
# Until: 5.24 is the oldest supported version; then it is "cache".
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


# Versions: 4.57 and early 5.x.
# Reason: there a cache is cropped to a length, which may be 0; later it is told how many tokens to take back, as a negative number.
# Until: the oldest supported version takes the number.
CROPS_TO_LENGTH = "max_length" in signature(DynamicLayer.crop).parameters


def loading_options(model_type: str, stock_model_type: str, stock_class) -> dict:
    """
    The arguments of `from_pretrained` with which a model class of this repository loads the checkpoints of its stock class.

    Args:
        model_type: of the config of this repository.
        stock_model_type: of the config of the stock class.
        stock_class: the stock model class.

    Raises:
        TypeError: this version of transformers takes other arguments to convert checkpoint keys; the message names it.
    """
    # Versions: 4.57.
    # Reason: its conversion is a class attribute, without the shorter names under which 5.x saves the vision tower of a model
    #     that it did not load from a checkpoint.
    # Until: 4.57 is no longer supported.
    if register_checkpoint_conversion_mapping is None:
        # 5.x saves the towers without the level `vision_model`.
        names = {
            rf"^{tower}\.(?!vision_model\.)": f"model.{tower}.vision_model."
            for tower in ("vision_tower", "image_tower", "video_tower")
        }
        return {"key_mapping": {**names, **stock_class._checkpoint_conversion_mapping}}
    # Versions: 5.x.
    # Reason: checkpoint keys are converted by model type, and not for those of custom code that has not registered.
    # Until: custom code inherits the conversion of its stock class.
    try:
        names = (stock_model_type, stock_class.__name__)  # a mapping has one of them
        mapping = next((found for found in map(get_checkpoint_conversion_mapping, names) if found is not None), None)
        if mapping is not None:
            register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
    except TypeError as error:
        raise TypeError(
            f"transformers {transformers.__version__} takes other arguments to convert checkpoint keys, so weights of "
            f"{stock_model_type!r} checkpoints would not be found. This repository is tested with transformers {TESTED}; install "
            f"one of these, or a newer version of this repository. {error}"
        ) from error
    return {}


def register_for_serving(model_type: str, class_name: str) -> None:
    """Lets `transformers serve` load a model type of this repository."""
    # Versions: 5.x; 4.57 has no such list.
    # Reason: model types in the list are loaded through an Auto class, which follows `auto_map`, and all others by the name of
    #     their class in the library, where there is none.
    # Until: `transformers serve` follows `auto_map` for every model type.
    if MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES is not None:
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(model_type, class_name)


def clip_transformer(tower):
    """The module of a CLIP vision tower with `embeddings`, `encoder` and the norms."""
    # Versions: 4.57.
    # Reason: there it is one level below the tower; in 5.x it is the tower itself.
    # Until: 4.57 is no longer supported.
    return getattr(tower, "vision_model", tower)


def no_masks(layer) -> tuple:
    """The arguments with which a CLIP encoder layer masks nothing, after its hidden states."""
    # Versions: 4.57.
    # Reason: its layers take a causal mask beside the mask of padding.
    # Until: 4.57 is no longer supported; then it is one `None`.
    return (None,) * len({"attention_mask", "causal_attention_mask"} & set(signature(layer.forward).parameters))


def causal_mask(config, states, attention_mask, cache, position_ids):
    """What the layers of a decoder mask, in the form that its attention takes; see `create_causal_mask`."""
    # Versions: 4.57 calls the states by another name, and asks for the places of the new tokens in the cache.
    # Reason: later versions find these by themselves.
    # Until: 4.57 is no longer supported.
    names = signature(create_causal_mask).parameters
    given = {
        "config": config,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        CACHE_NAME: cache,
        "inputs_embeds" if "inputs_embeds" in names else "input_embeds": states,
    }
    if "cache_position" in names:
        given["cache_position"] = torch.arange(states.shape[1], device=states.device) + cache.get_seq_length()
    return create_causal_mask(**given)


def layer_states(output):
    """The hidden states that an encoder layer returned."""
    # Versions: 4.57.
    # Reason: its layers return tuples.
    # Until: 4.57 is no longer supported.
    return output[0] if isinstance(output, tuple) else output


def with_older_rope(text_config: dict) -> dict:
    """The `text_config` of a config.json, in which both lines find the rotary positions."""
    # Versions: 5.x writes `rope_parameters`, of which 4.57 reads nothing.
    # Reason: 4.57 reads the same from `rope_theta` and `rope_scaling`, and without them takes the defaults silently.
    # Until: 4.57 is no longer supported.
    rope = dict(text_config.get("rope_parameters") or {})
    if "rope_type" not in rope:  # of 4.57, or one for each kind of layer
        return text_config
    older = {
        "rope_theta": rope.pop("rope_theta", None),
        "rope_scaling": rope if rope != {"rope_type": "default"} else None,
    }
    return {**text_config, **{key: value for key, value in older.items() if value is not None}}


def stock_processor_kwargs(stock_class):
    """The types of the arguments of a stock processor class; `None` in 5.x."""
    # Versions: 4.57.
    # Reason: there the processor's steps are repeated here, and tell by these types which argument is whose.
    # Until: 4.57 is no longer supported.
    if not TRANSFORMERS_4:
        return None
    stock_kwargs = getattr(sys.modules[stock_class.__module__], f"{stock_class.__name__}Kwargs")

    class PrunedKwargs(stock_kwargs, total=False):
        _defaults = {"text_kwargs": stock_kwargs._defaults["text_kwargs"], "common_kwargs": {"return_tensors": "pt"}}

    return PrunedKwargs


def qwen_outputs(stock_class):
    """The class of what a Qwen model with a language model head returns."""
    # Versions: 4.57.
    # Reason: there each model has its own, and in 5.x they share one.
    # Until: 4.57 is no longer supported.
    name = f"{stock_class.__name__.removesuffix('ForConditionalGeneration')}CausalLMOutputWithPast"
    return getattr(modeling_outputs, "MultimodalCausalLMOutputWithPast", None) or getattr(
        sys.modules[stock_class.__module__], name
    )


def merged_patches(output) -> tuple:
    """What a Qwen vision tower returned: the tokens after its merger (n, H), and a list of their DeepStack features (n, H)."""
    # Versions: 4.57.
    # Reason: its towers return a tensor, and with DeepStack a tensor and a list, where those of 5.x return an output object.
    # Until: 4.57 is no longer supported.
    if isinstance(output, torch.Tensor):
        return output, []
    if isinstance(output, tuple):
        return output
    return output.pooler_output, list(getattr(output, "deepstack_features", None) or ())


def grid_positions(model, kind: str, grid, seconds=None) -> tuple:
    """
    The rotary positions (M-RoPE) that the stock model gives to one run of placeholders.

    Args:
        model: a Qwen model with a language model head.
        kind: `"image"` or `"video"`.
        grid: (frames, height, width) in tokens.
        seconds: how long a frame lasts; `None` = the default of the stock model.

    Returns:
        LongTensor (3, n), counted from where the run starts, and by how much the position of the text behind it is larger than
        that of its start.
    """
    config, (frames, height, width) = model.config, grid
    placeholder = {"image": config.image_token_id, "video": config.video_token_id}[kind]
    start, number = config.vision_start_token_id, frames * height * width
    text = next(token for token in range(4) if token not in (start, config.image_token_id, config.video_token_id))
    merge_size = config.vision_config.spatial_merge_size
    inputs = {
        "input_ids": torch.tensor([[start, *[placeholder] * number, text]]),
        f"{kind}_grid_thw": torch.tensor([[frames, height * merge_size, width * merge_size]]),
        "second_per_grid_ts": None if seconds is None else torch.tensor([seconds]),
        "mm_token_type_ids": torch.tensor([[0, *[{"image": 1, "video": 2}[kind]] * number, 0]]),
    }
    # Versions: 4.57.
    # Reason: it tells media by their token ids, and takes no types of tokens.
    # Until: 4.57 is no longer supported; `second_per_grid_ts` is of Qwen2.5-VL alone, and other models of 5.x take no notice.
    names = signature(model.model.get_rope_index).parameters
    positions, _ = model.model.get_rope_index(**{name: value for name, value in inputs.items() if name in names})
    positions = positions[:, 0] - positions[:, 0, :1] - 1
    return positions[:, 1:-1], int(positions[0, -1])
