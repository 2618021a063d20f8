"""The neural memory beside attention: memory as context, as gate and as layer (Titans section 4).

N rows, L tokens of a call, H heads, D head width, C segment, P persistent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nestling.layers.attention import AttentionConfig, AttentionState, WindowAttention
from nestling.layers.chunks import Span, run_checkpointed, scan_chunks
from nestling.layers.long_term_memory import LongTermMemory, LongTermState, Retrieval, aligned, at_the_start
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import (
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    NeuralMemoryConfig,
)
from nestling.layers.segment_attention import SegmentAttention
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.grid import Grid
from nestling.memory.state import State
from nestling.ops.packing import find_rows


@dataclass
class ContextState(State):
    """State of `MemoryAsContext`.

    Attributes:
        memory: the long-term memory after the last token.
        before: its weights at the segment's start, which the segment retrieves from; None when a segment is one chunk,
            whose start the memory holds itself.
        tail: last inputs of the retrieving queries' convolution.
        keys: of the segment so far, rotated: retrieved memory first, then tokens; slot j belongs to token j of the
            segment, and slots still to come hold zeros.
        values: likewise.
    """

    memory: LongTermState
    before: list[Tensor] | None
    tail: Float[Tensor, "N past hidden"]
    keys: Float[Tensor, "N 2 C H D"]
    values: Float[Tensor, "N 2 C H D"]


class MemoryAsContext(SequenceLayer):
    """MAC (Titans section 4.1). For token i of a segment that starts after the memory M:

        h_i = norm(M(q_i)), q_i from x_i                                       retrieve (Eq. 21)
        y_i = norm(Attn(x_i; [p_1 .. p_P | h_1 .. h_i | x_1 .. x_i]))          attend (Eq. 22-23)
        M_i = M_{i-1} written with (k, v) of y_i                               write (Eq. 24)
        o_i = W_o (y_i * silu(norm(M_i(q of y_i))))                            read and gate (Eq. 25)

    The order is the paper's: retrieve, attend, write, read. h comes from the memory before the segment for all of its
    tokens, whatever the segment has written since; a segment's writes reach the attention of the next one only.

    Two readings keep it causal. Token i sees retrieved memory up to h_i, since h_j is a function of x_j. And Eq. 25
    reads the memory after the whole segment was written, which holds later tokens: here token i reads the memory after
    its own write, the last of which is the paper's. The attention's answers at the persistent and retrieved tokens are
    nobody's output and are not written.

    y is normalised once, with a learnable vector, before it is written, queried with and gated. The queries of both
    reads share W_Q. Rotary positions count the concatenation, so they start again with every segment.

    Examples:
        >>> import torch
        >>> from nestling.layers.neural_memory_config import MemoryAsContextConfig
        >>> from nestling.layers.titans import MemoryAsContext
        >>> layer = MemoryAsContext(MemoryAsContextConfig(hidden_size=32, num_heads=2, segment_size=64))
        >>> y, state = layer(torch.randn(1, 100, 32))
        >>> y.shape
        torch.Size([1, 100, 32])
    """

    def __init__(self, config: MemoryAsContextConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = LongTermMemory(config)
        self.attention = SegmentAttention(_attention(config, None, config.rope_theta), config.segment_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.persistent = nn.Parameter(torch.empty(config.persistent_tokens, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Persistent tokens as large as the normalised tokens they stand beside."""
        nn.init.normal_(self.persistent)

    def first_state(self, x: Tensor) -> ContextState:
        """The meta-learned memory and an empty segment."""
        c, memory = self.config, self.memory.first_state(x)
        empty = x.new_zeros(len(x), 2, c.segment_size, c.num_heads, c.head_dim)
        before = None if c.chunk_size == c.segment_size else list(memory.bank.running)
        return ContextState(memory, before, memory.conv[..., : c.hidden_size], empty, empty.clone())

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], ContextState]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, ContextState):
            raise TypeError(f"memory as context continues from a ContextState, not from {type(state).__name__}")
        return run_checkpointed(self._run, x, state, lengths, _stride(self.config))

    def _run(self, x: Tensor, state: ContextState, lengths: Tensor | None) -> tuple[Tensor, ContextState]:
        segment = self.config.segment_size
        grid = Grid.of(state.memory.position, lengths, x.shape[1], segment)
        y, state = scan_chunks({"x": x.unsqueeze(1)}, grid, segment, state, self._segment)
        return self.attention.output(y.squeeze(1)), state

    def _segment(
        self, span: Span, tokens: dict[str, Tensor], state: ContextState, grid: Grid
    ) -> tuple[Tensor, ContextState]:
        """The part of one segment that stands in this call: gated answers `[N, 1, L, hidden]` and the state after."""
        x = tokens["x"].squeeze(1)
        valid = grid.valid_slots(*span, x.device)
        rows = None if valid is None else find_rows((x.shape[0], x.shape[1]), valid[:, 0])

        def ask(t: Tensor, memory: LongTermState | Retrieval) -> tuple[Tensor, LongTermState | Retrieval]:
            if rows is None:
                return self.memory(t, memory, Aligned())
            answer, memory = self.memory(rows.pack(t), memory, Aligned(rows.lengths))
            return rows.unpack(answer), memory

        before = state.memory.bank.start if state.before is None else state.before
        h, asked = ask(x, Retrieval(before, state.tail))
        first, persistent = span[0] % self.config.segment_size, aligned(self.persistent)[None]
        y, keys, values = self.attention(x, h, persistent, state.keys, state.values, first, valid)
        y = self.norm(y)
        m, memory = ask(y, state.memory)
        assert isinstance(asked, Retrieval) and isinstance(memory, LongTermState)
        after = ContextState(memory, state.before, asked.conv, keys, values)
        return (y * F.silu(m)).unsqueeze(1), self._cross(after, span[1], grid)

    def _cross(self, state: ContextState, end: int, grid: Grid) -> ContextState:
        """At a segment's end: the next one retrieves from the memory as it is now, and its attention starts empty."""
        if end % self.config.segment_size:
            return state
        before = state.before
        if before is not None:
            pairs = zip(state.memory.bank.running, before, strict=True)
            before = [grid.where_crossed(end, new, old) for new, old in pairs]
        keys, values = (grid.where_crossed(end, torch.zeros_like(t), t) for t in (state.keys, state.values))
        return ContextState(state.memory, before, state.tail, keys, values)


@dataclass
class WindowedState(State):
    """State of `MemoryAsGate` and `MemoryAsLayer`.

    Attributes:
        memory: the long-term memory after the last token (the persistent ones come before the first).
        attention: keys and values in the window.
        prefix: what the attention sees of the persistent tokens; None when those are the parameters themselves.
    """

    memory: LongTermState
    attention: AttentionState
    prefix: Float[Tensor, "N P hidden"] | None


class MemoryAsGate(SequenceLayer):
    """MAG (Titans section 4.2). Memory and sliding-window attention read the same tokens, side by side:

        y_t = Attn(x_t; [p_1 .. p_P | x_{t-window+1} .. x_t])           (Eq. 27)
        o_t = W_o (norm(y_t) * silu(norm(M_t(q_t))))                    (Eq. 28)

    M reads p_1 .. p_P before the document, then the tokens; token t reads the memory after its own write. The norms
    have learnable vectors, as the paper says; which non-linearity follows, and on what, it does not say.

    The persistent tokens are a chunk of their own at the memory, so that the document's chunks start with its first
    token, and have no position in the attention (`SoftmaxAttention.mix`).

    Examples:
        >>> import torch
        >>> from nestling.layers.neural_memory_config import MemoryAsGateConfig
        >>> from nestling.layers.titans import MemoryAsGate
        >>> y, state = MemoryAsGate(MemoryAsGateConfig(hidden_size=32, num_heads=2, window=8))(torch.randn(1, 20, 32))
        >>> y.shape
        torch.Size([1, 20, 32])
    """

    def __init__(self, config: MemoryAsGateConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = LongTermMemory(config)
        self.attention = WindowAttention(_attention(config, config.window, config.rope_theta))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.persistent = nn.Parameter(torch.empty(config.persistent_tokens, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Persistent tokens as large as the normalised tokens they stand beside."""
        nn.init.normal_(self.persistent)

    def first_state(self, x: Tensor) -> WindowedState:
        """The memory that has read the persistent tokens, and an empty window."""
        memory = self.memory.after(self.persistent, len(x))
        return WindowedState(memory, self.attention.first_state(x), None)

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], WindowedState]:
        """See `SequenceLayer.run`."""
        state = _windowed(state, "memory as gate")
        return run_checkpointed(self._run, x, state, lengths, _stride(self.config))

    def _run(self, x: Tensor, state: WindowedState, lengths: Tensor | None) -> tuple[Tensor, WindowedState]:
        prefix = aligned(self.persistent).expand(len(x), -1, -1)
        y, attention = self.attention(x, state.attention, Aligned(lengths), prefix)
        m, memory = self.memory(x, state.memory, Aligned(lengths))
        return self.attention.output(self.norm(y) * F.silu(m)), WindowedState(memory, attention, None)


class MemoryAsLayer(SequenceLayer):
    """MAL (Titans section 4.3). The memory first, then sliding-window attention on what it says:

        y_t = norm(LMM(x)_t)                                            (Eq. 30; `NeuralMemory` with norm and gate)
        o_t = W_o Attn(y_t; [y_{p_1} .. y_{p_P} | y_{t-window+1} .. y_t])   (Eq. 31)

    The memory reads p_1 .. p_P before the document, and what it says to them is what the attention sees of them; token
    t's y comes from the memory after its own write. The attention sees the tokens only through the memory: there is
    no residual between the two, as in the equations.

    Examples:
        >>> import torch
        >>> from nestling.layers.neural_memory_config import MemoryAsLayerConfig
        >>> from nestling.layers.titans import MemoryAsLayer
        >>> y, state = MemoryAsLayer(MemoryAsLayerConfig(hidden_size=32, num_heads=2, window=8))(torch.randn(1, 20, 32))
        >>> y.shape
        torch.Size([1, 20, 32])
    """

    def __init__(self, config: MemoryAsLayerConfig) -> None:
        super().__init__()
        self.config = config
        # What is computed again in the backward pass is this layer as a whole, and its persistent tokens are here.
        inner = {f.name: getattr(config, f.name) for f in fields(NeuralMemoryConfig)}
        self.memory = NeuralMemory(NeuralMemoryConfig(**inner | {"checkpoint_chunks": None, "persistent_tokens": 0}))
        self.attention = WindowAttention(_attention(config, config.window, config.rope_theta))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.persistent = nn.Parameter(torch.empty(config.persistent_tokens, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Persistent tokens as large as the normalised tokens they stand beside."""
        nn.init.normal_(self.persistent)

    def first_state(self, x: Tensor) -> WindowedState:
        """The memory that has read the persistent tokens, what it said to them, and an empty window."""
        y, memory = self.memory(aligned(self.persistent)[None], rows=Aligned())
        prefix = self.norm(y).to(x.dtype).expand(len(x), -1, -1)
        return WindowedState(at_the_start(memory, len(x)), self.attention.first_state(x), prefix)

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], WindowedState]:
        """See `SequenceLayer.run`."""
        state = _windowed(state, "memory as layer")
        return run_checkpointed(self._run, x, state, lengths, _stride(self.config))

    def _run(self, x: Tensor, state: WindowedState, lengths: Tensor | None) -> tuple[Tensor, WindowedState]:
        y, memory = self.memory(x, state.memory, rows=Aligned(lengths))
        y, attention = self.attention(self.norm(y), state.attention, Aligned(lengths), state.prefix)
        return self.attention.output(y), WindowedState(memory, attention, state.prefix)


def _attention(config: NeuralMemoryConfig, window: int | None, rope_theta: float) -> AttentionConfig:
    return AttentionConfig(config.hidden_size, config.num_heads, window=window, rope_theta=rope_theta)


def _stride(config: NeuralMemoryConfig) -> int | None:
    return None if config.checkpoint_chunks is None else config.checkpoint_chunks * config.chunk_size


def _windowed(state: State, name: str) -> WindowedState:
    if not isinstance(state, WindowedState):
        raise TypeError(f"{name} continues from a WindowedState, not from {type(state).__name__}")
    return state
