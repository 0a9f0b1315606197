"""Linked variants: code, config and processor are in the variant, the weights at `weights_from` in config.json."""

import copy
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, logging

from .hub_untrusted import link_files, names_folder, read_config, resolve_folder, weight_files

HUB_KEYS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# What `from_pretrained` of a model takes for itself, although a config has it too.
OWN_KEYS = ("dtype", "torch_dtype", "quantization_config")
PLACE_KEYS = ("revision", "subfolder")  # those of the variant, which the base has not
CHECKSUM_THREADS = 4

logger = logging.get_logger(__name__)


def follow_link(config_class, variant, kwargs: dict) -> tuple:
    """
    Where `from_pretrained(variant, **kwargs)` finds the weights.

    Of the base nothing is read but config.json and the safetensors files with its weights: whoever let the code of a
    variant run did not mean that of its base. So what is loaded is a folder of links to those files, and nothing else can
    be found.

    Returns:
        The folder and the arguments that load the weights from there, with the config of the variant; `(variant, kwargs)`
        unchanged where the variant holds its own weights.

    Raises:
        OSError: the base of a linked variant cannot be reached, or has no safetensors weights.
        ValueError: the base is of another architecture, or linked itself, or its files are not in the base itself.
    """
    config = kwargs.get("config")
    hub = _hub_arguments(kwargs)
    if (
        getattr(config, "model_type", None) == config_class.model_type
    ):  # the Auto classes import this repository's class once more, as another
        config, rest = copy.deepcopy(config), kwargs
    elif variant is None:
        return variant, kwargs
    else:
        source = config or variant
        values, _ = config_class.get_config_dict(source, **hub)
        if values.get("weights_from") is None:
            return variant, kwargs
        known = {"pruning", *config_class().to_dict(), *values} - set(OWN_KEYS)
        config = config_class.from_pretrained(source, **hub, **{key: kwargs[key] for key in kwargs if key in known})
        rest = {key: value for key, value in kwargs.items() if key not in known}
    if config.weights_from is None:
        return variant, kwargs
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False, but a linked variant reads no other weights; leave it out")

    generation_config = copy.deepcopy(kwargs.get("generation_config")) or own_generation_config(variant, config, hub)
    config.weights_from = resolve_folder("weights_from", config.weights_from, variant)
    config._commit_hash = None  # of the variant
    with errors_about_base(config, variant):
        files = find_weights(config, hub, kwargs.get("variant"))
    done = (*PLACE_KEYS, "_commit_hash", "variant", "trust_remote_code")
    rest = {key: value for key, value in rest.items() if key not in done}
    own = {"config": config, "generation_config": generation_config, "use_safetensors": True}
    return link_files(files), {**rest, **own}


def find_weights(config, hub: dict, file_variant=None) -> dict:
    """
    The files of the base that `config.weights_from` names, as of `weight_files`. Of a base on the Hub,
    `config.weights_revision` becomes the commit that they are from. Raises as `follow_link` does.
    """
    base, asked = config.weights_from, config.weights_revision
    hub = {key: value for key, value in hub.items() if key not in PLACE_KEYS}
    on_hub = not names_folder(base)
    values, commit = read_config(base, **hub, **({"revision": asked or "main"} if on_hub else {}))
    check_base(type(config), base, values)
    files = weight_files(base, file_variant, **hub, **({"revision": commit} if on_hub else {}))
    if on_hub and asked != commit:
        logger.warning(
            f"weights_from={base!r} is not pinned: weights_revision is {asked!r}, so that the weights become others when "
            f"the repository moves on. These are of commit {commit}; write it into config.json as weights_revision."
        )
        config.weights_revision = commit
    return files


def check_base(config_class, base: str, values: dict) -> None:
    """Raises ValueError where the weights of a base with this config.json cannot be those of this model."""
    model_type = values.get("model_type")
    if model_type not in (config_class.base_model_type, config_class.model_type):
        raise ValueError(
            f"weights_from={base!r} is a model of type {model_type!r}, but must be one of type {config_class.base_model_type!r}; "
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
def errors_about_base(config, variant):
    """Turns an OSError inside into one that names the base of the linked variant, and the remedy."""
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
def errors_about_damage(source):
    """Turns the error of a safetensors file that is cut short into an OSError that names its checkpoint, and the remedy."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        message = (
            f"a weights file (.safetensors) of {str(source)!r} is truncated or damaged: {error}. Download it again."
        )
        raise OSError(message) from error


def own_generation_config(variant, config, hub: dict):
    """The generation config of a linked variant: never that of its base, which is a file of somebody else."""
    options = {**hub, "_raise_exceptions_for_missing_entries": False}
    if variant is not None and cached_file(variant, GENERATION_CONFIG_NAME, **options):
        return GenerationConfig.from_pretrained(variant, **hub)
    return GenerationConfig.from_model_config(config)


def _hub_arguments(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in HUB_KEYS if kwargs.get(key) is not None}


def checksum_weights(model) -> dict:
    """
    Checksums of all parameters, to notice when saving that a model was trained or changed in any other way.

    Returns:
        `dict` of name -> `None` where the parameter is offloaded, else for each plain tensor that it consists of shape,
        dtype and CRC-32. All bytes are read once: 14 GB, a 7B model in half precision, take seconds.
    """
    parameters = dict(model.named_parameters())
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        return dict(zip(parameters, pool.map(_checksums, parameters.values())))


def same_weights(model, checksums: dict) -> bool:
    """Whether the parameters have the values of when `checksums` were taken, on whatever device, and in whatever dtype
    holds the same values."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != checksums.keys():
        return False
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        same = all(pool.map(_is_same, parameters.values(), [checksums[name] for name in parameters]))
        pool.shutdown(wait=False, cancel_futures=True)
    return same


def _checksums(parameter):
    if parameter.device.type == "meta":
        return None
    return [(tensor.shape, tensor.dtype, _crc(tensor)) for tensor in _plain_tensors(parameter.detach())]


def _is_same(parameter, checksums) -> bool:
    if checksums is None or parameter.device.type == "meta":
        return checksums is None and parameter.device.type == "meta"
    tensors = _plain_tensors(parameter.detach())
    if [tensor.shape for tensor in tensors] != [shape for shape, _, _ in checksums]:
        return False
    for tensor, (_, dtype, crc) in zip(tensors, checksums):
        as_it_was = tensor.to(dtype)
        is_rounded = tensor.dtype != dtype and not torch.equal(as_it_was.to(tensor.dtype), tensor)
        if is_rounded or _crc(as_it_was) != crc:
            return False
    return True


def _plain_tensors(tensor) -> list:
    """The tensor itself, or its parts: this process's share under tensor parallelism, parts of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [plain for part in parts if isinstance(part, torch.Tensor) for plain in _plain_tensors(part)]


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
