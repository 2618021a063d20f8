"""Levels of parameters that FSDP2 shards over two processes do what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from nestling.optim import DeltaGradientDescent, MultiFrequency, OptimizerLevel

STEPS = 7
INNER = {"adamw": lambda model: AdamW, "delta": lambda model: partial(DeltaGradientDescent, lr=0.1, model=model)}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def make_optimizer(model: nn.Sequential, name: str) -> MultiFrequency:
    fast, slow = OptimizerLevel(model[0].parameters()), OptimizerLevel(model[2].parameters(), period=3)
    inner: Any = INNER[name](model)
    return MultiFrequency({"fast": fast, "slow": slow}, optimizer=inner)


def train(model: nn.Sequential, optimizer: MultiFrequency, first: int, last: int) -> None:
    for step in range(first, last + 1):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def work(rank: int, folder: Path) -> None:
    """One of the two processes: some steps, a resume from its own shards, the rest; rank 0 writes the weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in INNER:
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = make_optimizer(model, name)
        train(model, optimizer, 1, 4)
        weights = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(weights) == 4 and all(isinstance(optimizer.state[p]["accumulated"], DTensor) for p in weights[2:])
        saved = optimizer.state_dict()
        resumed = make_optimizer(model, name)
        resumed.load_state_dict(saved)
        train(model, resumed, 5, STEPS)
        whole = [p.full_tensor().detach() for p in weights]
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def test_two_shards_equal_one_process(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in INNER:
        model = make_model()
        train(model, make_optimizer(model, name), 1, STEPS)
        for found, wanted in zip(torch.load(tmp_path / f"{name}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
