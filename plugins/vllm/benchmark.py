#!/usr/bin/env python3
"""
Requests per second and time to the first token of `vllm serve`, pruned beside unpruned, in turns.

    python plugins/vllm/benchmark.py --output docs/results/serving-vllm

The model has the architecture of LLaVA-NeXT-Video and random weights. What counts is where the time goes: a frame costs the vision
tower about a sixth of what it costs the unpruned language model, as with the 7B checkpoint. Each round asks for every number of
clients once unpruned (`keep_ratio=1`) and once pruned, of one server; each request has a video of its own, so that no cache helps.
"""

import argparse
import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import av
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from repository import environment, recorded_command  # noqa: E402

FRAMES, SIDE, PATCH = 8, 192, 8  # 24 x 24 patches a frame, 12 x 12 tokens after pooling
# The command `vllm`, also in the environment of the tests.
VLLM = [sys.executable, str(ROOT / "plugins" / "vllm" / "cli.py")]
QUESTION = "what colour is the star?"


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--requests",
        type=int,
        default=4,
        help="of each cell in a round, and one for each client (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--keep-ratio", type=float, default=0.15)
    parser.add_argument("--method", default="rediprune")
    parser.add_argument("--layers", type=int, default=20, help="of the language model (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="without an ending: a .json and a .md are written")
    return parser.parse_args(argv)


def save_base(folder: Path, layers: int, hidden: int) -> int:
    """A stock LLaVA-NeXT-Video checkpoint with random weights; returns how many parameters its language model has."""
    size = {"height": SIDE, "width": SIDE}
    text = transformers.LlamaConfig(
        vocab_size=464,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    vision = transformers.CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=hidden * 3 // 8,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=max(2, layers * 3 // 10),
        num_attention_heads=hidden * 3 // 8 // 64,
    )
    config = transformers.LlavaNextVideoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=[[SIDE, SIDE * 2], [SIDE * 2, SIDE]],
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextVideoForConditionalGeneration(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({name: weight.clone() for name, weight in model.state_dict().items()}, folder / "model.safetensors")
    processor = transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(
            size=size, crop_size=size, do_center_crop=True, do_sample_frames=True, num_frames=FRAMES
        ),
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=config.image_grid_pinpoints
        ),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(ROOT),
        chat_template=(ROOT / "chat_template.jinja").read_text(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.model.language_model.parameters())


def export(base: Path, variant: Path, method: str, keep_ratio: float) -> None:
    command = [sys.executable, ROOT / "scripts" / "export.py", base, "--link", "--no-check", "--output", variant]
    command += ["--method", method, "--keep-ratio", keep_ratio]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def start_server(variant: Path, dtype: str, log) -> tuple:
    """The process, and its port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*VLLM, "serve", str(variant), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "variant", "--dtype", dtype]
    command += ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
    command += ["--trust-request-mm-kwargs"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return process, port
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                sys.exit(f"the server did not start:\n{Path(log.name).read_text()[-4000:]}")
            time.sleep(1)


def make_video(seed: int) -> str:
    """A video of noise that no other request has, as a data URL."""
    file, draw = io.BytesIO(), np.random.default_rng(seed)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        for _ in range(FRAMES):
            coarse = draw.integers(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(16, 0).repeat(16, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return "data:video/mp4;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client, video: str, keep_ratio: float, new_tokens: int) -> float:
    """Seconds until the first token."""
    parts = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": QUESTION}]
    start, first = time.perf_counter(), None
    stream = client.chat.completions.create(
        model="variant",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_tokens=new_tokens,
        stream=True,
        extra_body={"mm_processor_kwargs": {"keep_ratio": keep_ratio}, "ignore_eos": True},
    )
    for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].finish_reason is None:
            first = time.perf_counter() - start if chunk.choices[0].delta.content is not None else None
    return first if first is not None else time.perf_counter() - start


def measure(port: int, args, finished_round) -> None:
    """Hands on one row for each round, number of clients and ratio, all so far after each round."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
    seeds, rows = count(), []
    for turn in range(-1, args.rounds):  # the first is not counted
        for clients in args.clients if turn >= 0 else [max(args.clients)]:
            for ratio in (1.0, args.keep_ratio):
                videos = [make_video(next(seeds)) for _ in range(max(args.requests, clients))]
                start = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    firsts = list(pool.map(lambda video: ask(client, video, ratio, args.new_tokens), videos))
                seconds = time.perf_counter() - start
                if turn >= 0:
                    row = {"round": turn, "clients": clients, "keep_ratio": ratio}
                    rows.append({**row, "requests_per_second": len(videos) / seconds, "first_token_seconds": firsts})
                    print(clients, ratio, len(videos) / seconds, statistics.median(firsts), flush=True)
        if turn >= 0:
            finished_round(rows)


def summarise(rows: list, args) -> list:
    """For each number of clients the medians, and the gain of each round beside its unpruned neighbour."""
    table = []
    for clients in args.clients:
        of = {
            ratio: [row for row in rows if row["clients"] == clients and row["keep_ratio"] == ratio]
            for ratio in (1.0, args.keep_ratio)
        }
        rates = {ratio: [row["requests_per_second"] for row in group] for ratio, group in of.items()}
        firsts = {
            ratio: [statistics.median(row["first_token_seconds"]) for row in group] for ratio, group in of.items()
        }
        plain, pruned = 1.0, args.keep_ratio
        gains = [new / old for old, new in zip(rates[plain], rates[pruned])]
        sooner = [old / new for old, new in zip(firsts[plain], firsts[pruned])]
        table.append(
            {
                "clients": clients,
                "requests_per_second": {
                    "unpruned": spread(rates[plain]),
                    "pruned": spread(rates[pruned]),
                    "gain": spread(gains),
                },
                "first_token_seconds": {
                    "unpruned": spread(firsts[plain]),
                    "pruned": spread(firsts[pruned]),
                    "gain": spread(sooner),
                },
            }
        )
    return table


def spread(values: list) -> list:
    """Median, smallest, largest."""
    return [statistics.median(values), min(values), max(values)]


def shown(values: list, unit: str = "") -> str:
    middle, low, high = (f"{value:.3g}{unit}" for value in values)
    return f"{middle} ({low} to {high})"


def markdown(report: dict) -> str:
    environment, args = report["environment"], report["arguments"]
    lines = [
        f"# `vllm serve`, {args['method']} at {args['keep_ratio']} beside unpruned",
        "",
        f"Command: `{report['command']}`  ",
        f"{environment['cpu']}, {environment['threads']} threads, cpu, {args['dtype']}, vLLM {environment['vllm']} (CPU build), torch "
        f"{environment['torch']}, transformers {environment['transformers']}, Python {environment['python']}, {environment['date']}, "
        f"{report['minutes']:.1f} minutes; load average of the machine before {report['load_average'][0]:.1f}, after "
        f"{report['load_average'][1]:.1f}.  ",
        f"Random weights, {report['language_parameters'] / 1e6:.0f} million parameters in the language model; videos of {FRAMES} frames, "
        f"{report['visual_tokens']['unpruned']} visual tokens unpruned and {report['visual_tokens']['pruned']} pruned, {args['new_tokens']} "
        f"new tokens. {report['rounds']} rounds of {args['requests']} requests in each cell, and of at least one for each client, after one to warm up, in turns; medians, in brackets "
        "the smallest and the largest round. Every request has a video of its own. The gain is taken round by round.",
        "",
        "| clients | requests a second, unpruned | pruned | gain | first token (s), unpruned | pruned | sooner by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]:
        rate, first = row["requests_per_second"], row["first_token_seconds"]
        cells = [shown(rate["unpruned"]), shown(rate["pruned"]), shown(rate["gain"], "x")]
        cells += [shown(first["unpruned"]), shown(first["pruned"]), shown(first["gain"], "x")]
        lines.append(f"| {row['clients']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    import vllm

    start, load = time.monotonic(), os.getloadavg()[0]
    report = {
        "command": recorded_command(__file__, argv),
        "arguments": {key: value for key, value in vars(args).items() if key != "output"},
        "environment": {**environment(), "vllm": vllm.__version__, "threads": len(os.sched_getaffinity(0))},
    }

    def write(rows):
        report.update(load_average=[load, os.getloadavg()[0]], minutes=(time.monotonic() - start) / 60, rows=rows)
        report["rounds"] = 1 + rows[-1]["round"]
        report["summary"] = summarise(rows, args)
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown(report))

    with tempfile.TemporaryDirectory() as folder:
        base, variant = Path(folder, "base"), Path(folder, "variant")
        base.mkdir()
        report["language_parameters"] = save_base(base, args.layers, args.hidden)
        export(base, variant, args.method, args.keep_ratio)
        processor = transformers.AutoProcessor.from_pretrained(variant, trust_remote_code=True)
        size = [(FRAMES, SIDE, SIDE)]
        report["visual_tokens"] = {
            name: processor._get_num_multimodal_tokens(video_sizes=size, keep_ratio=ratio)["num_video_tokens"][0]
            for name, ratio in (("unpruned", 1.0), ("pruned", args.keep_ratio))
        }
        with open(f"{folder}/log", "w") as log:
            process, port = start_server(variant, args.dtype, log)
            try:
                measure(port, args, write)
            finally:
                process.terminate()
                process.wait(60)
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
