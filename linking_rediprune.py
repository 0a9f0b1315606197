"""Linked variants: code, config and processor are in the variant, the weights where `weights_from` in config.json says."""

import copy
import os
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LlavaNextVideoConfig

from .configuration_rediprune import BASE_MODEL_TYPE, ReDiPruneConfig, names_folder, resolve_folder

HUB_KEYS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# What `from_pretrained` of a model takes for itself, although a config has it too.
OWN_KEYS = ("dtype", "torch_dtype", "quantization_config")
SAMPLES = 64


def follow_link(variant, kwargs: dict) -> tuple:
    """
    Where `from_pretrained(variant, **kwargs)` finds the weights.

    Returns:
        The folder or Hub id of the weights and the arguments that load them from there, with the config of the variant;
        `(variant, kwargs)` unchanged where the variant holds its own weights.

    Raises:
        OSError: the base of a linked variant cannot be reached.
        ValueError: the base is of another architecture, or linked itself.
    """
    config = kwargs.get("config")
    hub = _hub_arguments(kwargs)
    if isinstance(config, LlavaNextVideoConfig):  # the Auto classes import this repository's class once more, as another
        config, rest = copy.deepcopy(config), kwargs
    elif variant is None:
        return variant, kwargs
    else:
        source = config or variant
        values, _ = ReDiPruneConfig.get_config_dict(source, **hub)
        if values.get("weights_from") is None:
            return variant, kwargs
        known = {"pruning", *ReDiPruneConfig().to_dict(), *values} - set(OWN_KEYS)
        config = ReDiPruneConfig.from_pretrained(source, **hub, **{key: kwargs[key] for key in kwargs if key in known})
        rest = {key: value for key, value in kwargs.items() if key not in known}
    if config.weights_from is None:
        return variant, kwargs

    base = resolve_folder("weights_from", config.weights_from, variant)
    config.weights_from = base
    config._commit_hash = None  # of the variant
    base_hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    if not names_folder(base):
        base_hub["revision"] = config.weights_revision or "main"
    with explained(config, variant):
        check_base(base, base_hub)
    rest = {key: value for key, value in rest.items() if key not in (*HUB_KEYS, "_commit_hash")}
    adapter = rest.get("adapter_kwargs") or {}
    if "_adapter_model_path" not in adapter:  # looked for at the base, where the variant's revision is unknown
        rest["adapter_kwargs"] = {**adapter, "revision": base_hub.get("revision")}
    return base, {**rest, **base_hub, "config": config}


def check_base(base: str, hub: dict) -> None:
    """Raises OSError where `base` cannot be reached, ValueError where its weights cannot be those of this model."""
    if names_folder(base) and not os.path.isdir(base):
        raise OSError(f"there is no folder {base!r}")
    values, _ = ReDiPruneConfig.get_config_dict(base, **hub)
    model_type = values.get("model_type")
    if model_type not in (BASE_MODEL_TYPE, ReDiPruneConfig.model_type):
        raise ValueError(
            f"weights_from={base!r} is a model of type {model_type!r}, but must be a LLaVA-NeXT-Video ({BASE_MODEL_TYPE!r}); "
            "set weights_from in config.json to the checkpoint that this variant was made from."
        )
    if values.get("weights_from") is not None:
        raise ValueError(
            f"weights_from={base!r} holds no weights but is linked itself, to {values['weights_from']!r}; name that one."
        )


@contextmanager
def unlinked(config):
    """Takes the link out of the config inside, for what is saved with weights of its own."""
    link = config.weights_from, config.weights_revision
    config.weights_from = config.weights_revision = None
    try:
        yield
    finally:
        config.weights_from, config.weights_revision = link


@contextmanager
def explained(config, variant):
    """Says of an OSError inside that it is about the base of a linked variant."""
    try:
        yield
    except OSError as error:
        revision = "" if config.weights_revision is None else f" at revision {config.weights_revision!r}"
        raise OSError(
            f"the weights of {str(variant)!r} are in weights_from={config.weights_from!r}{revision}, which cannot be loaded. "
            "If that checkpoint was moved, set weights_from in config.json to its new place; if it is private or gated, ask "
            f"for access and pass token=. {error}"
        ) from error


@contextmanager
def damage_explained(source):
    """Turns the error of a safetensors file that is cut short into one that says what to do."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        message = f"a weights file (.safetensors) of {str(source)!r} is truncated or damaged: {error}. Download it again."
        raise OSError(message) from error


def own_generation_config(model, variant, kwargs: dict):
    """The generation config that a linked variant has of its own; the model's, which is the base's, where it has none."""
    if kwargs.get("generation_config") is not None:
        return model.generation_config
    try:
        return GenerationConfig.from_pretrained(variant, **_hub_arguments(kwargs))
    except OSError:
        return model.generation_config


def _hub_arguments(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}


def sample_weights(model) -> dict:
    """Shape and a few values of every parameter: enough to notice, when saving, that a model was trained or resized."""
    samples = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta" and type(parameter) is torch.nn.Parameter:
            stride = max(1, parameter.numel() // SAMPLES)
            samples[name] = (parameter.shape, parameter.detach().flatten()[::stride][:SAMPLES].clone())
    return samples


def same_weights(model, samples: dict) -> bool:
    """Whether the parameters are those that `samples` were taken from, their dtype and device aside."""
    if set(samples) - {name for name, _ in model.named_parameters()}:
        return False
    for name, (shape, values) in sample_weights(model).items():
        if name not in samples:
            continue  # was offloaded when the samples were taken
        old_shape, old_values = samples[name]
        if shape != old_shape or not torch.equal(values, old_values.to(values)):
            return False
    return True
