"""What the command-line tools share: where the repository is, how a model and its processor are loaded, how stages are
timed, and how result files are written."""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import types
from collections import defaultdict
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
TOWER_FIELDS = {"cls_attention", "keys", "last_cls_attention", "last_keys"}  # what a method may need of the vision tower
ENDINGS = (".json", ".md", ".png", ".html")  # of result files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fail(message: str):
    """Ends the program with a message instead of a traceback."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


def code_module(name: str):
    """A code file of the repository (`"configuration_rediprune"`), imported beside its siblings as a package `rediprune`."""
    if "rediprune" not in sys.modules:
        package = types.ModuleType("rediprune")
        package.__path__ = [str(ROOT)]
        sys.modules["rediprune"] = package
    return importlib.import_module(f"rediprune.{name}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: the checkpoint of this repository)")
    group.add_argument("--revision", default="main", help="revision of a Hub id")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    group.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: as the checkpoint says")
    group.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"])
    group.add_argument("--threads", type=at_least_one, help="CPU threads (default: as torch decides)")
    group.add_argument(
        "--pruning",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of config.json's pruning block, e.g. --pruning alpha=1.0 --pruning positions=original; repeatable",
    )


def keep_ratio(text: str) -> float:
    """`"0.1"` or `"4/36"`: with a fraction of the tokens of a frame, what is pruned jointly keeps as many as what is not."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a keep ratio: give numbers in (0, 1], such as 0.25 or 4/36")
    return value


def at_least_one(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def key_value(text: str) -> tuple:
    """`"alpha=2"` -> `("alpha", 2)`; a value that is not JSON is a string."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, json_or_string(value)


def json_or_string(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_setting(text: str) -> dict:
    """`"rediprune,alpha=2"` -> `{"method": "rediprune", "alpha": 2}`."""
    method, *changes = text.split(",")
    return {"method": method, **dict(key_value(change) for change in changes)}


def use_device(args) -> None:
    """Sets the number of threads, and refuses a device that is not there."""
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
    except RuntimeError:
        fail(f"--device {args.device}: torch knows no such device; pass cpu, cuda or, of several GPUs, cuda:1")
    if device.type != "cuda":
        return
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not number:
        fail(f"--device {args.device}: torch sees no GPU here; pass --device cpu")
    if device.index is not None and device.index >= number:
        fail(f"--device {args.device}: torch sees {number} GPU(s) here, of which the last is cuda:{number - 1}")


def load(args, pruning: dict = None) -> tuple:
    """Model (in eval mode, on its device) and processor through the Auto classes, as a user loads them.

    Args:
        args: the parsed arguments of `add_model_arguments`.
        pruning: changes to the pruning block of the repository, on top of `--pruning`.
    """
    use_device(args)
    pruning = {**dict(args.pruning), **(pruning or {})}
    options = {"revision": args.revision, "trust_remote_code": True, "pruning": pruning}
    dtype = DTYPES.get(args.dtype, args.dtype)
    auto_class = transformers.AutoModelForImageTextToText
    model = auto_class.from_pretrained(args.model, dtype=dtype, attn_implementation=args.attention, **options)
    processor = transformers.AutoProcessor.from_pretrained(args.model, **options)
    return model.to(args.device).eval(), processor


def environment(model=None) -> dict:
    """Versions, device and threads, for the record of a measurement."""
    record = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if model is not None:
        record |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        if model.device.type == "cuda":
            record["gpu"] = torch.cuda.get_device_name(model.device)
    return record


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def output_prefix(text: str) -> Path:
    """The path that the endings of results are put after. Ends the program, before any work, if nothing can be written there."""
    path = Path(text)
    if text.endswith(("/", "\\")) or path.is_dir():
        fail(f"--output {text} is a folder; name the files in it, for example {path / 'results'}")
    if path.suffix in ENDINGS:
        path = path.with_suffix("")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        fail(f"--output {text}: cannot write to {path.parent}: {error.strerror or error}")
    return path


def write_whole(path, content) -> None:
    """Writes a file, of text or of bytes, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


class FeatureMemory:
    """
    Remembers what the vision tower gave for a batch: the settings differ in what they keep of it, not in what it gives.

    The features are those of the first time, bit for bit, and depend on the batch alone and not on what came before, so that
    processes that share the batches get the same. A method that prunes inside the tower goes past it.
    """

    def __init__(self, model):
        self.model, self.encode, self.known = model, model._tap, {}
        model._tap = self

    def __call__(self, pixels, needs=frozenset(), **kwargs):
        needs = frozenset(needs & TOWER_FIELDS)
        keys = [hash(picture.contiguous().view(torch.uint8).cpu().numpy().tobytes()) for picture in pixels]  # bfloat16 too
        pictures = dict(zip(keys, pixels))  # a batch asks several questions about one scene
        batch = (tuple(pictures), needs)
        if batch not in self.known:
            self.known[batch] = self.encode(torch.stack(list(pictures.values())), needs=needs, **kwargs)
        places = {key: place for place, key in enumerate(pictures)}
        order = torch.tensor([places[key] for key in keys], device=pixels.device)
        return {name: values[order] for name, values in self.known[batch].items()}

    @contextmanager
    def switched_off(self):
        self.model._tap = self.encode
        try:
            yield
        finally:
            self.model._tap = self


class StageTimer:
    """
    Seconds that a model spends in each stage of the calls made inside `with timer:`, or what another `clock` counts.

    The stages are `vision encoder` (with its pooling), `selection` (with the query), `projector`, `prefill` (the language model's first
    pass) and `decode` (its later ones); `passes` counts the latter.
    """

    def __init__(self, model, clock=None):
        self.model = model
        self.clock = clock or self._time
        self.seconds = defaultdict(float)
        self.passes = 0
        self._inside = False

    @contextmanager
    def _timed(self, stage):
        if self._inside:  # a method may project tokens in order to select: that is selection
            yield
            return
        self._inside = True
        start = self.clock()
        yield
        self.seconds[stage] += self.clock() - start
        self._inside = False

    def _time(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _wrap(self, owner, name, stage_of):
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            with self._timed(stage_of()):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        self._undo.append(lambda: delattr(owner, name))

    def _language_stage(self):
        self.passes += 1
        return "prefill" if self.passes == 1 else "decode"

    def __enter__(self):
        parts = self.model.model
        self._undo = []
        self._wrap(self.model, "_encode", lambda: "vision encoder")
        self._wrap(parts.vision_tower, "forward", lambda: "vision encoder")  # the stock forward calls it directly
        self._wrap(self.model, "_select", lambda: "selection")
        self._wrap(parts.multi_modal_projector, "forward", lambda: "projector")
        self._wrap(parts.language_model, "forward", self._language_stage)
        return self

    def __exit__(self, *error):
        for undo in self._undo:
            undo()
