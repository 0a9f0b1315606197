"""
Workarounds for single versions of transformers, outside the model and processor classes.

The comment at each of them has its versions, its reason, and when it can go.
"""

from dataclasses import fields
from inspect import signature

import transformers
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
        mapping = get_checkpoint_conversion_mapping(stock_model_type)
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


def layer_states(output):
    """The hidden states that an encoder layer returned."""
    # Versions: 4.57.
    # Reason: its layers return tuples.
    # Until: 4.57 is no longer supported.
    return output[0] if isinstance(output, tuple) else output
