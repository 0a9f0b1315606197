"""Weights: those of a linked variant are where its config.json says, and nothing else is read there."""

import re
from dataclasses import replace

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .repository import class_of, part_of, plain_config


class LinkedLoader(DefaultModelLoader):
    """vLLM's own loader, from the base of a linked variant."""

    def __init__(self, load_config):
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config, model):
        yield from self._get_weights_iterator(self.Source(_linked_files(model_config), None))

    def download_model(self, model_config) -> None:
        _linked_files(model_config)


def _linked_files(model_config) -> str:
    """
    A folder of links to the safetensors files of the base.

    Raises:
        OSError, ValueError: those of `from_pretrained` of the variant.
    """
    model_class = class_of(model_config, "AutoModelForImageTextToText")
    linking = part_of(model_class, "hub_linking")
    config = plain_config(model_class, model_config.hf_config)
    hub = {"revision": model_config.revision} if model_config.revision else {}
    folder, _ = linking.follow_link(model_class.config_class, model_config.model, {"config": config, **hub})
    return str(folder)


def parts_of_checkpoint(weights) -> tuple:
    """
    Sorts names of weights, whichever version of transformers wrote them.

    Args:
        weights: (name, tensor) of a checkpoint.

    Returns:
        an iterator of (part, name, tensor); the part is `"language_model"`, whose names begin with `model.` or `lm_head.`, or
        `"vision"`, whose names are those of the model class of the repository.
    """
    for name, tensor in weights:
        name = re.sub(r"^(model\.)?language_model\.lm_head\.", "lm_head.", name.removeprefix("model."))
        name = re.sub(r"^language_model\.(model\.)?", "language_model.", name)
        name = re.sub(r"^(\w+_tower)\.vision_model\.", r"\1.", name)
        if name.startswith(("language_model.", "lm_head.")):
            yield "language_model", re.sub(r"^language_model\.", "model.", name), tensor
        else:
            yield "vision", f"model.{name}", tensor
