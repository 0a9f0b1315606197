"""What several processes do with one variant on the CPU: `run_ranks` starts them, and they run this file."""

import json
import os
import re
import socket
import subprocess
import sys

import torch
import transformers
from ecosystem_case import Case, question_inputs


def run_ranks(folder: str, job: str, launcher: str = "torchrun") -> dict:
    """Runs a variant through `job` on two processes, and returns what the first one prints."""
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
    command += [__file__, job, folder]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = re.search(r"^RESULT (.*)$", result.stdout, re.MULTILINE)
    if result.returncode or not found:
        raise AssertionError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no result")
    return json.loads(found.group(1))


# -- in each of the processes


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
    pixels = next(name for name in batch if name.startswith("pixel_values"))
    batch[pixels][1] *= 0.5
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
            case.inputs = question_inputs(case.processor, seed)
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


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run_rank_job(folder=sys.argv[2], job=sys.argv[1])
