"""The rows of the ecosystem's table: each does one thing for real on the CPU, and compares with plain generation.

A row is a function of a `Case` that returns what the table tells of it, and raises AssertionError where it does not work,
ImportError where a package is missing, and NotImplementedError, with the reason, where it cannot be run.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from ecosystem_case import NEW_TOKENS, QUESTION
from ecosystem_ranks import run_ranks
from repository import ROOT

ROWS = {}


def row(title: str):
    def register(function):
        ROWS[function.__name__] = (title, function)
        return function

    return register


@row("`dtype=torch.bfloat16`")
def bfloat16(case):
    return case.close(case.load(dtype=torch.bfloat16), 0.1)


@row("`dtype=torch.float16`")
def float16(case):
    return case.close(case.load(dtype=torch.float16), 0.02)


@row('`attn_implementation="eager"`')
def eager(case):
    return case.same(case.load(attn_implementation="eager"))


@row("`device_map` with layers offloaded to disk")
def offload(case):
    import accelerate  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        on_disk = ("multi_modal_projector", "language_model")
        parts = [*case.model.model.named_children(), *case.model.model.named_parameters(recurse=False)]
        places = {f"model.{name}": "disk" if name in on_disk else "cpu" for name, _ in parts} | {"lm_head": "cpu"}
        model = case.load(device_map=places, offload_folder=folder)
        return f"{case.same(model)}; on disk: {', '.join(k for k, v in places.items() if v == 'disk')}"


@row('`device_map="auto"` with little CPU memory')
def offload_auto(case):
    import accelerate  # noqa: F401

    size = sum(parameter.numel() * 4 for parameter in case.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model = case.load(device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=folder)
        places = set(map(str, getattr(model, "hf_device_map", {}).values()))
        return f"{case.same(model)}; places: {', '.join(sorted(places))}"


@row('`generate(cache_implementation="static")`')
def static_cache(case):
    return case.same(case.model, cache_implementation="static")


@row("`torch.compile` of decoding, static cache")
def compiled(case):
    config = transformers.generation.CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # generate compiles by itself on accelerators alone
    torch._inductor.config.force_disable_caches = True  # so that the time is that of a first run
    start = time.perf_counter()
    said = case.same(copy.deepcopy(case.model), cache_implementation="static", compile_config=config)
    frames = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    if not frames:
        raise AssertionError("nothing was compiled")
    return f"{said}; {frames} graphs, {time.perf_counter() - start:.0f} s"


@row("assisted generation, prompt lookup")
def prompt_lookup(case):
    # Candidates are copied from the prompt: without this they hold placeholders that have no media.
    banned = [[getattr(case.processor, f"{kind}_token_id")] for kind in case.processor.placeholders]
    said = case.same(case.model, prompt_lookup_num_tokens=2, bad_words_ids=banned)
    return f"{said}, with the placeholders in `bad_words_ids`"


@row("assisted generation, assistant model")
def assistant(case):
    return case.same(case.model, assistant_model=copy.deepcopy(case.model))


def close_and_answer(case, model) -> str:
    same = "the same answer" if case.answer(model) == case.expected else "another answer"
    return f"{case.close(model, 0.1)}; {same}"


@row("weight-only int8 on the CPU (torchao)")
def torchao_int8(case):
    from torchao.quantization import Int8WeightOnlyConfig

    skipped = ["vision_tower", "multi_modal_projector", "lm_head"]
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    return close_and_answer(case, case.load(quantization_config=config))


@row("weight-only int8 on the CPU (quanto)")
def quanto_int8(case):
    import optimum.quanto  # noqa: F401

    skipped = ["vision_tower", "multi_modal_projector", "lm_head"]
    config = transformers.QuantoConfig(weights="int8", modules_to_not_convert=skipped)
    return close_and_answer(case, case.load(quantization_config=config))


@row("LoRA on pruned inputs (PEFT)")
def lora(case):
    return train_adapter(case)


@row("LoRA on a linked variant (PEFT)")
def lora_linked(case):
    """The variant holds no weights: those of `case` are linked."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "linked"
        folder.mkdir()
        for path in Path(case.folder).iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "weights_from": os.path.abspath(case.folder)}))
        linked = copy.copy(case)
        linked.folder = str(folder)
        return train_adapter(linked)


def train_adapter(case) -> str:
    import peft

    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(case.load(), config)
    inputs = dict(case.inputs)
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss does not fall: {losses}")
    trained = case.logits(model.eval())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(case.load(), folder)
        difference = (case.logits(again.eval()) - trained).abs().max().item()
    if difference > 1e-5:
        raise AssertionError(f"the adapter's logits change by {difference} when it is reloaded")
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in 5 steps; the adapter reloads with the same logits"


@row("LoRA by `scripts/finetune.py`, stopped and gone on with")
def finetune(case):
    import peft

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--model", case.folder, "--output", folder]
        command += ["--batch-size", "2", "--dtype", "float32", "--threads", "1", "--save-every", "2", "--steps"]
        for steps in ("2", "4"):
            said = run_fresh([*command, steps], {}).splitlines()[-1]
        adapted = peft.PeftModel.from_pretrained(case.load(), folder).eval()
        if torch.equal(case.logits(adapted), case.logits(case.model)):
            raise AssertionError("the adapter changes nothing")
    return said.partition(";")[0]


@row("data parallel over two CPU processes (`torchrun`, gloo)")
def data_parallel(case):
    found = run_ranks(case.folder, "data")
    if found["gradient difference"] > 1e-5:
        raise AssertionError(f"gradients differ by {found['gradient difference']}")
    return "averaged gradients of two half batches are those of the whole batch"


@row("answers by two CPU processes, each its share (`torchrun`, gloo)")
def share_torchrun(case):
    return shared_answers(run_ranks(case.folder, "share"))


@row("answers by two CPU processes, each its share (`accelerate launch`)")
def share_accelerate(case):
    import accelerate  # noqa: F401

    return shared_answers(run_ranks(case.folder, "share", "accelerate"))


def shared_answers(found: dict) -> str:
    if found["shares"] != [2, 2] or found["answers"] != found["expected"]:
        raise AssertionError(f"not the answers of one process: {found}")
    return "two of four prompts each; together the answers of a single process"


@row("tensor parallel over two CPU processes (`torchrun`, gloo)")
def tensor_parallel(case):
    found = run_ranks(case.folder, "tensor")
    if found["logits difference"] > 1e-3:
        raise AssertionError(f"logits differ by {found['logits difference']}")
    return f"logits within {found['logits difference']:.0e} of one process; {found['sharded']} parameters sharded"


@row("`transformers serve` with an OpenAI client; media as data URLs")
def serve(case):
    if transformers.__version__.startswith("4."):
        raise NotImplementedError("transformers 4 serves no images and videos")
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
    from serving import Server, part_of
    from tiny import random_image, random_video, write_video

    with tempfile.TemporaryDirectory() as folder:
        files = {"image": Path(folder, "image.png"), "video": Path(folder, "video.mp4")}
        random_image().save(files["image"])
        write_video(files["video"], random_video(frames=12))
        kinds, lengths = list(case.processor.placeholders), []
        with Server(Path(folder, "log")) as server:
            for kind in kinds:
                content = [part_of(files[kind]), {"type": "text", "text": QUESTION}]
                text, length = server.ask(case.folder, content, NEW_TOKENS)
                streamed, _ = server.ask(case.folder, content, NEW_TOKENS, stream=True)
                if text != streamed:
                    raise AssertionError(f"the streamed answer {streamed!r} is not the whole one {text!r}")
                lengths.append(f"{kind}: prompt of {length} tokens")
    return f"the same answer in one piece and streamed; {', '.join(lengths)}"


@row("exported by `--copy` and `--link`, pushed, loaded by id on the other version")
def published(case):
    """On a Hub of this process; everything else happens in fresh ones."""
    if not os.environ.get("OTHER_PYTHON"):
        raise NotImplementedError("OTHER_PYTHON names no interpreter")
    from hub_server import Hub

    notes = []
    with Hub() as hub, tempfile.TemporaryDirectory() as home:
        hub.add_token("hf_me", "me")
        hub.add_repository("me/stock", stock_files(case))
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        pruning = case.model.config.pruning
        for weights in ("--copy", "--link"):
            name = weights.strip("-")
            command = [
                sys.executable,
                str(ROOT / "scripts" / "export.py"),
                "me/stock",
                weights,
                "--method",
                pruning.method,
            ]
            command += [
                "--keep-ratio",
                str(pruning.keep_ratio),
                "--output",
                f"{home}/{name}",
                "--push-to-hub",
                f"me/{name}",
            ]
            run_fresh(command, variables)
            found = load_elsewhere(f"me/{name}", variables)
            difference = (torch.tensor(found["logits"]) - case.logits(case.model)).abs().max().item()
            if found["answer"] != case.expected or difference > 1e-4:
                raise AssertionError(
                    f"{name}: answers {found['answer']} instead of {case.expected}; logits differ by {difference}"
                )
            size = sum(path.stat().st_size for path in Path(home, name).iterdir())
            same = "bit for bit" if difference == 0 else f"within {difference:.0e}"
            notes.append(
                f"`{weights}` is {size / 1e6:.2f} MB, and on {found['version']} answers the same, its logits {same}"
            )
    return "; ".join(notes)


def stock_files(case) -> dict:
    """The variant as the stock checkpoint that it was made from; the content of its files by name."""
    endings = (".json", ".jinja", ".safetensors")
    files = {path.name: path.read_bytes() for path in Path(case.folder).iterdir() if path.suffix in endings}
    config, processor = (json.loads(files[name]) for name in ("config.json", "processor_config.json"))
    for values in (config, processor):
        values.pop("auto_map")
    config.pop("pruning")
    config |= {"model_type": case.model.config.base_model_type, "architectures": [stock_name(case.model)]}
    processor["processor_class"] = stock_name(case.processor)
    changed = {"config.json": config, "processor_config.json": processor}
    return files | {name: json.dumps(values).encode() for name, values in changed.items()}


def stock_name(thing) -> str:
    return next(cls.__name__ for cls in type(thing).__mro__ if cls.__module__.startswith("transformers.models."))


def run_fresh(command: list, variables: dict) -> str:
    """What the command prints, in an environment without settings of the Hub other than `variables`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(command, capture_output=True, text=True, env={**own, **variables})
    if result.returncode:
        raise AssertionError(result.stderr.strip()[-300:])
    return result.stdout


def load_elsewhere(name: str, variables: dict) -> dict:
    """Version, logits and answer of a variant that the other line loads by its id, with a cache of its own."""
    with tempfile.TemporaryDirectory() as home:
        command = [
            os.environ["OTHER_PYTHON"],
            str(Path(__file__).with_name("check_ecosystem.py")),
            "--show",
            "--model",
            name,
            "--output",
            "-",
        ]
        return json.loads(run_fresh(command, {**variables, "HF_HOME": home}).splitlines()[-1])
