"""What the command-line tools share: where the repository is, how a model and its processor are loaded, how stages are
timed, and how result files are written."""

import argparse
import importlib
import json
import os
import re
import shlex
import sys
import threading
import time
import types
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, flop_registry

ROOT = Path(__file__).resolve().parent.parent
TOWER_FIELDS = {
    "cls_attention",
    "cls_features",
    "keys",
    "last_cls_attention",
    "last_attention",
    "last_keys",
}  # what a method may need of the vision tower
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
    group.add_argument(
        "--model", default=str(ROOT), help="folder or Hub id (default: the checkpoint of this repository)"
    )
    group.add_argument("--revision", default="main", help="revision of a Hub id")
    group.add_argument(
        "--subfolder", default="", help="folder of the model in which its weights are, such as checkpoints/qwen2_5_vl"
    )
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
    check_model(args.model, args.revision, args.subfolder)
    transformers.utils.logging.disable_progress_bar()  # of "Loading weights", which would stand between the answers
    pruning = {**dict(args.pruning), **(pruning or {})}
    options = {"revision": args.revision, "trust_remote_code": True, "pruning": pruning}
    if args.subfolder:
        options["subfolder"] = args.subfolder
    dtype = DTYPES.get(args.dtype, args.dtype)
    auto_class = transformers.AutoModelForImageTextToText
    model = auto_class.from_pretrained(args.model, dtype=dtype, attn_implementation=args.attention, **options)
    processor = transformers.AutoProcessor.from_pretrained(args.model, **options)
    return model.to(args.device).eval(), processor


def check_model(model: str, revision: str, subfolder: str = "") -> None:
    """Ends the program where a model is neither a folder nor on the Hub, or cannot be had from there."""
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, subfolder, "config.json")):
            fail(
                f"--model {model}{f' --subfolder {subfolder}' if subfolder else ''}: no config.json there; give the folder of a model"
            )
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        fail(f"--model {model}: no such folder, and not a Hub id (NAMESPACE/NAME) either")
    try:
        transformers.utils.cached_file(model, "config.json", revision=revision, subfolder=subfolder)
    except OSError as error:
        fail(f"--model {model} (revision {revision}) cannot be downloaded, and is not in the local cache: {error}")


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


def recorded_command(script: str, argv=None) -> str:
    """
    The command that a result file names.

    Args:
        script: `__file__` of the command.
        argv: what its `main` was given; `None` is what the process was started with.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", Path(script).resolve().relative_to(ROOT).as_posix(), *map(str, arguments)])


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations; some of its versions leave out attention on a CPU."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query, key, value, *args, **kwargs) -> int:
        batch, heads, num_queries, width = query
        return 2 * batch * heads * num_queries * key[2] * (width + value[3])  # of the shapes (B, heads, T, d)

    return FlopCounterMode(display=False, custom_mapping={} if kernel in flop_registry else {kernel: attention})


class _Gate:
    """Stands in for a method: the calls of a thread go through what this thread has wrapped around it, those of others do not."""

    def __init__(self, method, before):
        self.method, self.before, self.wrappers = method, before, defaultdict(list)

    def __call__(self, *args, **kwargs):
        call = self.method
        for wrapper in self.wrappers.get(threading.get_ident(), ()):
            call = partial(wrapper, call)
        return call(*args, **kwargs)


_GATES = threading.Lock()


@contextmanager
def wrapped(owner, name: str, wrapper):
    """
    Inside the block, this thread's calls of the method `owner.name` become `wrapper(method, *args, **kwargs)`. Other threads
    do not notice, and may do the same at the same time.
    """
    thread = threading.get_ident()
    with _GATES:
        before = vars(owner).get(name)
        gate = before if isinstance(before, _Gate) else _Gate(getattr(owner, name), before)
        gate.wrappers[thread].append(wrapper)
        setattr(owner, name, gate)
    try:
        yield
    finally:
        with _GATES:
            gate.wrappers[thread].remove(wrapper)
            if not gate.wrappers[thread]:
                del gate.wrappers[thread]
            if not gate.wrappers:
                delattr(owner, name)
                if gate.before is not None:
                    setattr(owner, name, gate.before)


class FeatureMemory:
    """
    Remembers what the vision tower gave for a batch: the settings differ in what they keep of it, not in what it gives.

    The features are those of the first time, bit for bit, and depend on the batch alone and not on what came before, so that
    processes that share the batches, and threads that share the memory, get the same. A method that prunes inside the tower goes
    past it.
    """

    def __init__(self, model):
        self.known = {}
        self._lock, self._thread = threading.Lock(), threading.local()
        if hasattr(model, "patch_features"):
            self.encode, model.patch_features = model.patch_features, self
        else:  # its tower takes patches of pictures of any size
            self.encode, model.encode_items = model.encode_items, self.fill_items

    def __call__(self, pixels, signals=frozenset(), **kwargs):
        """In the place of `model.patch_features`."""
        if self._goes_past:
            return self.encode(pixels, signals, **kwargs)
        signals = frozenset(signals & TOWER_FIELDS)
        keys = list(map(_fingerprint, pixels))
        pictures = dict(zip(keys, pixels))  # a batch asks several questions about one scene
        batch = (tuple(pictures), pixels.dtype, signals, repr(sorted(kwargs.items())))
        compute = partial(self.encode, torch.stack(list(pictures.values())), signals, **kwargs)
        found = self._remembered(batch, compute)
        places = {key: place for place, key in enumerate(pictures)}
        order = torch.tensor([places[key] for key in keys], device=pixels.device)
        return {name: values[order] for name, values in found.items()}

    def fill_items(self, items, pixels, pruning, signals=None, **kwargs):
        """In the place of `model.encode_items`, where the tower gives the same whatever the method reads."""
        if self._goes_past:
            return self.encode(items, pixels, pruning, signals, **kwargs)
        for kind, patches in pixels.items():
            of_kind = [item for item in items if item.layout.kind == kind]
            if not of_kind:
                continue
            tokens = [item.layout.num_tokens for item in of_kind]
            parts = patches.split([number * len(patches) // sum(tokens) for number in tokens])
            keys = [(_fingerprint(part), item.layout) for part, item in zip(parts, of_kind, strict=True)]
            pictures = dict(zip(keys, parts))
            batch = (tuple(pictures), patches.dtype, repr(sorted(kwargs.items())))

            def compute():
                alone = [type(of_kind[0])(layout) for _, layout in pictures]
                self.encode(
                    alone,
                    {**dict.fromkeys(pixels), kind: torch.cat(list(pictures.values()))},
                    pruning,
                    signals,
                    **kwargs,
                )
                return {key: item.sets for key, item in zip(pictures, alone, strict=True)}

            found = self._remembered(batch, compute)
            for item, key in zip(of_kind, keys, strict=True):
                item.sets = found[key]

    def _remembered(self, batch, compute):
        with self._lock:  # so that of two threads with one batch the second gets what the first computed
            if batch not in self.known:
                self.known[batch] = compute()
            return self.known[batch]

    @property
    def _goes_past(self) -> bool:
        return getattr(self._thread, "goes_past", False)

    @contextmanager
    def switched_off(self):
        """Inside the block, this thread's calls go past the memory."""
        self._thread.goes_past = True
        try:
            yield
        finally:
            self._thread.goes_past = False


def _fingerprint(picture: torch.Tensor) -> int:
    return hash(
        picture.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    )  # bfloat16 too, which numpy does not have


class StageTimer:
    """
    Seconds that a model spends in each stage of the calls that this thread makes inside `with timer:`, or what another `clock`
    counts.

    The stages are `vision encoder` (with its pooling), `selection` (with the query), `projector`, `prefill` (the language
    model's first pass) and `decode` (its later ones); `passes` counts the latter. Each thread has a timer of its own.
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
        try:
            yield
            self.seconds[stage] += self.clock() - start
        finally:
            self._inside = False

    def _time(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _as(self, stage_of):
        def timed(call, *args, **kwargs):
            with self._timed(stage_of()):
                return call(*args, **kwargs)

        return timed

    def _language_stage(self):
        self.passes += 1
        return "prefill" if self.passes == 1 else "decode"

    def __enter__(self):
        parts = self.model.model
        towers = {id(tower): tower for tower in (self.model.tower_of(kind)[0] for kind in ("image", "video"))}.values()
        stages = (
            (self.model, "encode_items", lambda: "vision encoder"),
            *(
                (tower, "forward", lambda: "vision encoder") for tower in towers
            ),  # the stock forward calls them directly
            (self.model, "prune_items", lambda: "selection"),
            # Some towers project by themselves.
            *((part, "forward", lambda: "projector") for name, part in parts.named_children() if "projector" in name),
            (parts.language_model, "forward", self._language_stage),
            (self.model, "layers_in_two_parts", self._language_stage),  # in its place, where tokens leave inside
        )
        self._wrapping = ExitStack()
        for owner, name, stage_of in stages:
            self._wrapping.enter_context(wrapped(owner, name, self._as(stage_of)))
        return self

    def __exit__(self, *error):
        self._wrapping.close()
