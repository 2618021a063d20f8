"""Titans' neural memory as a sequence layer by itself: Titans (LMM), and models of Miras and Atlas by its settings."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nestling.layers.cacheable import CacheableLayer
from nestling.layers.chunks import run_checkpointed
from nestling.layers.long_term_memory import LongTermMemory, LongTermState, Retrieval
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.sequence import Aligned
from nestling.memory.kept import KeptMemories
from nestling.memory.state import State


class NeuralMemory(CacheableLayer):
    """`o_t = W_o (norm(M_t(q_t)) * silu(x_t W_g))`: the long-term memory with norm, gate and output projection.

    Titans sections 3.1, 4.3 ("memory without attention") and 4.4. Every token reads the memory after its own write;
    its gradient was taken at the memory of its chunk's start, or just before the token (`gradient="online"`).
    Persistent tokens, if there are any, are read before a document (section 3.3). `objective="lp"` is Moneta's, "huber"
    Yaad's and `divergence="kl"` Memora's (Miras); `objective="dot"` is deep linear attention's, and `objective_window`
    OmegaNet's (Atlas).

    Examples:
        >>> import torch
        >>> from nestling.layers.neural_memory import NeuralMemory
        >>> from nestling.layers.neural_memory_config import NeuralMemoryConfig
        >>> layer = NeuralMemory(NeuralMemoryConfig(hidden_size=32, num_heads=2, depth=2))
        >>> bounds = torch.tensor([0, 12, 20])  # two documents in one row
        >>> y, state = layer(torch.randn(1, 20, 32), cu_seqlens=bounds)
        >>> state.batch_size
        2
    """

    def __init__(self, config: NeuralMemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = LongTermMemory(config)
        width = config.hidden_size
        biased = config.gate_bias is not None
        self.gate_proj = nn.Linear(width, width, bias=biased) if config.output_gate else None
        self.out_proj = nn.Linear(width, width, bias=False)
        count = config.persistent_tokens
        self.persistent = nn.Parameter(torch.empty(count, width)) if count else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Persistent tokens as large as the normalised tokens they come before, the gate as `gate_bias` says."""
        if self.persistent is not None:
            nn.init.normal_(self.persistent)
        if self.gate_proj is not None and self.config.gate_bias is not None:
            self.gate_proj.reset_parameters()
            with torch.no_grad():
                self.gate_proj.weight *= 0.1
                self.gate_proj.bias.fill_(self.config.gate_bias)

    def first_state(self, x: Tensor) -> LongTermState:
        """The meta-learned memory, or the one that has read the persistent tokens."""
        return self.memory.first_state(x) if self.persistent is None else self.memory.after(self.persistent, len(x))

    def memory_of(self, state: State) -> list[Float[Tensor, "N H outputs inputs"]]:
        """See `CacheableLayer.memory_of`."""
        return self.memory.bank.first_deep(_own(state).bank.running)

    def restart(self, state: State, fresh: State) -> LongTermState:
        """See `CacheableLayer.restart`; a chunk begins."""
        return replace(_own(fresh), conv=_own(state).conv)

    def run_with_kept(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None, kept: KeptMemories | None
    ) -> tuple[Float[Tensor, "N L hidden"], LongTermState]:
        """See `CacheableLayer.run_with_kept`."""
        c = self.config
        stride = None if c.checkpoint_chunks is None else c.checkpoint_chunks * c.chunk_size
        if kept is not None:  # whose shares are of all tokens of the call
            return self._write(x, _own(state), lengths, kept)
        return run_checkpointed(self._write, x, _own(state), lengths, stride)

    def _write(
        self, x: Tensor, state: LongTermState, lengths: Tensor | None, kept: KeptMemories | None = None
    ) -> tuple[Tensor, LongTermState]:
        y, state = self.memory(x, state, Aligned(lengths), kept)
        return self._output(x, y), state

    def retrieve(
        self, x: Float[Tensor, "N L hidden"], state: LongTermState, lengths: Tensor | None = None
    ) -> Float[Tensor, "N L hidden"]:
        """What the layer would say about `x`, tokens that would come next, without learning from them: M*(q_t) of
        Titans Eq. 15. `state` stays as it is.
        """
        asked = Retrieval(state.bank.running, state.conv[..., : self.config.hidden_size])
        return self._output(x, self.memory(x, asked, Aligned(lengths))[0])

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(y if self.gate_proj is None else y * F.silu(self.gate_proj(x)))


def _own(state: State) -> LongTermState:
    if not isinstance(state, LongTermState):
        raise TypeError(f"a neural memory continues from a LongTermState, not from the state {type(state).__name__}")
    return state
