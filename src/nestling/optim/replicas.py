"""The processes whose gradients are averaged into one, for statistics that must cover what the gradient covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Replicas:
    """Where the gradients of a parameter come from.

    A parameter that FSDP2 has spread says so itself: its mesh. That an ordinary one is averaged by
    DistributedDataParallel cannot be seen on it, and several processes may as well train models of their own, for which
    waiting for each other would never end. So the group is given.

    Attributes:
        group: the processes whose gradients of ordinary parameters are averaged; None is this process alone.
    """

    group: dist.ProcessGroup | None = None

    def groups(self, parameter: Tensor) -> list[dist.ProcessGroup]:
        """The groups over which one sums in turn to sum over all processes behind a parameter's gradient."""
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            return [mesh.get_group(dim) for dim in range(mesh.ndim)]
        return [] if self.group is None else [self.group]

    def count(self, parameter: Tensor) -> int:
        """Number of those processes."""
        count = 1
        for group in self.groups(parameter):
            count *= dist.get_world_size(group)
        return count

    def add_up(self, value: Tensor, parameter: Tensor) -> Tensor:
        """`value` summed, in place, over those processes; every one of them must call it."""
        for group in self.groups(parameter):
            dist.all_reduce(value, group=group)
        return value

    def check_forward(self) -> None:
        """Called inside a forward pass.

        Raises:
            ValueError: DistributedDataParallel runs it over several processes, and no group was given.
        """
        if self.group is not None:
            return
        # torch keeps the wrapper at work for its compiler. Without that attribute there is no check, and no harm.
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is not None and dist.get_world_size(wrapper.process_group) > 1:
            raise ValueError(
                "DistributedDataParallel averages the gradients of several processes, and the optimizer sees the layer "
                "inputs of this one only: give it process_group=torch.distributed.group.WORLD"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        """Itself: a process group cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Nor can it be pickled, but all processes together are known by a name.

        Raises:
            TypeError: of another group.
        """
        if self.group is None:
            return Replicas, ()
        if self.group is dist.group.WORLD:
            return _everyone, ()
        raise TypeError(
            "an optimizer that watches layers cannot be pickled with a process_group other than "
            "torch.distributed.group.WORLD, which only its own process knows: save its state_dict()"
        )


def _everyone() -> Replicas:
    return Replicas(dist.group.WORLD if dist.is_initialized() else None)
