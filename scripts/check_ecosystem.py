"""Runs a variant through the tools around transformers, and writes down what works on the installed version.

Every row does the thing for real on the CPU and compares with plain generation. Results go to OUTPUT.json, one entry for each
version of transformers that the script was run with; OUTPUT.md is the table of all of them. A row whose package is not
installed is written as such. OTHER_PYTHON in the environment is an interpreter with the other line of transformers, which
loads what this one publishes.

Examples:
    OTHER_PYTHON=.venv-4/bin/python python scripts/check_ecosystem.py --output docs/ecosystem
    python scripts/check_ecosystem.py --output docs/ecosystem --method rediprune_plus
    python scripts/check_ecosystem.py --output runs/ecosystem --model my-variant --rows offload serve
"""

import argparse
import base64
import contextlib
import copy
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from repository import ROOT, environment, fail, output_prefix, write_results

NEW_TOKENS = 6
QUESTION = "what colour is the star?"
ROWS = {}


def row(title: str):
    def register(function):
        ROWS[function.__name__] = (title, function)
        return function

    return register


class Case:
    """The variant that is tried, its inputs, and the answers of plain generation in fp32."""

    def __init__(self, folder: str):
        self.folder = folder
        self.processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.inputs = video_inputs(self.processor)
        self.model = self.load()
        self.expected = self.answer(self.model)

    def load(self, **kwargs):
        kwargs.setdefault("dtype", torch.float32)
        auto_class = transformers.AutoModelForImageTextToText
        model = auto_class.from_pretrained(self.folder, trust_remote_code=True, **kwargs).eval()
        model.generation_config.eos_token_id = -1  # all answers are of one length
        return model

    def answer(self, model, **kwargs) -> list:
        inputs = self.inputs_for(model)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    def same(self, model, **kwargs) -> str:
        """Says that the answer is that of plain generation, or raises."""
        found = self.answer(model, **kwargs)
        if found != self.expected:
            raise AssertionError(f"answers {found} instead of {self.expected}")
        return "same answer as plain generation"

    @torch.no_grad()
    def logits(self, model) -> torch.Tensor:
        return model(**self.inputs_for(model)).logits[0, -1].float()

    def inputs_for(self, model):
        return copy.copy(self.inputs).to(model.device, model.dtype)  # which changes what it is called on

    def close(self, model, limit: float) -> str:
        """Says how far the logits are from those of fp32, or raises."""
        expected = self.logits(self.model)
        difference = ((self.logits(model) - expected).norm() / expected.norm()).item()
        if not difference < limit:
            raise AssertionError(f"logits differ by {difference:.2%}")
        return f"logits within {difference:.2%} of fp32"


def video_inputs(processor, seed: int = 0):
    frames = np.random.default_rng(seed).integers(0, 256, (4, 96, 96, 3), dtype=np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, videos=[frames], return_tensors="pt")


# -- rows --------------------------------------------------------------------------------------------------------------


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
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "model.image_newline": "cpu"}
        places |= {"model.language_model": "disk", "lm_head": "cpu"}
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
    config = case.model.config
    # Candidates are copied from the prompt: without this they hold placeholders that have no media.
    banned = [[config.image_token_id], [config.video_token_id]]
    said = case.same(case.model, prompt_lookup_num_tokens=2, bad_words_ids=banned)
    return f"{said}, with `bad_words_ids=[[image_token_id], [video_token_id]]`; without it the stock class fails, too"


@row("assisted generation, assistant model")
def assistant(case):
    return case.same(case.model, assistant_model=copy.deepcopy(case.model))


@row("weight-only int8 on the CPU (torchao)")
def torchao_int8(case):
    from torchao.quantization import Int8WeightOnlyConfig

    skipped = ["vision_tower", "multi_modal_projector", "lm_head"]
    config = transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    return case.close(case.load(quantization_config=config), 0.1)


@row("weight-only int8 on the CPU (quanto)")
def quanto_int8(case):
    import optimum.quanto  # noqa: F401

    skipped = ["vision_tower", "multi_modal_projector", "lm_head"]
    config = transformers.QuantoConfig(weights="int8", modules_to_not_convert=skipped)
    return case.close(case.load(quantization_config=config), 0.1)


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


def run_ranks(case, job: str, launcher: str = "torchrun") -> dict:
    """Runs this file as `job` on two processes, and returns what the first one prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port}"]
    else:
        # Its --cpu starts several processes through MPI alone; --multi_gpu does it through torch, on the CPU, too.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [f"--main_process_port={port}"]
    command += [__file__, "--rank-job", job, "--model", case.folder, "--output", "-"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = re.search(r"^RESULT (.*)$", result.stdout, re.MULTILINE)
    if result.returncode or not found:
        raise AssertionError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no result")
    return json.loads(found.group(1))


@row("data parallel over two CPU processes (`torchrun`, gloo)")
def data_parallel(case):
    found = run_ranks(case, "data")
    if found["gradient difference"] > 1e-5:
        raise AssertionError(f"gradients differ by {found['gradient difference']}")
    return "averaged gradients of two half batches are those of the whole batch"


@row("answers by two CPU processes, each its share (`torchrun`, gloo)")
def share_torchrun(case):
    return shared_answers(run_ranks(case, "share"))


@row("answers by two CPU processes, each its share (`accelerate launch`)")
def share_accelerate(case):
    import accelerate  # noqa: F401

    return shared_answers(run_ranks(case, "share", "accelerate"))


def shared_answers(found: dict) -> str:
    if found["shares"] != [2, 2] or found["answers"] != found["expected"]:
        raise AssertionError(f"not the answers of one process: {found}")
    return "two of four prompts each; together the answers of a single process"


@row("tensor parallel over two CPU processes (`torchrun`, gloo)")
def tensor_parallel(case):
    found = run_ranks(case, "tensor")
    if found["logits difference"] > 1e-3:
        raise AssertionError(f"logits differ by {found['logits difference']}")
    return f"logits within {found['logits difference']:.0e} of one process; {found['sharded']} parameters sharded"


@row("`transformers serve` with an OpenAI client and an image")
def serve(case):
    if int(transformers.__version__.split(".")[0]) < 5:
        raise NotImplementedError("answers about images from 5.x on")
    import openai
    import uvicorn  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    if not Path(command[0]).exists():
        command[:1] = [sys.executable, "-m", "transformers.cli.transformers"]
    command += ["--trust-remote-code", "--device", "cpu"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)
            wait_for(port, server)
            buffer = io.BytesIO()
            noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(noise).save(buffer, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
            chat = [{"role": "user", "content": content}]
            reply = client.chat.completions.create(model=case.folder, messages=chat, max_tokens=NEW_TOKENS)
            stream = client.chat.completions.create(
                model=case.folder, messages=chat, max_tokens=NEW_TOKENS, stream=True
            )
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        except Exception as error:
            log.seek(0)
            raise AssertionError(f"{error}; server: {log.read()[-3000:]}") from error
        finally:
            server.terminate()
            server.wait()
    text = reply.choices[0].message.content
    if text.strip() != streamed.strip():
        raise AssertionError(f"the streamed answer {streamed!r} is not the whole one {text!r}")
    return f"answers in one piece and streamed; prompt of {reply.usage.prompt_tokens} tokens"


def wait_for(port: int, server, seconds: int = 600) -> None:
    end = time.time() + seconds
    while time.time() < end:
        if server.poll() is not None:
            raise AssertionError("the server ended")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise AssertionError("the server did not start")


@row("exported by `--copy` and `--link`, pushed, loaded by id on the other version")
def published(case):
    """On a Hub of this process; everything else happens in fresh ones."""
    if not os.environ.get("OTHER_PYTHON"):
        raise NotImplementedError("not run: OTHER_PYTHON names no interpreter")
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from hub_server import Hub

    notes = []
    with Hub() as hub, tempfile.TemporaryDirectory() as home:
        hub.add_token("hf_me", "me")
        hub.add_repository("me/stock", stock_files(case.folder))
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


def stock_files(folder: str) -> dict:
    """The variant as the stock checkpoint that it was made from, with the names of the public ones; bytes by file name."""
    files = {
        path.name: path.read_bytes()
        for path in Path(folder).iterdir()
        if path.suffix in (".json", ".jinja", ".safetensors")
    }
    config, processor = (json.loads(files[name]) for name in ("config.json", "processor_config.json"))
    for values in (config, processor):
        values.pop("auto_map")
    config.pop("pruning")
    config |= {"model_type": "llava_next_video", "architectures": ["LlavaNextVideoForConditionalGeneration"]}
    processor["processor_class"] = "LlavaNextVideoProcessor"
    return {
        **files,
        "config.json": json.dumps(config).encode(),
        "processor_config.json": json.dumps(processor).encode(),
    }


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
        command = [os.environ["OTHER_PYTHON"], __file__, "--show", "--model", name, "--output", "-"]
        return json.loads(run_fresh(command, {**variables, "HF_HOME": home}).splitlines()[-1])


# -- jobs of several processes -----------------------------------------------------------------------------------------


def run_rank_job(folder: str, job: str) -> None:
    torch.distributed.init_process_group("gloo")
    case = Case(folder)
    result = {"data": data_job, "share": share_job, "tensor": tensor_job}[job](case)
    if torch.distributed.get_rank() == 0:
        print("RESULT", json.dumps(result), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def data_job(case) -> dict:
    rank = torch.distributed.get_rank()
    batch = {name: torch.cat([value, value.flip(0)]) for name, value in case.inputs.items() if torch.is_tensor(value)}
    batch["pixel_values_videos"][1] *= 0.5
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    case.model(**batch, labels=labels).loss.backward()
    expected = case.model.lm_head.weight.grad.clone()
    case.model.zero_grad()
    half = {name: value[rank : rank + 1] for name, value in {**batch, "labels": labels}.items()}
    parallel = torch.nn.parallel.DistributedDataParallel(case.model, find_unused_parameters=True)
    parallel(**half).loss.backward()
    return {"gradient difference": (case.model.lm_head.weight.grad - expected).abs().max().item()}


def share_job(case) -> dict:
    """Each process answers its own of four prompts, and all answers are then gathered."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def answers(seeds) -> list:
        found = []
        for seed in seeds:
            case.inputs = video_inputs(case.processor, seed)
            found.append(case.answer(case.model))
        return found

    shares = [None] * size
    torch.distributed.all_gather_object(shares, answers(range(rank, 4, size)))
    together = [shares[index % size][index // size] for index in range(4)]
    return {"shares": list(map(len, shares)), "answers": together, "expected": answers(range(4)) if rank == 0 else None}


def tensor_job(case) -> dict:
    expected = case.logits(case.model)
    model = case.load(tp_plan="auto")
    sharded = sum(
        type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "device_mesh")
        for parameter in model.parameters()
    )
    full = sum(p.numel() for p in case.model.parameters())
    local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
    if local >= full:
        raise AssertionError("no parameter was sharded")
    difference = (case.logits(model) - expected).abs().max().item()
    return {"logits difference": difference, "sharded": f"{full - local} of {full} ({sharded} tensors)"}


# -- the table ---------------------------------------------------------------------------------------------------------


def run_rows(case, names) -> dict:
    results = {}
    for name in names:
        title, function = ROWS[name]
        start = time.perf_counter()
        try:
            results[name] = {"works": True, "note": function(case)}
        except ImportError as error:
            results[name] = {"works": None, "note": f"not installed: {error.name or error}"}
        except NotImplementedError as error:
            results[name] = {"works": None, "note": str(error)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            results[name] = {"works": False, "note": f"{type(error).__name__}: {lines[0][:300]}"}
        mark = {True: "works", False: "FAILS", None: "-"}[results[name]["works"]]
        print(f"{mark:6} {title}: {results[name]['note']} ({time.perf_counter() - start:.0f} s)", flush=True)
    return results


# What the test suite says beside the rows.
NOTES = """
## What the tests run

- **Pipelines** (`tests/model/test_pipelines.py`): `image-text-to-text` on both lines and `any-to-any` on 5.x, with chats about images,
  videos and several media, several chats, batches of prompts, and streaming (`generate_kwargs={"streamer": ...}`). A keep ratio for
  one call: `processor_kwargs={"keep_ratio": 0.3}` for chats on 5.x, `keep_ratio=0.3` outside of a chat on both; chat pipelines of
  4.57 pass nothing on to the processor, so there it is set for the pipeline, in `pipe.processor.pruning.keep_ratio` and
  `pipe.model.config.pruning.keep_ratio`. A `batch_size` above 1 is for media of one kind and size, as with every model: pipelines
  concatenate their pixels, and those of 4.57 cannot do it with videos.
- **A Hub** on loopback (`tests/hub/test_hub.py`): pushed, loaded by id through every Auto class, pinned, private, gated, moved, offline,
  linked, broken off. Set `OTHER_PYTHON` to an interpreter with the other line of transformers, and each loads what the other pushed.
- **Generation** (`tests/model/test_generation.py`): greedy, sampled, beams, sampled beams, several sequences, assisted, prompt lookup, no
  cache, dynamic, static and quantised (with quanto) caches, one compiled graph, going on from a cache, embeddings as a prompt, left
  padding, positions of the caller, streamers, and the shapes and values of scores, logits, states and attentions; offloaded caches
  on a GPU alone. The reference is the stock class, which is handed the pruned prompt as embeddings. Contrastive search, group beams,
  constrained beams and DoLa are not run: transformers loads their code from the Hub.
- **transformers' own tests** (`tests/model/test_transformers_suite.py`): `ModelTesterMixin` and `ConfigTester`, from the source archive
  on PyPI, at ratio 1, with half of the tokens, and with `rediprune_plus`. Whatever the stock class passes passes, but for four tests
  whose reasons stand beside them. `GenerationTesterMixin` is not in that archive (which has `tests/*.py` and no folders) and was not
  run; the tests of generation above take its place.
- **What `rediprune_plus` cannot have** (`tests/model/test_modeling.py`): it adds to the logits of attention and leaves gaps between
  positions, so flash attention and a sliding window are refused, with a message that says so.
- **Serving engines**: the processor tells how many placeholders an image or video takes (`_get_num_multimodal_tokens`), which the
  tests compare with real prompts. No engine but `transformers serve` was run.
"""


def as_document(record: dict) -> str:
    versions = sorted(record)
    lines = ["# What works with which version", "", "Measured by `scripts/check_ecosystem.py` on the CPU.", ""]
    lines += as_table({version: record[version]["rows"] for version in versions})
    for version in versions:
        packages = ", ".join(f"{key} {value}" for key, value in record[version]["packages"].items())
        lines.append(f"transformers {version}: {packages}; {record[version]['environment']['date']}")
    for method in sorted({method for entry in record.values() for method in entry.get("methods", {})}):
        lines += ["", f"## The same with `method: {method}`", ""]
        lines += as_table({version: record[version].get("methods", {}).get(method, {}) for version in versions})[:-1]
    return "\n".join(lines) + "\n" + NOTES


def as_table(results: dict) -> list:
    """The lines of a table with a column for each version, and an empty one."""
    lines = [
        "| | " + " | ".join(f"transformers {version}" for version in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name, (title, _) in ROWS.items():
        cells = []
        for rows in results.values():
            result = rows.get(name)
            mark = "" if result is None else {True: "yes: ", False: "**no**: ", None: ""}[result["works"]]
            cells.append("not run" if result is None else f"{mark}{result['note']}".replace("|", "\\|"))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def package_versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "accelerate", "peft", "torchao", "optimum-quanto", "huggingface_hub", "openai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


@contextlib.contextmanager
def with_method(folder: str, method):
    """A folder with the files of the variant and another method in config.json; the variant itself for `None`."""
    if method is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="variant_") as copied:
        for path in Path(folder).iterdir():
            if path.is_file():
                shutil.copyfile(path, Path(copied, path.name))
        config = json.loads(Path(copied, "config.json").read_text())
        config["pruning"] = {"method": method, "keep_ratio": config["pruning"]["keep_ratio"]}
        Path(copied, "config.json").write_text(json.dumps(config))
        yield copied


def show(case) -> None:
    logits = case.logits(case.model).tolist()
    print(json.dumps({"version": transformers.__version__, "logits": logits, "answer": case.expected}))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the table goes: OUTPUT.json, OUTPUT.md")
    parser.add_argument("--model", default=str(ROOT), help="folder of a variant (default: this repository)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument(
        "--method", help="another method than that of its config.json, with its own choices; a table of its own"
    )
    parser.add_argument("--rank-job", help=argparse.SUPPRESS)
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.show or args.rank_job):
        args.output = output_prefix(args.output)
        read_record(args.output)
    return args


def read_record(output: Path) -> dict:
    """What earlier runs wrote; ends the program where it cannot be added to."""
    path = output.with_name(output.name + ".json")
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        fail(
            f"{path} cannot be read ({error}), and results are added to it; choose another --output, or remove that file"
        )


def main():
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.rank_job:
        return run_rank_job(args.model, args.rank_job)
    try:
        with with_method(args.model, args.method) as folder:
            case = Case(folder)
            if args.show:
                return show(case)
            add_results(args, case, run_rows(case, args.rows))
    except (OSError, ValueError) as error:
        fail(str(error))


def add_results(args, case, rows: dict) -> None:
    """Adds the rows to those of this version and method that OUTPUT.json has already."""
    record = read_record(args.output)
    entry = record.setdefault(transformers.__version__, {"rows": {}})
    entry |= {"environment": environment(case.model), "packages": package_versions()}
    place = entry["rows"] if args.method is None else entry.setdefault("methods", {}).setdefault(args.method, {})
    place.update(rows)
    write_results(args.output, {".json": json.dumps(record, indent=2) + "\n", ".md": as_document(record)})


if __name__ == "__main__":
    main()
