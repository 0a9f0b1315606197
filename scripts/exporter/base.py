"""The checkpoint that a variant is exported from: where its files are, and which of them may be read."""

import glob
import json
import struct
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from repository import code_module

configuration = code_module("configuration_rediprune")
untrusted = code_module("hub_untrusted")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
SMALL_FILES = ("generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES, "LICENSE", "LICENSE.txt", "LICENSE.md")
WEIGHTS, INDEX = untrusted.SAFE_WEIGHTS_NAME, untrusted.SAFE_WEIGHTS_INDEX_NAME


class ExportError(Exception):
    """What the user has to hear instead of a traceback."""


def fetch_base(base: str, revision=None) -> tuple:
    """Folder with the small files of the base, and its commit where it comes from the Hub (`None` for a folder)."""
    if Path(base).is_dir():
        if revision is not None:
            raise ExportError(f"--base-revision {revision}: {base} is a folder, which has no revisions; leave it out")
        return Path(base).resolve(), None
    if untrusted.names_folder(base) or base.count("/") != 1:
        raise ExportError(f"{base}: no such folder, and not a Hub id (NAMESPACE/NAME) either")
    folder = download(base, revision, [*SMALL_FILES, "config.json", "README.md", INDEX])
    return folder, folder.name


def download(base: str, revision, names: list) -> Path:
    """The folder of the Hub's cache that holds these files of a repository, those that it has."""
    try:
        folder = snapshot_download(base, revision=revision, allow_patterns=[glob.escape(name) for name in names])
        return Path(folder).resolve()
    except GatedRepoError as error:
        raise ExportError(f"{base} is gated: accept its terms on its page, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ExportError(
            f"{base}: no such repository on the Hub, or it is private and your token cannot see it"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ExportError(
            f"{base} (revision {revision or 'main'}) cannot be downloaded, and is not in the local cache: {error}\n"
            "check the network and --base-revision, or pass a folder"
        ) from error


def find_file(folder: Path, name: str):
    """The path of a file of the base, `None` if there is none. Raises ValueError where a link leads out of the base."""
    path = untrusted.find_files(str(folder), [name]).get(name)
    return None if path is None else Path(path)


def read_config(folder: Path) -> dict:
    """
    config.json of the base, without the keys that name code.

    Raises:
        ExportError: there is none, or it is not one of a family that can be pruned.
        ValueError: it is a link that leads out of the base, or not JSON.
    """
    if find_file(folder, "config.json") is None:
        raise ExportError(f"{folder} holds no config.json; pass the folder of a checkpoint")
    values, _ = untrusted.read_config(str(folder))
    if values.get("model_type") not in configuration.CONFIGS:
        raise ExportError(
            f"{folder} is a model of type {values.get('model_type')!r}, but only stock checkpoints of type "
            f"{', '.join(map(repr, configuration.CONFIGS))} can be exported"
        )
    if "transformers_weights" in values:
        raise ExportError(
            f"{folder / 'config.json'} names a file of weights itself (transformers_weights); name that file {WEIGHTS}, and "
            "leave the key out"
        )
    try:
        config_class_of(values).from_dict({**values})  # 4.57 adds to what it is given
    except Exception as error:  # each line of transformers refuses nonsense in its own way
        raise ExportError(
            f"{folder / 'config.json'} is not the config of a model that can be pruned: {error}"
        ) from error
    return values


def config_class_of(values: dict):
    """The config class of the variants of a base, from its config.json."""
    return configuration.CONFIGS[values["model_type"]]


# -- its weights -------------------------------------------------------------------------------------------------------


def sizes_of_weights(base: str, folder: Path, commit) -> dict:
    """
    Names and sizes in bytes of the files with the weights, the index among them; empty where only the Hub knows them and
    cannot be asked. Nothing is downloaded.

    Raises:
        ExportError: a file is missing, truncated or no safetensors file.
        ValueError: a name leads out of the base.
    """
    if commit is None:
        return {path.name: path.stat().st_size for path in whole_weights(folder)}
    index = find_file(folder, INDEX)
    names = [WEIGHTS] if index is None else [*untrusted.names_in_index(index), INDEX]
    try:
        siblings = HfApi().model_info(base, revision=commit, files_metadata=True).siblings
    except Exception:  # connection errors are of another class in each generation of the client
        return {}
    sizes = {file.rfilename: file.size for file in siblings}
    names = [WEIGHTS] if WEIGHTS in sizes else names  # as transformers chooses
    for name in names:
        if name not in sizes:
            other = f" and no {INDEX}; weights in other formats have to be loaded and saved with transformers first"
            raise ExportError(f"{base} holds no {name}" + (other if name == WEIGHTS else f", which its {INDEX} names"))
    return {name: sizes[name] for name in names}


def fetch_weights(base: str, folder: Path, commit) -> list:
    """The paths of the files with the weights, the index among them, downloaded where they are on the Hub."""
    if commit is not None:
        download(base, commit, [WEIGHTS])
        if find_file(folder, WEIGHTS) is None and find_file(folder, INDEX) is not None:
            download(base, commit, untrusted.names_in_index(folder / INDEX))
    return whole_weights(folder)


def whole_weights(folder: Path) -> list:
    """
    The paths of the files with the weights in a folder, the index among them.

    Raises:
        ExportError: a file is missing, truncated or no safetensors file.
        ValueError: a name leads out of the folder.
    """
    try:
        files = [Path(path) for path in untrusted.weight_files(str(folder)).values()]
    except OSError as error:
        raise ExportError(str(error)) from error
    for path in files:
        if path.name != INDEX:
            check_safetensors(path)
    return files


def check_safetensors(path: Path) -> None:
    """Raises ExportError where the file is shorter or longer than its header says."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header goes beyond its end")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{path} is not a whole safetensors file: {error}; download it again") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ExportError(f"{path} has {size} bytes, but its header says {expected}; download it again")
