"""The Continuum Memory System in context (NL section 7.1, Eq. 70-74)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.heads import fast_dtype
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.description import OBJECTIVES, MemoryDescription, write_rule
from nestling.memory.grid import Grid, chunk_spans, shift_rows, unshift_rows
from nestling.memory.state import State
from nestling.ops.chunk_rule import chunk_advance, chunk_writes, decay_products

# Tokens whose erases are solved together: the solve needs their Gram matrix, so a slow level's period is cut. The cut
# changes nothing but rounding and memory, since the gradients stay those of the period's first weights.
MAX_SOLVE = 512


@dataclass(frozen=True, kw_only=True)
class ContinuumConfig:
    """Settings of `ContinuumMemory`.

    Attributes:
        hidden_size: width of input and output.
        intermediate_size: hidden width of every level's MLP.
        periods: update period of every level in tokens, in chain order; None never updates, a plain MLP.
        variant: "sequential" (Eq. 70, 73), "nested" (Eq. 72) or "headwise" (Eq. 74).
        target: what a level's fast weight learns to output (see `ContinuumMemory`): "next", "value" or
            "reconstruction".
        erase: delta gradient descent (NL Eq. 56): inside a period every write also erases what the weight holds at
            its key, at the rate of the write. A constant target is then recalled at half its size.
        inner_lr_scale: first value of the learnable rate of every level, in (0, 1).
        norm_eps: of the norms before every level.

    Raises:
        ValueError: no level, a size or a period below 1, nested periods that do not divide one another, an unknown
            variant or target, or a rate outside (0, 1).
    """

    hidden_size: int
    intermediate_size: int
    periods: tuple[int | None, ...] = (64, 256, None)
    variant: Literal["sequential", "nested", "headwise"] = "sequential"
    target: Literal["next", "value", "reconstruction"] = "value"
    erase: bool = False
    inner_lr_scale: float = 0.5
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not isinstance(self.periods, (tuple, list)):
            raise ValueError(f"periods is a tuple with one entry a level, for example (64, None), not {self.periods!r}")
        object.__setattr__(self, "periods", tuple(self.periods))
        if not self.periods:
            raise ValueError("periods is empty: there is at least one level, for example periods=(64, None)")
        if any(p is not None and (not isinstance(p, int) or p < 1) for p in self.periods):
            raise ValueError(f"periods are tokens >= 1, or None for a level that never updates; got {self.periods}")
        if self.variant not in ("sequential", "nested", "headwise"):
            raise ValueError(f"variant is 'sequential', 'nested' or 'headwise', not {self.variant!r}")
        if self.target not in ("next", "value", "reconstruction"):
            raise ValueError(f"target is 'next', 'value' or 'reconstruction', not {self.target!r}")
        if not 0 < self.inner_lr_scale < 1:
            raise ValueError(f"inner_lr_scale is in (0, 1), not {self.inner_lr_scale}")
        if self.variant == "nested":
            for fast, slow in zip(self.periods, self.periods[1:], strict=False):
                if slow is not None and (fast is None or slow % fast):
                    raise ValueError(
                        f"nested periods must rise by whole factors, fastest first; {slow} is no multiple of {fast}"
                    )

    def context(self, level: int) -> int | None:
        """Tokens after which a nested level is re-initialised: the period of the level above; None is never."""
        return self.periods[level + 1] if self.variant == "nested" and level + 1 < len(self.periods) else None


@dataclass
class LevelState(State):
    """Fast weights of one level, `[N, hidden, intermediate]`.

    Attributes:
        start: weights since the last update; the level's output comes from them.
        running: weights with the writes of the current period.
        initial: nested only: the initial state that the level above has learned.
        tail: target "next" only: hidden activation of the last token, `[N, 1, intermediate]`.
    """

    start: Tensor
    running: Tensor
    initial: Tensor | None
    tail: Tensor | None


@dataclass
class ContinuumState(State):
    """State of `ContinuumMemory`: one entry a level (None for a plain MLP) and tokens read, `[N]` int64 on the CPU."""

    levels: list[LevelState | None]
    position: Tensor


class ContinuumLevel(nn.Module):
    """One level: a SwiGLU MLP whose down-projection is a fast weight (period None: an ordinary weight)."""

    def __init__(self, config: ContinuumConfig, index: int) -> None:
        super().__init__()
        c = self.config = config
        self.period, self.context = c.periods[index], c.context(index)
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.norm_eps)
        self.gate = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down = nn.Parameter(torch.empty(c.hidden_size, c.intermediate_size))
        learns = self.period is not None
        mixes = learns and c.target != "reconstruction"
        self.value = nn.Linear(c.hidden_size, c.hidden_size, bias=False) if mixes else None
        self.rate = nn.Parameter(torch.empty(())) if learns else None
        self.transfer = nn.Parameter(torch.empty(())) if self.context is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Down-projection N(0, 1/intermediate); rates at `inner_lr_scale`; the level above keeps half of a context."""
        nn.init.normal_(self.down, std=1 / math.sqrt(self.config.intermediate_size))
        if self.rate is not None:
            nn.init.constant_(self.rate, math.log(self.config.inner_lr_scale / (1 - self.config.inner_lr_scale)))
        if self.transfer is not None:
            nn.init.zeros_(self.transfer)

    def grid(self, position: Tensor, lengths: Tensor | None, time: int) -> Grid | None:
        """Where rows that have read `position` tokens stand in the level's periods; None for one that never updates."""
        return None if self.period is None else Grid.of(position, lengths, time, self.context or self.period)

    def forward(
        self, x: Float[Tensor, "N L hidden"], state: LevelState | None, grid: Grid | None, rows: Aligned
    ) -> tuple[Float[Tensor, "N L hidden"], LevelState | None]:
        """The level's output, without residual, and its new state (None for a level that never updates).

        Args:
            x: left-aligned rows.
            state: before the first token; None is that of a document's start.
            grid: of the call; None without a token.
            rows: their lengths.
        """
        if self.period is not None and state is None:
            state = self._first_state(x)
        if not x.shape[1]:
            return x, state
        u = self.norm(x)
        h = F.silu(self.gate(u)) * self.up(u)
        if state is None or grid is None:
            return h @ self.down.to(h.dtype).mT, None
        target = u if self.value is None else self.value(u)
        with torch.autocast(x.device.type, enabled=False):
            dtype = state.start.dtype
            y, state = self._scan(h.to(dtype), target.to(dtype), state, grid, rows.lengths)
        return y.to(x.dtype), state

    def _first_state(self, x: Tensor) -> LevelState:
        """The meta-learned fast weights, and no last token."""
        dtype = fast_dtype(x)
        weight = self.down.to(dtype).expand(len(x), -1, -1)
        tail = x.new_zeros(len(x), 1, self.down.shape[1], dtype=dtype) if self.config.target == "next" else None
        return LevelState(weight, weight, weight if self.context is not None else None, tail)

    def _scan(
        self, h: Tensor, target: Tensor, state: LevelState, grid: Grid, lengths: Tensor | None
    ) -> tuple[Tensor, LevelState]:
        assert self.period is not None
        tokens = [h, target]
        tail = state.tail
        if tail is not None:
            key, tail = self._keys(h, tail, lengths)
            tokens.append(key)
        if grid.offsets is not None:
            tokens = [shift_rows(t.unsqueeze(1), grid).squeeze(1) for t in tokens]
        spans = chunk_spans(grid.phase, grid.slots, self.period)
        pieces = zip(*(t.split([e - s for s, e in spans], 1) for t in tokens), strict=True)
        outputs, start, running, initial = [], state.start, state.running, state.initial
        for (_, end), (h_c, target_c, *other) in zip(spans, pieces, strict=True):
            outputs.append(h_c @ start.mT)
            key_c = other[0] if other else h_c
            recalled = key_c @ start.mT if other else outputs[-1]
            running = self._write(running, key_c, recalled - target_c)
            if end % self.period == 0:
                start = grid.where_crossed(end, running, start)
                if self.context is not None and end % self.context == 0:
                    assert initial is not None and self.transfer is not None
                    learned = torch.lerp(initial, running, torch.sigmoid(self.transfer.to(initial.dtype)))
                    initial = grid.where_crossed(end, learned, initial)
                    start = grid.where_crossed(end, learned, start)
                    running = grid.where_crossed(end, learned, running)
        y = torch.cat(outputs, dim=1)
        if grid.offsets is not None:
            y = unshift_rows(y.unsqueeze(1), grid, h.shape[1]).squeeze(1)
        return y, LevelState(start, running, initial, tail)

    @staticmethod
    def _keys(h: Tensor, tail: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """h_{t-1}, which "next" pairs with the target of t, and the new tail."""
        seen = torch.cat([tail, h], dim=1)
        if lengths is None:
            return seen[:, :-1], seen[:, -1:]
        index = lengths.to(h.device)[:, None, None].expand(-1, 1, h.shape[2])
        return seen[:, :-1], seen.gather(1, index)

    def _write(self, running: Tensor, key: Tensor, error: Tensor) -> Tensor:
        """Gradient steps on 1/2 |W key - target|^2 at the period's first weights.

        Rates times |key|^2 sum to at most 1 over a period. Then the map from one period's weights to the next never
        stretches, whatever the keys. With the erase, e_t |key|^2 <= 1 for each token alone is not enough: the gradients
        see none of the period's erases, and keys that turn slowly make the weights grow without bound.

        Slots without a token hold a key of zeros: they write and erase nothing.
        """
        assert self.rate is not None and self.period is not None
        power = key.square().sum(-1).clamp_min(1.0).reciprocal()
        rate = torch.sigmoid(self.rate) / self.period * power
        step = rate.unsqueeze(-1) * error
        if not self.config.erase:
            return running - step.mT @ key
        for at in range(0, key.shape[1], MAX_SOLVE):
            t = slice(at, at + MAX_SOLVE)
            decay = decay_products(torch.zeros_like(power[:, t]))
            writes = chunk_writes(key[:, t], step[:, t], rate[:, t], decay, running)
            running = chunk_advance(writes, decay, running)[0]
        return running


class ContinuumMemory(SequenceLayer):
    """A chain of MLPs that update at different frequencies, each with its pre-norm and residual.

    Level i computes x <- x + W_i h_i with h_i = silu(W_gate u) * (W_up u), u = RMSNorm(x). Its down-projection W_i is
    the fast weight: every `period` tokens it takes the gradient steps of the period's tokens (Eq. 71) on
    1/2 |W_i key - target|^2, at rate r / period / max(1, |key|^2) with a learnable r in (0, 1), so that the error on a
    constant stream shrinks (with `erase`, the distance to half the target). The pair (key, target) of token t is

        "next"            (h_{t-1}, V u_t): from a token, predict a learned projection of the next one; the first token
                          of a document writes nothing, and no token uses one after it
        "value"           (h_t, V u_t): a learned projection of the token itself (Titans)
        "reconstruction"  (h_t, u_t): the level's own input (TTT)

    Variants: sequential, the levels in a chain; nested, the same chain where a level starts again from an initial state
    at the end of every period of the level above it, which moves that initial state towards what the level had learned
    (a first-order meta-gradient, Eq. 72); headwise, all levels on the same x and a learnable weighted sum (Eq. 74).

    Examples:
        >>> import torch
        >>> from nestling.layers.continuum import ContinuumConfig, ContinuumMemory
        >>> layer = ContinuumMemory(ContinuumConfig(hidden_size=32, intermediate_size=48, periods=(4, 16, None)))
        >>> y, state = layer(torch.randn(2, 20, 32))
        >>> y.shape
        torch.Size([2, 20, 32])
    """

    def __init__(self, config: ContinuumConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList([ContinuumLevel(config, i) for i in range(len(config.periods))])
        count = len(config.periods)
        self.weights = nn.Parameter(torch.full((count,), 1 / count)) if config.variant == "headwise" else None

    def reset_parameters(self) -> None:
        """Equal weights for all levels of the headwise variant; the levels initialise themselves."""
        if self.weights is not None:
            nn.init.constant_(self.weights, 1 / len(self.levels))

    def first_state(self, x: Tensor) -> ContinuumState:
        """The meta-learned fast weights. Where tokens follow, the levels make theirs in the call that reads them."""
        position = torch.zeros(len(x), dtype=torch.long, device="cpu")
        levels = [None if x.shape[1] else level(x, None, None, Aligned())[1] for level in self._chain()]
        return ContinuumState(levels, position)

    def describe_memories(self) -> tuple[MemoryDescription, ...]:
        """The fast down-projections; a level without a period is an ordinary MLP and no memory of the context."""
        c, found = self.config, []
        rule = write_rule(retention=False, erase=c.erase)
        for i, level in enumerate(self._chain()):
            if level.period is None:
                continue
            above = f"level {i + 1}" if level.context is not None else None
            found.append(
                MemoryDescription(
                    name=f"level {i}",
                    period=level.period,
                    objective=OBJECTIVES["l2"],
                    rule=f"{rule}; g at the start of {level.period} tokens",
                    state=level.down.numel(),
                    initial=(f"levels.{i}.down",),
                    part=f"levels.{i}",
                    restarts=above,
                )
            )
        return tuple(found)

    def _chain(self) -> list[ContinuumLevel]:
        return [cast(ContinuumLevel, level) for level in self.levels]

    def run(
        self, x: Float[Tensor, "N L hidden"], state: State, lengths: Tensor | None
    ) -> tuple[Float[Tensor, "N L hidden"], ContinuumState]:
        """See `SequenceLayer.run`."""
        if not isinstance(state, ContinuumState):
            raise TypeError(f"a continuum memory continues from a ContinuumState, not from {type(state).__name__}")
        after = state.position + (x.shape[1] if lengths is None else lengths)
        levels: list[LevelState | None] = []
        total = x
        for i, level in enumerate(self._chain()):
            grid = level.grid(state.position, lengths, x.shape[1])
            y, new = level(x, state.levels[i], grid, Aligned(lengths))
            levels.append(new)
            if self.weights is None:
                x = total = x + y
            else:
                total = total + self.weights[i].to(y.dtype) * y
        return total, ContinuumState(levels, after)
