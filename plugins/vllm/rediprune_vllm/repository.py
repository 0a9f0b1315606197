"""The code of the served variant."""

import importlib

from transformers.dynamic_module_utils import get_class_from_dynamic_module


def class_of(model_config, name: str):
    """
    The class that `auto_map` of the served variant's config.json names, such as `"AutoProcessor"`.

    vLLM has loaded the config by then, and it does so with `--trust-remote-code` alone.
    """
    return get_class_from_dynamic_module(
        model_config.hf_config.auto_map[name],
        model_config.model,
        revision=model_config.revision,
        code_revision=model_config.code_revision,
    )


def part_of(model_class, file: str):
    """Another file of the repository, one that the file of a class imports, such as `"core_items"`."""
    return importlib.import_module(f"{model_class.__module__.rpartition('.')[0]}.{file}")


def plain_config(model_class, hf_config):
    """
    The config of the variant as the class of its own code: vLLM sends configs from process to process, which makes other classes.

    What the engine adds to it for itself is not in there.
    """
    values = hf_config.to_dict()
    for name in ("rope_parameters", "rope_scaling"):  # of transformers 5, and of 4.57
        (values["text_config"].get(name) or {}).pop("mrope_section", None)
    return model_class.config_class.from_dict(values)
