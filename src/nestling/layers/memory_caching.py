"""Memory Caching: the memory is kept at the end of every segment, and later tokens read it too (arXiv:2602.24281).

N rows, L tokens of a call, S kept memories, H heads, R router width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestling.layers.cacheable import CacheableLayer
from nestling.layers.chunks import Span, run_checkpointed, scan_chunks
from nestling.layers.heads import fast_dtype
from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.memory_caching_config import CacheableConfig, MemoryCachingConfig
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.description import MemoryDescription
from nestling.memory.grid import Grid
from nestling.memory.kept import KeptMemories
from nestling.memory.state import State
from nestling.ops.packing import find_rows


@dataclass
class MemoryCachingState(State):
    """State of `MemoryCaching`, which grows with every segment.

    Slot s of row n belongs to the row's segment s; slots of segments that a row has not ended hold zeros.

    Attributes:
        memory: state of the inner layer.
        kept: weights of the memories at the ends of segments, layer by layer.
        contexts: means of what the router sees of the segments; None without a router.
        context: sum of it over the segment so far; None without a router.
        position: tokens read so far, int64 on the CPU.
    """

    memory: State
    kept: list[Float[Tensor, "N S H out in"]]
    contexts: Float[Tensor, "N S H R"] | None
    context: Float[Tensor, "N H R"] | None
    position: Int[Tensor, " N"]


class MemoryCaching(SequenceLayer):
    """A layer's memory M, kept as M^(1), ..., M^(s-1) at the ends of past segments. A token of segment s hears

        y_t = g_t^(s) M_t(q_t) + sum_{i<s} g_t^(i) M^(i)(q_t)           residual (all g = 1), gated, sparse
        y_t = M*_t(q_t),  M*_t = g_t^(s) M_t + sum_{i<s} g_t^(i) M^(i)  soup (of the weights)
        g_t = softmax_i <u_t, mean of c over segment i>,  u_t = x_t W_u,  c_j = x_j W_c

    with the inner layer's query q_t; its norm, gate and projection follow. Of its own segment a token's router sees the
    tokens up to itself. "sparse" takes the softmax over the `top_k` highest kept memories and the running one.

    Reading costs S + 1 reads a token, and the state grows by one memory a segment, which is the point: between a
    recurrent layer (one segment) and attention (segments of one token).

    Examples:
        >>> import torch
        >>> from nestling.layers.linear_config import LinearMemoryConfig
        >>> from nestling.layers.memory_caching import MemoryCaching
        >>> from nestling.layers.memory_caching_config import MemoryCachingConfig
        >>> inner = LinearMemoryConfig(hidden_size=32, num_heads=2)
        >>> layer = MemoryCaching(MemoryCachingConfig(hidden_size=32, inner=inner, segment_size=8))
        >>> y, state = layer(torch.randn(1, 20, 32))
        >>> state.kept[0].shape[1]
        2
    """

    def __init__(self, config: MemoryCachingConfig) -> None:
        super().__init__()
        self.config = config
        self.inner = _build_inner(config.inside)
        gates = 0 if config.variant == "residual" else 2 * config.num_heads * config.gate_width
        self.router = nn.Linear(config.hidden_size, gates, bias=False) if gates else None

    def reset_parameters(self) -> None:
        """Nothing of its own: the inner layer and the router initialise themselves."""

    def first_state(self, x: Tensor) -> MemoryCachingState:
        """The inner layer's, and nothing kept."""
        memory, (rows, heads) = self.inner.init_state(len(x), x), (len(x), self.config.num_heads)
        kept = [w.new_zeros(rows, 0, *w.shape[1:]) for w in self.inner.memory_of(memory)]
        position = torch.zeros(rows, dtype=torch.int64, device="cpu")
        if self.router is None:
            return MemoryCachingState(memory, kept, None, None, position)
        context = x.new_zeros(rows, heads, self.config.gate_width, dtype=fast_dtype(x))
        return MemoryCachingState(memory, kept, context.unsqueeze(1)[:, :0].clone(), context, position)

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """What is kept, with what the router sees of it; the inner layer speaks for itself."""
        c = self.config
        context = 0 if self.router is None else c.num_heads * c.gate_width
        heard = {
            "residual": "summed over all segments",
            "gated": "weighed by softmax ⟨u, mean c⟩ over the segments",
            "soup": "of the weights' average by softmax ⟨u, mean c⟩ over the segments",
            "sparse": f"weighed by softmax ⟨u, mean c⟩ over the {c.top_k} highest segments and the running one",
        }
        with torch.no_grad():
            memory = self.inner.memory_of(self.inner.init_state(1))
        return (
            MemoryDescription(
                name="kept memories",
                period=c.segment_size,
                objective="none: what the memory was at the ends of segments",
                rule=f"a copy every {c.segment_size} tokens; answers {heard[c.variant]}",
                state=context,
                growth=-(-(context + sum(w.numel() for w in memory)) // c.segment_size),
            ),
        )

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], MemoryCachingState]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, MemoryCachingState):
            raise TypeError(f"memory caching continues from a MemoryCachingState, not from {type(state).__name__}")
        return run_checkpointed(self._run, x, state, lengths, self.config.stride)

    def _run(self, x: Tensor, state: MemoryCachingState, lengths: Tensor | None) -> tuple[Tensor, MemoryCachingState]:
        segment = self.config.segment_size
        grid = Grid.of(state.position, lengths, x.shape[1], segment)
        y, state = scan_chunks({"x": x.unsqueeze(1)}, grid, segment, state, self._segment)
        return y.squeeze(1), state

    def _segment(
        self, span: Span, tokens: dict[str, Tensor], state: MemoryCachingState, grid: Grid
    ) -> tuple[Tensor, MemoryCachingState]:
        """The part of one segment that stands in this call: answers `[N, 1, L, hidden]` and the state after."""
        x = tokens["x"].squeeze(1)
        valid = grid.valid_slots(*span, x.device)
        rows = None if valid is None else find_rows((x.shape[0], x.shape[1]), valid[:, 0])
        lengths = None if rows is None else rows.lengths
        x = x if rows is None else rows.pack(x)
        kept, context = self._route(x, state, lengths)
        y, memory = self.inner(x, state.memory, rows=Aligned(lengths), kept=kept)
        position = state.position + (x.shape[1] if lengths is None else lengths)
        after = MemoryCachingState(memory, state.kept, state.contexts, context, position)
        return (y if rows is None else rows.unpack(y)).unsqueeze(1), self._end(after, span[1], grid)

    def _route(
        self, x: Tensor, state: MemoryCachingState, lengths: Tensor | None
    ) -> tuple[KeptMemories | None, Tensor | None]:
        """What is heard of the kept memories, None where there are none, and the router's sum after the last token."""
        c, time, slots = self.config, x.shape[1], state.kept[0].shape[1]
        ended = (torch.arange(slots, device="cpu") < (state.position // c.segment_size)[:, None]).to(x.device)
        if self.router is None:
            shares = torch.ones(len(x), c.num_heads, time, slots + 1, dtype=state.kept[0].dtype, device=x.device)
            shares[..., :-1] = ended[:, None, None]
            return (KeptMemories(state.kept, shares) if slots else None), None
        assert state.contexts is not None and state.context is not None
        routed = self.router(x).to(state.context.dtype)
        with torch.autocast(x.device.type, enabled=False):
            u, seen = (t.transpose(1, 2) for t in routed.unflatten(-1, (2, c.num_heads, -1)).unbind(2))
            if lengths is not None:
                there = torch.arange(time, device="cpu") < lengths[:, None]
                seen = torch.where(there[:, None, :, None].to(x.device), seen, torch.zeros_like(seen))
            sums = state.context.unsqueeze(2) + seen.cumsum(2)
            if not slots:
                return None, sums[:, :, -1]
            count = (state.position % c.segment_size)[:, None] + torch.arange(1, time + 1, device="cpu")
            own = (u * sums).sum(-1) / count[:, None].to(u.device)
            others = u @ state.contexts.permute(0, 2, 3, 1)
            others = others.masked_fill(~ended[:, None, None], -torch.inf)
            if c.variant == "sparse":
                others = _keep_highest(others, c.top_k)
            shares = torch.cat([others, own.unsqueeze(-1)], -1).softmax(-1)
            weights = state.kept
            if c.variant == "sparse":
                heard = (shares[..., :-1] != 0).flatten(0, 2).any(0).nonzero().flatten()
                weights = [w.index_select(1, heard) for w in weights]
                shares = torch.cat([shares.index_select(-1, heard), shares[..., -1:]], -1)
        return KeptMemories(weights, shares, c.variant == "soup"), sums[:, :, -1]

    def _end(self, state: MemoryCachingState, end: int, grid: Grid) -> MemoryCachingState:
        """At a segment's end, in the rows that reach it: the memory is kept, and the next one begins."""
        c = self.config
        if end % c.segment_size:
            return state
        slot = state.position // c.segment_size - 1
        kept = [
            _append(old, new, slot, end, grid)
            for old, new in zip(state.kept, self.inner.memory_of(state.memory), strict=True)
        ]
        contexts, context, memory = state.contexts, state.context, state.memory
        if contexts is not None and context is not None:
            contexts = _append(contexts, context / c.segment_size, slot, end, grid)
            context = grid.where_crossed(end, torch.zeros_like(context), context)
        if c.restart:
            like = context if context is not None else kept[0]
            fresh = self.inner.restart(memory, self.inner.init_state(len(like), like))
            # Where all rows cross, weights of the chunk's start and running ones stay one tensor.
            memory = fresh if grid.offsets is None else _choose(fresh, memory, end, grid)
        return MemoryCachingState(memory, kept, contexts, context, state.position)


def _build_inner(config: CacheableConfig) -> CacheableLayer:
    match config:
        case LinearMemoryConfig():
            return LinearMemory(config)
        case NeuralMemoryConfig():
            return NeuralMemory(config)
        case SelfModifyingConfig():
            return SelfModifyingTitans(config)
        case _:
            assert_never(config)


def _keep_highest(scores: Float[Tensor, "N H L S"], count: int) -> Float[Tensor, "N H L S"]:
    """The `count` highest scores of every token; the others are minus infinity."""
    if scores.shape[-1] <= count:
        return scores
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count, -1).indices, True)
    return scores.masked_fill(~chosen, -torch.inf)


def _append(old: Tensor, new: Tensor, slot: Tensor, end: int, grid: Grid) -> Tensor:
    """`old` `[N, S, ...]` with `new` `[N, ...]` in every row's `slot`, in the rows that cross the boundary at `end`."""
    slots = old.shape[1]
    if grid.offsets is None and bool((slot == slots).all()):
        return torch.cat([old, new.unsqueeze(1)], 1)
    missing = max(int(slot.max()) + 1 - slots, 0)
    if missing:
        old = torch.cat([old, old.new_zeros(len(old), missing, *old.shape[2:])], 1)
    here = (torch.arange(slots + missing, device="cpu") == slot[:, None]).to(old.device)
    written = torch.where(here.reshape(*here.shape, *[1] * (old.dim() - 2)), new.unsqueeze(1), old)
    return grid.where_crossed(end, written, old)


def _choose(new: State, old: State, end: int, grid: Grid) -> State:
    """The new state in the rows that cross the boundary at `end`, the old one in the others."""
    others = iter([tensor for _, tensor in old.tensors()])
    return new.map(lambda t: grid.where_crossed(end, t, next(others)))
