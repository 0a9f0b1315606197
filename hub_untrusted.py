"""Reading checkpoints whose code nobody trusted: JSON and safetensors files by plain names, nothing else."""

import json
import os
import re
import tempfile
from typing import Optional

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files, extract_commit_hash

# Keys of JSON files by which transformers finds code to run: classes in other repositories, and kernels.
CODE_KEYS = {"auto_map", "custom_pipelines", "fusion_config"}
CODE_KEYS |= {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
CODE_KEYS |= {"experts_implementation", "_experts_implementation", "_experts_implementation_internal"}
PLAIN = re.compile(r'[^/\\:*?"<>|\x00-\x1f]+')  # one file name on every system
_link_folders = []  # until the process ends, because weights that are offloaded to disk are read again and again


def names_folder(place: str) -> bool:
    """Whether `place` is a folder (absolute, or beginning with `.` or `~`) and not a Hub id."""
    return place.startswith((".", "~")) or os.path.isabs(place)


def resolve_folder(key: str, place: str, variant) -> str:
    """
    `place`, the value of a key of `config.json`, with a relative folder resolved against the variant's own.

    Raises:
        OSError: it is relative to a variant that is on the Hub.
    """
    if not names_folder(place):
        return place
    folder = os.path.expanduser(place)
    if not os.path.isabs(folder):
        if not os.path.isdir(variant):
            raise OSError(
                f"{key}={place!r} is a folder relative to the variant, but the variant {str(variant)!r} is not a local folder; "
                f"set {key} in its config.json to a Hub id."
            )
        folder = os.path.join(variant, folder)
    return os.path.abspath(folder)


def resolve_text_tower(block, variant):
    """A pruning block, if it is a dictionary, with the folder of its `text_tower` resolved."""
    if not (isinstance(block, dict) and isinstance(block.get("text_tower"), str)):
        return block
    return {**block, "text_tower": resolve_folder("text_tower", block["text_tower"], variant)}


def find_files(source: str, names: list, **hub) -> dict:
    """
    The files of a checkpoint with these names.

    Args:
        source: a folder or a Hub id, as `names_folder` tells them apart.
        names: plain file names.
        hub: `revision`, `token`, `cache_dir` and so on, as for `from_pretrained`.

    Returns:
        `dict` of name -> path.

    Raises:
        OSError: the checkpoint cannot be reached.
        ValueError: a name is no plain file name, or that of a link that leads out of the checkpoint.
    """
    if names_folder(source):
        if not os.path.isdir(source):
            raise OSError(f"there is no folder {source!r}")
        there = [name for name in names if not is_plain(name) or os.path.lexists(os.path.join(source, name))]
        return {name: file_inside(source, name) for name in there}
    if os.path.isdir(source):  # which transformers would read in place of the Hub
        raise OSError(
            f"{source!r} is a Hub id, but the working directory holds a folder of this name; work in another one"
        )
    for name in names:
        check_name(source, name)
    found = cached_files(source, names, _raise_exceptions_for_missing_entries=False, **hub) or []
    return {os.path.basename(path): path for path in found}


def is_plain(name) -> bool:
    """Whether this is the name of a file, and not a path that leads anywhere."""
    return isinstance(name, str) and PLAIN.fullmatch(name) is not None and name not in (".", "..")


def check_name(source, name) -> None:
    """Raises ValueError where the name of a file of a checkpoint is none."""
    if not is_plain(name):
        raise ValueError(
            f"{str(source)!r} names a file {name!r}, but only plain names, of files in the checkpoint itself, are read"
        )


def file_inside(folder: str, name: str) -> str:
    """
    The path of a file that lies in the folder itself. A link out of it is followed in the Hub's cache alone, into its
    `blobs`.

    Raises:
        ValueError: the name is no plain file name, or what it names is elsewhere or no file.
    """
    check_name(folder, name)
    path, home = os.path.join(folder, name), os.path.realpath(folder)
    target, (repository, snapshots) = os.path.realpath(path), os.path.split(os.path.dirname(home))
    in_cache = snapshots == "snapshots" and os.path.dirname(target) == os.path.join(repository, "blobs")
    if not in_cache and not target.startswith(os.path.join(home, "")):
        raise ValueError(f"{path} is a link that leads out of the checkpoint, to {target}; put the file itself there")
    if not os.path.isfile(target):
        raise ValueError(f"{path} is not a file")
    return path


def read_config(source: str, **hub) -> tuple:
    """
    config.json without the keys that name code, and the commit that it is from (`None` for a folder).

    Raises:
        OSError: the checkpoint cannot be reached, or has no config.json.
        ValueError: as of `find_files`, or config.json holds no JSON object.
    """
    path = find_files(source, ["config.json"], **hub).get("config.json")
    if path is None:
        raise OSError(f"there is no config.json in {source!r}")
    return without_code(read_object(path)), None if names_folder(source) else extract_commit_hash(path, None)


def read_object(path) -> dict:
    """The object in a JSON file. Raises ValueError where it does not hold one."""
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def without_code(values):
    """The content of a JSON file without the keys, at any depth, by which transformers finds code to run."""
    if isinstance(values, dict):
        return {key: without_code(value) for key, value in values.items() if key not in CODE_KEYS}
    return [without_code(value) for value in values] if isinstance(values, list) else values


def weight_files(source: str, variant: Optional[str] = None, **hub) -> dict:
    """
    The safetensors files with the weights of a checkpoint and, of several, their index.

    Args:
        source, hub: as of `find_files`.
        variant: as of `from_pretrained`: `"fp16"` reads `model.fp16.safetensors`.

    Returns:
        `dict` of name -> path, with the usual names for the file or the index.

    Raises:
        OSError: the checkpoint cannot be reached, has no safetensors weights, or lacks a file that its index names.
        ValueError: as of `find_files`, or the index is damaged.
    """
    for usual in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        stem, _, ending = usual.rpartition(".")
        name = usual if variant is None else f"{stem}.{variant}.{ending}"
        path = find_files(source, [name], **hub).get(name)
        if path is not None:
            break
    else:
        raise OSError(
            f"there is no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME} in {source!r}, and weights in other "
            "formats, which can run code, are not read; name a revision that has them (of a repository on the Hub the "
            "conversion to safetensors often waits as refs/pr/NUMBER), or load them with transformers, save them and name "
            "that folder"
        )
    if usual == SAFE_WEIGHTS_NAME:
        return {usual: path}
    names = names_in_index(path)
    shards = find_files(source, names, **hub)
    missing = [name for name in names if name not in shards]
    if missing:
        raise OSError(f"{path} names {missing[0]}, which is not in {source!r}; download the checkpoint again")
    return {**shards, usual: path}


def names_in_index(path) -> list:
    """
    The safetensors files that an index names.

    Raises:
        ValueError: it is no index of such files, or one of its names is no plain file name.
    """
    mapping = read_object(path).get("weight_map")
    if not (isinstance(mapping, dict) and mapping and all(isinstance(name, str) for name in mapping.values())):
        raise ValueError(f"{path} is not an index of safetensors files; download it again")
    names = sorted(set(mapping.values()))
    for name in names:
        check_name(path, name)
        if not name.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {name!r}, which is not a safetensors file; others, which can run code, are not read"
            )
    return names


def link_files(files: dict) -> str:
    """A folder that holds links to these files (name -> path) and nothing else."""
    folder = tempfile.TemporaryDirectory(prefix="rediprune-", ignore_cleanup_errors=True)
    _link_folders.append(folder)
    for name, path in files.items():
        target, link = os.path.realpath(path), os.path.join(folder.name, name)
        try:
            os.symlink(target, link)
        except OSError:  # Windows, for users that may not
            os.link(target, link)
    return folder.name
