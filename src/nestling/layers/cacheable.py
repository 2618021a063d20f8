"""The face of layers whose memory can be read again after it has moved on, which `MemoryCaching` wraps."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.kept import KeptMemories
from nestling.memory.state import State


class CacheableLayer(SequenceLayer):
    """A sequence layer with one memory a head that answers queries, then a norm, a gate or a projection of the answer.

    A subclass implements `run_with_kept` in place of `run`: between answer and norm it lets the kept memories speak.
    """

    def forward(
        self,
        x: Float[Tensor, "B T hidden"],
        state: State | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        rows: Aligned | None = None,
        kept: KeptMemories | None = None,
    ) -> tuple[Float[Tensor, "B T hidden"], State]:
        """See `SequenceLayer.forward`.

        Args:
            x: input.
            state: see there.
            mask: see there.
            cu_seqlens: see there.
            rows: see there.
            kept: memories that answer every token beside the layer's own; with a state, and with `rows` that have a
                token each.
        """
        if kept is None:
            return super().forward(x, state, mask, cu_seqlens, rows=rows)
        assert state is not None and rows is not None
        return self.run_with_kept(x, state, rows.lengths, kept)

    def run(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """See `SequenceLayer.run`."""
        return self.run_with_kept(x, state, lengths, None)

    @abstractmethod
    def run_with_kept(
        self, x: Tensor, state: State, lengths: Tensor | None, kept: KeptMemories | None
    ) -> tuple[Tensor, State]:
        """`run`, with memories of earlier segments that answer beside the layer's own."""

    @abstractmethod
    def memory_of(self, state: State) -> list[Tensor]:
        """Weights of the memory that answers, as the state's last token left it: `[N, H, out, in]` for every layer."""

    @abstractmethod
    def restart(self, state: State, fresh: State) -> State:
        """`fresh`, the state before the first token, with all of `state` that is no memory: a convolution's tail."""
