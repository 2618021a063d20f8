"""The face all sequence layers share: padding and packing outside, left-aligned rows inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestling.memory.state import State
from nestling.ops.packing import find_rows

BOUND = 1e4
"""Largest entry of a layer's input. A normalised residual stream stays two orders of magnitude below; beyond it sums of
products of three projections over a million tokens, and the backward pass of attention, leave float32."""


@dataclass(frozen=True)
class Aligned:
    """Rows that start at slot 0, as a model brings them to all its layers at once.

    An object and not the bare tensor: hooks that move the inputs of a module to its device leave it on the CPU, where
    lengths steer the loops over chunks.

    Attributes:
        lengths: `[N]` int64 on the CPU, real tokens of every row; None when all slots hold one.
    """

    lengths: Int[Tensor, " N"] | None = None


class SequenceLayer(nn.Module, ABC):
    """A layer `y, state = layer(x, state=None, mask=None, cu_seqlens=None)`.

    A subclass implements `run` and `first_state`. `run` sees rows that start at slot 0; what follows a row's length is
    padding whose output nobody reads. Both are part of a call of the layer, so that what hangs on the call takes
    effect: offloaded weights are there.
    """

    def forward(
        self,
        x: Float[Tensor, "B T hidden"],
        state: State | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        rows: Aligned | None = None,
    ) -> tuple[Float[Tensor, "B T hidden"], State]:
        """Run the layer over `x`, continuing from `state`. Entries of `x` count as at most +-`BOUND`.

        Args:
            x: input.
            state: what an earlier call returned, one row per row of `x` (per document with `cu_seqlens`); None starts
                every row from the meta-learned initial state.
            mask: `[B, T]`, non-zero for real tokens. Masked tokens neither write nor advance the
                chunk, and their output is 0.
            cu_seqlens: `[N + 1]` boundaries of documents packed in one row; every document has a state row of its own.
            rows: what a model says of input that it has aligned, checked and normalised itself. It stands in place of
                `mask` and `cu_seqlens`, and `x` is taken as it is.

        Raises:
            ValueError: a mask, boundary or state that does not fit `x`.
        """
        if rows is not None:
            return self._continue(x, state, rows.lengths)
        if not x.shape[0]:
            return x, self.first_state(x) if state is None else state
        x = x.clamp(-BOUND, BOUND)
        found = find_rows((x.shape[0], x.shape[1]), mask, cu_seqlens)
        if found is None:
            check_state(state, x.shape[0])
            return self._continue(x, state, None)
        check_state(state, len(found.lengths))
        y, state = self._continue(found.pack(x), state, found.lengths)
        return found.unpack(y), state

    def init_state(self, batch_size: int, like: Tensor | None = None) -> State:
        """The state before the first token.

        Args:
            batch_size: rows.
            like: a tensor of the type and on the device of the layer's input; None takes those of its parameters.
        """
        like = _like_parameters(self) if like is None else like
        return self(like.new_empty(batch_size, 0, 0), rows=Aligned())[1]

    def _continue(self, x: Tensor, state: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        state = self.first_state(x) if state is None else state
        return self.run(x, state, lengths) if x.shape[1] else (x, state)

    @abstractmethod
    def run(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """`[N, L, hidden]` left-aligned rows; `lengths` (`[N]` int64 on the CPU) is None when all have L tokens."""

    @abstractmethod
    def first_state(self, x: Tensor) -> State:
        """The state before the first token of the N rows of `x`, for its type and on its device.

        These come from the input and not from a weight, which may be quantized or lie on no device.
        """


def check_state(state: State | None, rows: int) -> None:
    """Refuse a state made for another number of rows."""
    if state is not None and state.batch_size != rows:
        raise ValueError(
            f"the state has {state.batch_size} rows and the input {rows}; use state.select(rows) to make them agree"
        )


def _like_parameters(module: nn.Module) -> Tensor:
    """An empty tensor for input of the module, by the first of its parameters that is not quantized."""
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for parameter in module.parameters():
        if parameter.dtype in types:
            # Hooks of offloading take it from there to where they bring the weights.
            return torch.empty(0, dtype=parameter.dtype, device="cpu" if parameter.is_meta else parameter.device)
    return torch.empty(0)
