"""Run by torchrun: every optimizer on a model that FSDP2 has spread over the processes, against the whole model here.

Prints one JSON line from the first process: the largest difference for every subject.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from tests.optim.models import Network, batch, loss_of
from tests.optim.subjects import SUBJECTS, Subject

STEPS = 8


def model() -> Network:
    """The battery's network; FSDP2 takes no 0-d and no empty parameters."""
    made = Network()
    made.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    made.empty = nn.Parameter(torch.ones(1, 3, dtype=torch.float64))  # the second process's part is empty
    return made


def shard(net: nn.Module) -> nn.Module:
    """In groups, as one would shard a transformer's blocks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.first, net.second):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train(net: nn.Module, subject: Subject, mine: slice, first: int, last: int, state: dict | None = None) -> dict:
    """Steps of two backward passes on this process's part of each batch, gradients clipped; returns the optimizer's
    state. The shards add up their gradients after the second pass only."""
    optimizer = subject.make(net, 0.01)
    if state is not None:
        optimizer.load_state_dict(state)
    for seed in range(first, last):
        optimizer.zero_grad()
        for last_pass, number in ((False, seed), (True, 100 + seed)):
            if isinstance(net, FSDPModule):
                net.set_requires_gradient_sync(last_pass)
            tokens, x, y = batch(number)
            (0.5 * loss_of(net, (tokens[mine], x[mine], y[mine]))).backward()
        clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return optimizer.state_dict()


def difference(subject: Subject) -> float:
    """Largest difference of any weight after some steps, a save and a load in between included."""
    rank, size = dist.get_rank(), 16 // dist.get_world_size()
    alone, spread = model(), shard(model())
    train(alone, subject, slice(None), 0, STEPS)
    state = train(spread, subject, slice(rank * size, (rank + 1) * size), 0, STEPS // 2)
    train(spread, subject, slice(rank * size, (rank + 1) * size), STEPS // 2, STEPS, state)
    worst = 0.0
    for a, b in zip(alone.parameters(), spread.parameters(), strict=True):
        assert isinstance(b, DTensor)
        full: Tensor = b.full_tensor()
        if a.numel():
            worst = max(worst, (a - full).abs().max().item())
    return worst


def skips_together(subject: Subject) -> bool:
    """One process's NaN: all of them skip the step."""
    net = shard(model())
    optimizer = subject.make(net, 0.01, on_nonfinite="skip")
    loss_of(net, batch(0)).backward()
    weight = net.second.weight
    before = weight.full_tensor().clone()
    if dist.get_rank() == 1:
        weight.grad.to_local().fill_(float("nan"))
    optimizer.step()
    return torch.equal(weight.full_tensor(), before)


def main() -> None:
    """All subjects."""
    dist.init_process_group("gloo")
    results = {subject.name: difference(subject) for subject in SUBJECTS}
    results["skips"] = float(skips_together(SUBJECTS[0]))
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo can outlive the interpreter's end


if __name__ == "__main__":
    main()
