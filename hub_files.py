"""Saved files in a form that transformers 4.57 and 5.x both read, whichever of the two wrote them."""

import json
import os
import sys
import tempfile
from contextlib import contextmanager

PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer_config.json"


def make_portable(folder, processor_class: str, auto_map: dict) -> None:
    """
    Rewrites the processor and tokenizer files of a folder in place, in the form that both lines read.

    5.x writes image and video processor into `processor_config.json` and names a tokenizer class of its own; 4.57 needs a
    file for each and a class of its own library. Both need the name of the processor's class and where its code is.

    Args:
        folder: the folder with the files.
        processor_class: name of the processor's class.
        auto_map: `{"AutoProcessor": "file.Class"}`.

    Raises:
        FileNotFoundError: the folder has no `processor_config.json`.
    """
    processor = read_json(os.path.join(folder, PROCESSOR_FILE))
    for part, name in PARTS.items():
        path, nested = os.path.join(folder, name), processor.pop(part, None)
        if nested is not None or os.path.exists(path):
            values = read_json(path) if nested is None else nested
            write_json(path, {**values, "processor_class": processor_class})
    write_json(
        os.path.join(folder, PROCESSOR_FILE), {**processor, "processor_class": processor_class, "auto_map": auto_map}
    )
    path = os.path.join(folder, TOKENIZER_FILE)
    if os.path.exists(path):
        write_json(path, {**portable_tokenizer(read_json(path)), "processor_class": processor_class})


def portable_tokenizer(values: dict) -> dict:
    """The contents of `tokenizer_config.json`, readable by both lines."""
    values = dict(values)
    if values.get("tokenizer_class") in ("TokenizersBackend", None):
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):  # 4.57 has a dictionary under this name
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    values.pop("backend", None)
    values.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4.57 adds token_type_ids otherwise
    return values


@contextmanager
def whole_files(folder):
    """
    A new folder beside the files of `folder`, which is made where it is missing. When the block ends well, the files in it
    take the places of those of the same names; when it fails, as on a full disk, `folder` stays as it was.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield temporary
        for place, _, names in os.walk(temporary):
            target = os.path.join(folder, os.path.relpath(place, temporary))
            os.makedirs(target, exist_ok=True)
            for name in names:
                os.replace(os.path.join(place, name), os.path.join(target, name))


@contextmanager
def code_in_place(saved, folder):
    """
    Leaves the code files alone inside, where `saved.save_pretrained(folder)` would copy them onto themselves.

    They are there already when the classes were imported from the folder itself and not through the Auto classes, which
    import a copy.
    """
    cls = type(saved)
    code = os.path.dirname(os.path.abspath(sys.modules[cls.__module__].__file__))
    auto_class = cls._auto_class
    if os.path.isdir(folder) and os.path.samefile(code, folder):
        cls._auto_class = None
    try:
        yield
    finally:
        cls._auto_class = auto_class


def read_json(path) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, values: dict) -> None:
    """Writes the file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
