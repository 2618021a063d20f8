"""The past values of a parameter or a momentum that a retention over a window looks at (NL Eq. 59)."""

from __future__ import annotations

import torch
from torch import Tensor

from nestling.optim.memories import Memories


def remembered(memories: Memories, name: str, window: int) -> list[list[Tensor]]:
    """For every parameter, what `remember_` kept of it in the last window - 1 steps, in any order; local parts."""
    slots = [memories.tensors(f"{name}_{i}") for i in range(window - 1)]
    return [[slot[i] for slot in slots[: step - 1]] for i, step in enumerate(memories.steps)]


def remember_(memories: Memories, name: str, window: int, values: list[Tensor]) -> None:
    """Keep copies of these local parts in place of those kept window - 1 steps ago."""
    if window == 1:
        return
    slots = [memories.tensors(f"{name}_{i}") for i in range(window - 1)]
    for i, (value, step) in enumerate(zip(values, memories.steps, strict=True)):
        slots[(step - 1) % (window - 1)][i].copy_(value)


def mean(values: list[Tensor]) -> Tensor:
    """Of tensors of one shape; the tensor itself where there is one."""
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)
