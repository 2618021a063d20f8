"""The state of the parameters that one call of an equation works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestling.optim.matrices import Kind
from nestling.optim.shards import like, local


@dataclass(frozen=True)
class Memories:
    """Parameters of one group that are stepped together, and what is remembered of each.

    Attributes:
        parameters: the parameters themselves.
        states: the optimizer's state of each; `step` counts its updates, the present one included.
        kinds: what each is, never "auto".
    """

    parameters: list[Tensor]
    states: list[dict[str, Any]]
    kinds: list[Kind]

    def some(self, places: list[int]) -> Memories:
        """Those of the parameters at these places."""
        parameters, states = [self.parameters[i] for i in places], [self.states[i] for i in places]
        return Memories(parameters, states, [self.kinds[i] for i in places])

    def count(self) -> None:
        """One more step for each."""
        for state in self.states:
            state["step"] = state.get("step", 0) + 1

    @property
    def steps(self) -> list[int]:
        """Updates of each parameter, the present one included."""
        return [state["step"] for state in self.states]

    def tensors(self, name: str) -> list[Tensor]:
        """The memories called `name`, shaped as the parameters, at least float32, zero at first; local parts."""
        for parameter, state in zip(self.parameters, self.states, strict=True):
            if name not in state:
                part = local(parameter)
                zero = torch.zeros_like(part, dtype=working_dtype(part.dtype), memory_format=torch.contiguous_format)
                state[name] = like(zero, parameter)
        return [local(state[name]) for state in self.states]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)
