"""Processes that share out the heads keep the same tokens."""

import json
import os
import subprocess
import sys

import pytest
import torch
from places import SUPPORT

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import code_package
from tiny import tiny_model

rank, store = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = tiny_model()
model._device_mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
rows = torch.tensor([[0.25, 0.5, 0.0], [0.5, 0.25, 0.0]][rank])
print(json.dumps(model.largest_of_heads(rows).tolist()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_largest_of_all_heads_of_both_processes(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(SUPPORT), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert torch.tensor(json.loads(output.splitlines()[-1])).tolist() == [0.5, 0.5, 0.0]
