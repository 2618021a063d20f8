"""Parameters that are spread over processes (DTensors, as FSDP2's `fully_shard` makes them).

An optimizer's state is spread as its parameter is. What works entry by entry works on the local part; what needs the
whole tensor (a Newton-Schulz iteration, a Gram matrix) gathers it, computes the same on every process, and keeps the
local part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(x: Tensor) -> Tensor:
    """This process's part of `x`, sharing its memory; `x` itself where it is an ordinary tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, the local part of something shaped as `parameter`, spread as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor whose local part is `part`; every process must call it."""
    spread = like(part, parameter)
    return spread.full_tensor() if isinstance(spread, DTensor) else spread


def part_of(full: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of `whole`: this process's part of `full`, without communication."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def total(value: Tensor, parameter: Tensor) -> Tensor:
    """Sum of `value`, a number of this process's part of `parameter`, over the parts."""
    if isinstance(parameter, DTensor):
        value = value.clone()
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dist.all_reduce(value, group=parameter.device_mesh.get_group(dim))
    return value


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity, on any process: they must agree on whether to step."""
    parts = [part for g in gradients if (part := local(g)).numel()]
    finite = _parts_finite(parts)
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    if not meshes:
        return finite
    bad = torch.tensor(0.0 if finite else 1.0)
    for mesh in meshes:
        bad = bad.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(bad, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return not bool(bad)


def _parts_finite(parts: list[Tensor]) -> bool:
    """A sum is finite only if its terms are, at a tenth of the cost of looking at them; but it can overflow."""
    devices = {part.device for part in parts}
    for device in devices:
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts if part.device == device])
        if not sums.isfinite().all() and not all(part.isfinite().all() for part in parts):
            return False
    return True
