"""Two processes under DistributedDataParallel, half a batch each, do what one process does with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from nestling.optim import (
    DeltaGradientDescent,
    GeneralizedGradientDescent,
    MultiFrequency,
    OjaGradientDescent,
    OptimizerLevel,
)
from nestling.optim.objectives import HUBER

STEPS, PERIOD = 7, 3


class Branching(nn.Module):
    """Rows whose first entry is positive go through one layer more: those of the second process, and no others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.extra = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 4]` to `[B, 3]`."""
        h = torch.tanh(self.first(x))
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        return self.second(h).index_add(0, rows, self.extra(h[rows])) if len(rows) else self.second(h)


def batch(step: int) -> Tensor:
    """Rows of the two processes differ in length by far."""
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    x[:4, 0], x[4:, 0] = -x[:4, 0].abs(), x[4:, 0].abs()
    x[4:] *= 3
    return x


Make = Callable[[nn.Module, dist.ProcessGroup | None], Optimizer]


def slow(kind: type[Optimizer], model: nn.Module, group: dist.ProcessGroup | None) -> Optimizer:
    levels = {
        "fast": OptimizerLevel(model.first.parameters()),
        "slow": OptimizerLevel([*model.second.parameters(), *model.extra.parameters()], PERIOD),
    }
    return MultiFrequency(levels, optimizer=partial(kind, lr=0.3, model=model, process_group=group), reduce="mean")


def plain(kind: type[Optimizer], model: nn.Module, group: dist.ProcessGroup | None, **settings: Any) -> Optimizer:
    return kind(model.parameters(), lr=0.3, model=model, process_group=group, **settings)  # type: ignore[call-arg]


KINDS: dict[str, Make] = {
    "delta": partial(plain, DeltaGradientDescent),
    "delta, step": partial(plain, DeltaGradientDescent, solver="step"),
    "delta, slow level": partial(slow, DeltaGradientDescent),
    "generalized": partial(plain, GeneralizedGradientDescent),
    "generalized, slow level": partial(slow, GeneralizedGradientDescent),
    "generalized, window": partial(plain, GeneralizedGradientDescent, window=3),
    "Oja": partial(plain, OjaGradientDescent),
    "Oja, slow level": partial(slow, OjaGradientDescent),
    "generalized, Huber": partial(plain, GeneralizedGradientDescent, objective=HUBER),
}


def train(model: nn.Module, optimizer: Optimizer, rows: slice, first: int, last: int) -> None:
    """Steps of two backward passes each on some rows of every batch, gradients clipped."""
    for step in range(first, last):
        optimizer.zero_grad()
        for part in (batch(step)[rows], batch(100 + step)[rows]):
            (0.5 * (model(part) - part[:, :3].sin()).square().mean()).backward()
        clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()


def work(rank: int, folder: Path) -> None:
    """One of the two: some steps, a resume from the first process's state, the rest; everyone writes its weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)
    for name, make in KINDS.items():
        model = Branching()
        replica = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = make(model, dist.group.WORLD)
        train(replica, optimizer, rows, 0, 4)
        saved = [optimizer.state_dict()]
        dist.broadcast_object_list(saved)  # as a trainer does, which saves one process's state
        resumed = make(model, dist.group.WORLD)
        resumed.load_state_dict(saved[0])
        train(replica, resumed, rows, 4, STEPS)
        torch.save([p.detach() for p in model.parameters()], folder / f"{name}.{rank}.pt")
    for kind in (DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent):
        alone = Branching()  # of this process: nobody waits for the other, who takes another number of steps
        train(alone, plain(kind, alone, None), rows, 0, 1 + rank)
        with pytest.raises(ValueError, match="give it process_group="):
            train(DistributedDataParallel(alone), plain(kind, alone, None), rows, 0, 1)
    dist.destroy_process_group()


def test_two_replicas_equal_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, make in KINDS.items():
        model = Branching()
        train(model, make(model, None), slice(None), 0, STEPS)
        first, second = (torch.load(tmp_path / f"{name}.{rank}.pt") for rank in range(2))
        for a, b, wanted in zip(first, second, model.parameters(), strict=True):
            assert torch.equal(a, b), name
            torch.testing.assert_close(a, wanted.detach(), rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
