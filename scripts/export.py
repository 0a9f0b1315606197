"""Makes a pruned variant of a checkpoint: a folder, a repository on the Hub, or both. The family is that of the base's
`model_type`: LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA, Qwen2.5-VL or Qwen3-VL.

A variant holds the code, config.json with the pruning block, and the tokenizer and processor files. Its weights are copied
(--copy), or stay where they are and are named in config.json (--link): then the variant is some hundred kB.

The pruning parameters can be changed later in config.json alone. Of the base nothing is taken over but its configuration,
its tokenizer and processor files and its safetensors weights: no code, and no file that lies elsewhere. Nothing is left
behind by a run that fails or is stopped (Ctrl-C, SIGTERM). What a killed one leaves the next one removes, and puts back an
old variant that --force was about to replace.

Examples:
    python scripts/export.py llava-hf/LLaVA-NeXT-Video-7B-hf --keep-ratio 0.15 --output my-variant
    python scripts/export.py llava-hf/llava-1.5-7b-hf --keep-ratio 0.1 --output my-image-variant
    python scripts/export.py llava-hf/LLaVA-NeXT-Video-7B-hf --keep-ratio 0.25 --link --push-to-hub me/name
    python scripts/export.py checkpoints/mine --method uniform --positions original --output my-variant --dry-run
"""

import argparse
import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from exporter.base import (
    PROCESSOR_FILES,
    SMALL_FILES,
    ExportError,
    config_class_of,
    fetch_base,
    fetch_weights,
    find_file,
    read_config,
    sizes_of_weights,
)
from exporter.folder import check_replaceable, parent_of, tidy, whole_folder
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from repository import ROOT, code_module, fail, json_or_string, recorded_command
from tqdm import tqdm

configuration = code_module("configuration_rediprune")
portability = code_module("hub_files")
untrusted = code_module("hub_untrusted")

CONFIGS = tuple(name for name in SMALL_FILES if name.endswith("_config.json"))
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
CHUNK = 16 * 2**20
IMAGE_KEYS = ("image_processor_type", "feature_extractor_type", "image_grid_pinpoints", "do_pad")  # not of videos
CARD_TOKENS = 576  # those of a 336-pixel view, for an example of how many stay


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub id of a stock checkpoint")
    parser.add_argument("--base-revision", help="branch, tag or commit of a base on the Hub (default: main)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--copy", action="store_true", help="copy the weights (the default)")
    weights.add_argument("--link", action="store_true", help="name the weights in config.json, pinned to a commit")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace a variant that --output already holds")
    parser.add_argument(
        "--push-to-hub", metavar="NAMESPACE/NAME", help="repository to push to, created if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="create that repository as a private one")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--commit-message", help="default: says what was exported")
    parser.add_argument("--dry-run", action="store_true", help="list what would be written, and write nothing")
    parser.add_argument("--no-check", action="store_true", help="do not load the result and compare it with the base")
    group = parser.add_argument_group("pruning", "keys of config.json's pruning block")
    settings = configuration.PruningConfig.settings()
    for key, setting in settings.items():
        group.add_argument(
            f"--{key.replace('_', '-')}",
            type=json_or_string,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{setting.expected} (default: {setting.default})",
        )
    args = parser.parse_args(argv)
    if args.output is None and args.push_to_hub is None:
        parser.error("nothing to write: pass --output FOLDER, --push-to-hub NAMESPACE/NAME, or both")
    if args.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to_hub):
        parser.error(
            f"--push-to-hub {args.push_to_hub}: must be NAMESPACE/NAME, with your user name or organisation first"
        )
    if args.push_to_hub is None and (args.private or args.revision or args.commit_message):
        parser.error("--private, --revision and --commit-message belong to --push-to-hub")
    args.pruning = {key: getattr(args, key) for key in settings if hasattr(args, key)}
    args.command = recorded_command(__file__, argv)
    return args


# -- the variant -------------------------------------------------------------------------------------------------------


def convert_files(base_folder, output, pruning=None, weights_from=None, weights_revision=None) -> list:
    """
    Writes everything of a variant but its weights and its card into a folder that exists: code, config, tokenizer and
    processor files. Files of these names that are there already are replaced, others stay.

    Args:
        base_folder: folder of a stock checkpoint; its weights are not read.
        output: an existing folder; the repository's own is fine, too.
        pruning: the pruning block, merged over the defaults.
        weights_from: Hub id or folder of the weights, for a linked variant; `None` if they will be in the folder.
        weights_revision: the commit of that Hub id.

    Returns:
        The names of the files.

    Raises:
        ExportError: the base is of no family that can be pruned, or has no tokenizer or image processor.
        ValueError: a pruning key or value is wrong.
    """
    base_folder, output = Path(base_folder).resolve(), Path(output)
    block = configuration.PruningConfig.from_value(pruning)
    base = read_config(base_folder)
    config_class = config_class_of(base)
    config_class.check_method(block)
    link = {"weights_from": weights_from, "weights_revision": weights_revision}
    config = {
        **{key: value for key, value in base.items() if key != "_name_or_path"},
        "architectures": [config_class.model_class],
        "model_type": config_class.model_type,
        "auto_map": config_class.auto_map_of_class(),
        "pruning": block.to_dict(),
        **{key: value for key, value in link.items() if value is not None},
    }
    small = copy_small_files(base_folder, output)
    if "tokenizer_config.json" not in small:
        raise ExportError(f"{base_folder} holds no tokenizer_config.json; a variant needs a tokenizer")
    if not (output / "chat_template.jinja").exists() and not _has_template(output, small):
        if not config_class.fallback_template:
            raise ExportError(f"{base_folder} holds no chat template; add chat_template.jinja, as its publisher has it")
        print("the base has no chat template: the variant gets Vicuna's (USER: ... ASSISTANT:), in chat_template.jinja")
        shutil.copyfile(ROOT / "chat_template.jinja", output / "chat_template.jinja")
    if not (output / portability.PROCESSOR_FILE).exists():
        portability.write_json(output / portability.PROCESSOR_FILE, _default_processor(base))
    processor = {"AutoProcessor": config_class.auto_map_of_class()["AutoProcessor"]}
    portability.make_portable(output, config_class.processor_class, processor)
    if not (output / "preprocessor_config.json").exists():
        raise ExportError(f"{base_folder} holds no preprocessor_config.json; a variant needs an image processor")
    if config_class.takes_videos:
        complete_video_processor(output, config_class)
    code = code_files()
    for name in code:
        if (ROOT / name) != (output / name).resolve():
            shutil.copyfile(ROOT / name, output / name)
    portability.write_json(output / "config.json", config)
    written = {"config.json", "preprocessor_config.json", portability.PROCESSOR_FILE, *small, *code}
    written |= {name for name in PROCESSOR_FILES if (output / name).exists()}
    return sorted(written)


def code_files() -> list:
    """Names of the code files of a variant."""
    return sorted(path.name for path in ROOT.glob("*.py"))


def copy_small_files(base_folder: Path, output: Path) -> list:
    """
    Copies the small files of the base that a variant takes over, without the keys that name code: whoever lets the code
    of a variant run has not seen that of its base. Returns their names.
    """
    names = [name for name in SMALL_FILES if find_file(base_folder, name) is not None]
    for name in names:
        shutil.copyfile(base_folder / name, output / name)
    for name in [name for name in names if name in CONFIGS]:
        values = untrusted.read_object(output / name)
        if untrusted.without_code(values) != values:
            print(f"left out of {name}: what names code of the base, which is no part of a variant")
            portability.write_json(output / name, untrusted.without_code(values))
    return names


def _has_template(folder: Path, names: list) -> bool:
    """Whether one of these files holds a chat template."""
    if "chat_template.json" in names:
        return True
    configs = [folder / name for name in ("processor_config.json", "tokenizer_config.json") if name in names]
    return any("chat_template" in portability.read_json(path) for path in configs)


def _default_processor(values: dict) -> dict:
    """For old checkpoints without processor_config.json."""
    config = config_class_of(values).from_dict({**values})
    if not hasattr(config, "vision_feature_select_strategy"):
        return {}
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLS
    }


def complete_video_processor(folder: Path, config_class) -> None:
    """
    Writes what a base leaves open about its videos: a file of their own, which transformers would put together from the type
    of a stock model, and how many frames are sampled, where the family's checkpoints do not say it.
    """
    path, images = (folder / portability.PARTS[part] for part in ("video_processor", "image_processor"))
    if path.exists():
        values = portability.read_json(path)
    else:
        values = portability.read_json(images)
        for key in IMAGE_KEYS:
            values.pop(key, None)
    values.setdefault("video_processor_type", config_class.video_processor)
    if config_class.trained_frames and values.get("num_frames") is None and values.get("fps") is None:
        values |= {"do_sample_frames": True, "num_frames": config_class.trained_frames}
    if config_class.trained_fps and values.get("num_frames") is None and values.get("fps") is None:
        values |= {"do_sample_frames": True, "fps": config_class.trained_fps}
    portability.write_json(path, values)


def copy_weights(files: list, output: Path) -> None:
    """Copies the files piece by piece, with a progress bar.

    Raises:
        ExportError: the disk has not enough space; nothing was copied then.
    """
    needed = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(output).free
    if needed > free:
        left = as_size(free)
        raise ExportError(f"the weights need {as_size(needed)}, but the disk has {left} left; --link needs none")
    with tqdm(total=needed, unit="B", unit_scale=True, desc="copying weights") as bar:
        for path in files:
            with open(path, "rb") as source, open(output / path.name, "wb") as target:
                while piece := source.read(CHUNK):
                    target.write(piece)
                    bar.update(len(piece))


def write_card(output: Path, name: str, base: str, base_folder: Path, config: dict, command: str) -> None:
    """README.md of the variant, which is its model card."""
    pruning, on_hub = config["pruning"], not Path(base).is_dir()
    licence = base_licence(base_folder)
    front = ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    front += [f"base_model: {base}"] if on_hub else []
    front += [f"{key}: {value}" for key, value in licence.items()]
    takes_videos = configuration_of_variant(config).takes_videos
    front += ["tags:", "- visual-token-pruning", "- rediprune", *(["- video"] if takes_videos else [])]
    kind, file, question = ("video", "clip.mp4", "What happens in this video?")
    if not takes_videos:
        kind, file, question = ("image", "photo.jpg", "What is in this picture?")
    media = f'{kind}s=["{file}"]' + (", num_frames=8" if takes_videos else "")
    weights = (
        f"This repository holds no weights: they are loaded from `{config['weights_from']}`"
        + (f" at commit `{config['weights_revision']}`." if config.get("weights_revision") else ".")
        if config.get("weights_from")
        else "The weights are those of the base, unchanged."
    )
    block = json.dumps(pruning, indent=2)
    base_name = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).resolve().name}`"
    text = f"""---
{chr(10).join(front)}
---

# {name}

{base_name} whose language model reads fewer visual tokens, without training. {describe_pruning(pruning)}

{weights} Licence: {licence.get("license_name") or licence.get("license") or "that of the base"}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor  # transformers 4.57: AutoModelForVision2Seq works, too

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
content = [{{"type": "{kind}", "path": "{file}"}}, {{"type": "text", "text": "{question}"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=prompt, {media}, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Another ratio for one call: `processor(..., keep_ratio=0.3)`. Another one for good: the `pruning` block of `config.json`, or
`from_pretrained(..., pruning={{"keep_ratio": 0.3}})` of both model and processor. A ratio of 1 is the base model.

## Pruning parameters

```json
{block}
```

## How it was made

    {command}
"""
    (output / "README.md").write_text(text, encoding="utf-8")


def configuration_of_variant(config: dict):
    """The config class of a variant, from its config.json."""
    return next(cls for cls in configuration.CONFIGS.values() if cls.model_type == config["model_type"])


def describe_pruning(pruning: dict) -> str:
    """What stays, and by which rule: the method's own count, which is not the keep ratio for each of them, and its own words."""
    block = configuration.PruningConfig.from_value(pruning)
    kept = (
        f"Of every {CARD_TOKENS} of them {block.count(CARD_TOKENS)} stay"
        if block.prunes
        else "As it stands, all of them stay"
    )
    if block.inner is not None:
        kept = "All of them enter the language model" if not block.prunes else kept
        kept += f", and {block.inner_count(CARD_TOKENS)} of {CARD_TOKENS} reach its later layers (`{block.inner}`)"
    method, registry = configuration.METHODS[block.method], code_module("methods_registry")
    unit = method if method.inner is None else registry.INNER_METHODS[method.inner]
    rule = " ".join(inspect.getdoc(type(unit)).partition("\n\n")[0].split())
    return f"{kept} (`{block.budget}`, method `{block.method}`). The method: {rule}"


def base_licence(base_folder: Path) -> dict:
    """What the front matter of the base's card says of its licence: `license`, and name and link of one that is not listed."""
    card = find_file(base_folder, "README.md")
    front = card and re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    return dict(re.findall(r"^(license\w*):[ ]*(\S.*?)\s*$", front.group(1), re.MULTILINE)) if front else {}


# -- writing and pushing -----------------------------------------------------------------------------------------------


def push(folder: Path, args, message: str) -> str:
    """Uploads the folder in one commit. Returns the address of the repository."""
    api = HfApi()
    try:
        url = api.create_repo(args.push_to_hub, private=args.private or None, exist_ok=True)
        if args.revision is not None:
            api.create_branch(args.push_to_hub, branch=args.revision, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=args.push_to_hub,
            revision=args.revision,
            commit_message=message,
            delete_patterns=list(WEIGHT_PATTERNS),  # those of an earlier export that this one has not
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ExportError(
                f"{args.push_to_hub} cannot be written with your token (status {status}): log in with `hf auth login` and a "
                "token that may write, in a namespace that is yours"
            ) from error
        raise ExportError(f"pushing to {args.push_to_hub} failed; nothing on the Hub was changed: {error}") from error
    except Exception as error:  # connection errors are of another class in each generation of the client
        raise ExportError(f"pushing to {args.push_to_hub} failed; is the Hub reachable? {error}") from error
    return str(url)


def check_result(folder: Path, base: Path) -> None:
    """Loads the result in a fresh process and compares it with the base.

    Raises:
        ExportError: it does not load, or its logits at ratio 1 are not those of the base.
    """
    command = [sys.executable, str(ROOT / "scripts" / "check_variant.py"), str(folder), "--base", str(base)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ExportError(
            f"the result was not kept, because it did not pass its check:\n{result.stderr.strip()[-3000:]}"
        )
    print(result.stdout.strip())


def as_size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            break
        value /= 1000
    else:
        unit = "TB"
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def list_files(folder: Path, weights: dict) -> str:
    """What a variant consists of, by size; `weights` are files that are not in the folder (yet)."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()} | weights
    lines = [f"{as_size(size):>12}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{as_size(sum(sizes.values())):>12}  in {len(sizes)} files"])


def export(args) -> None:
    if args.push_to_hub and not args.dry_run and get_token() is None:
        raise ExportError("--push-to-hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN")
    if args.link and args.push_to_hub and Path(args.base).is_dir():
        raise ExportError(
            f"--link --push-to-hub: the weights in the folder {args.base} cannot be reached by others; use --copy"
        )
    if not args.dry_run:
        tidy(parent_of(args.output))
    if args.output is not None and args.output.exists():
        check_replaceable(args.output, args.force)
    block = configuration.PruningConfig.from_value(args.pruning)
    pruning = block.to_dict()
    tower = pruning["text_tower"]
    if tower is not None and Path(tower).is_dir():
        if args.push_to_hub:
            raise ExportError(f"--text-tower {tower} is a folder, where others cannot reach it; name a Hub id to push")
        pruning["text_tower"] = str(Path(tower).resolve())
    base_folder, commit = fetch_base(args.base, args.base_revision)
    read_config(base_folder)
    sizes = sizes_of_weights(args.base, base_folder, commit)
    link = {}
    if args.link:
        link = {"weights_from": args.base if commit else str(base_folder), "weights_revision": commit}
    needs_weights = not args.dry_run and not (args.link and args.no_check)
    weights = fetch_weights(args.base, base_folder, commit) if needs_weights else []
    name = args.push_to_hub or args.output.resolve().name
    with tempfile.TemporaryDirectory() if args.dry_run else whole_folder(args.output, args.force) as folder:
        folder = Path(folder)
        convert_files(base_folder, folder, pruning, **link)
        config = portability.read_json(folder / "config.json")
        write_card(folder, name, args.base, base_folder, config, args.command)
        if args.dry_run:
            return print_plan(args, folder, {} if args.link else sizes)
        if not args.link:
            copy_weights(weights, folder)
        if not args.no_check:
            check_result(folder, base_folder)
        print(list_files(folder, {}))
        if args.push_to_hub:
            message = args.commit_message or f"{block.method} at {block.budget} of {args.base}"
            print(f"pushed to {push(folder, args, message)}")
    if args.output:
        print(f"written to {args.output}")


def print_plan(args, folder: Path, weights: dict) -> None:
    """What a run without --dry-run writes, and where."""
    print(f"would write to {' and '.join(str(place) for place in (args.output, args.push_to_hub) if place)}:")
    print(list_files(folder, weights))
    if not args.link and not weights:
        print("and the weights of the base")


def stop(number, frame):
    """Ends the run as Ctrl-C does, whatever asked for it."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, stop)
    try:
        export(args)
    except (ExportError, ValueError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"nothing was written: {error}")
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
        print(f"export.py: stopped by {number.name}; nothing was left behind", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
