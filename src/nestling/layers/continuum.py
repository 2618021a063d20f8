"""The Continuum Memory System in context (NL section 7.1, Eq. 70-74)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.continuum_config import ContinuumConfig
from nestling.layers.continuum_update import PeriodState, proximal_step, spectral_step, with_momentum
from nestling.layers.heads import fast_dtype, logit
from nestling.layers.sequence import Aligned, SequenceLayer
from nestling.memory.description import OBJECTIVES, SURPRISE, MemoryDescription, write_rule
from nestling.memory.grid import Grid, chunk_spans, shift_rows, unshift_rows
from nestling.memory.state import State, rows_of
from nestling.ops.chunk_rule import chunk_advance, chunk_writes, decay_products

__all__ = ["ContinuumConfig", "ContinuumLevel", "ContinuumMemory", "ContinuumState", "LevelState"]

# Tokens whose erases are solved together: the solve needs their Gram matrix, so a slow level's period is cut. The cut
# changes nothing but rounding and memory, since the gradients stay those of the period's first weights.
MAX_SOLVE = 512


FIRST_MOMENTUM, FIRST_RETENTION = 0.5, 0.95
OVER = {"token": "", "spectral": ", l over their keys' largest eigenvalue", "proximal": ", solved for all of them"}


@dataclass
class LevelState(State):
    """Fast weights of one level, `[N, hidden, intermediate]`; with a gain their differences to W_0, the learned ones.

    Of differences the gain gets a gradient of exactly zero before the first update, also where an optimizer has changed
    W_0 since the document began. Rounding, or W_0's own steps, would be enough for an optimizer that normalises
    gradients to walk with.

    Attributes:
        start: weights since the last update; the level's output comes from them.
        running: weights with the writes of the current period; None with a step over the whole period.
        initial: nested only: the initial state that the level above has learned.
        tail: target "next" only: hidden activation of the last token, `[N, 1, intermediate]`.
        period: with a step over the whole period: what it needs of the current one's tokens.
        surprise: with momentum: S.
    """

    start: Tensor
    running: Tensor | None
    initial: Tensor | None
    tail: Tensor | None
    period: PeriodState | None = None
    surprise: Tensor | None = None


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
        self.rule = c.rule(index)
        learns = self.period is not None
        mixes = learns and c.target != "reconstruction"
        self.value = nn.Linear(c.hidden_size, c.hidden_size, bias=False) if mixes else None
        self.rate = nn.Parameter(torch.empty(())) if learns else None
        self.transfer = nn.Parameter(torch.empty(())) if self.context is not None else None
        self.momentum = nn.Parameter(torch.empty(())) if learns and self.rule.momentum else None
        self.retention = nn.Parameter(torch.empty(())) if learns and self.rule.retention else None
        self.gain = nn.Parameter(torch.empty(c.hidden_size)) if learns and c.gain else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates at `inner_lr_scale`; the level above keeps half of a context.

        The down-projection is so small that all levels together start as large as one feed-forward network; what they
        write into the residual stream hides there what the mixers say.
        """
        c = self.config
        levels = 1 / len(c.periods) if c.variant == "headwise" else len(c.periods)
        # 3: `nn.Linear` draws weights of variance 1 / (3 inputs).
        nn.init.normal_(self.down, std=1 / math.sqrt(3 * levels * c.intermediate_size))
        if self.rate is not None:
            nn.init.constant_(self.rate, logit(self.config.inner_lr_scale))
        if self.transfer is not None:
            nn.init.zeros_(self.transfer)
        if self.momentum is not None:
            nn.init.constant_(self.momentum, logit(FIRST_MOMENTUM))
        if self.retention is not None:
            nn.init.constant_(self.retention, logit(FIRST_RETENTION))
        if self.gain is not None:
            nn.init.zeros_(self.gain)

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
        """The first fast weights, no last token, no period begun and no surprise."""
        assert self.period is not None
        dtype = fast_dtype(x)
        weight = rows_of(self._first(dtype), len(x))
        whole = self.rule.step != "token"
        return LevelState(
            start=weight,
            running=None if whole else weight,
            initial=weight if self.context is not None else None,
            tail=x.new_zeros(len(x), 1, self.down.shape[1], dtype=dtype) if self.config.target == "next" else None,
            period=PeriodState.empty(weight, self.period) if whole else None,
            surprise=torch.zeros_like(weight) if self.momentum is not None else None,
        )

    def _first(self, dtype: torch.dtype) -> Tensor:
        """The fast weight of a document's start: W_0, or with a gain no difference to it."""
        return self.down.to(dtype) if self.gain is None else torch.zeros_like(self.down, dtype=dtype)

    def _scan(
        self, h: Tensor, target: Tensor, state: LevelState, grid: Grid, lengths: Tensor | None
    ) -> tuple[Tensor, LevelState]:
        """Output and new state."""
        assert self.period is not None
        first = None if self.gain is None else h @ self.down.to(h.dtype).mT
        tokens = [h, *self._lessons(h, target, state.tail, first)]
        if grid.offsets is not None:
            tokens = [shift_rows(t.unsqueeze(1), grid).squeeze(1) for t in tokens]
        spans = chunk_spans(grid.phase, grid.slots, self.period)
        pieces = zip(*(t.split([e - s for s, e in spans], 1) for t in tokens), strict=True)
        whole, outputs = state.period is not None, []
        if whole and grid.offsets is None and grid.phase % self.period == 0:
            state = replace(state, period=None)  # zeros, which need not be added to
        for (begin, end), (h_c, key, wanted, scale) in zip(spans, pieces, strict=True):
            outputs.append(h_c @ state.start.mT)
            recalled = outputs[-1] if state.tail is None else key @ state.start.mT
            state = self._collect(state, key, torch.addcmul(wanted, scale, recalled), begin)
            if end % self.period == 0:
                state = self._update(state, grid, end)
        y = torch.cat(outputs, dim=1)
        if grid.offsets is not None:
            y = unshift_rows(y.unsqueeze(1), grid, h.shape[1]).squeeze(1)
        if first is not None:
            assert self.gain is not None
            y = first + self.gain.to(h.dtype) * y
        if state.tail is not None:
            state = replace(state, tail=_last(h, state.tail, lengths))
        if whole and state.period is None:
            state = replace(state, period=PeriodState.empty(state.start, self.period))
        return y, state

    def _lessons(self, h: Tensor, target: Tensor, tail: Tensor | None, first: Tensor | None) -> list[Tensor]:
        """Keys, and b and s of the errors b + s W x, where x is the query or, with a last token, the key.

        Keys and errors count as divided by max(1, |key|); those of steps token by token have the rate too.

        `first` is W_0 h, where the fast weights are differences to W_0: their target is what W_0 leaves of it.
        """
        key = h if tail is None else torch.cat([tail, h], dim=1)[:, :-1]
        if first is not None:
            target = target - (first if tail is None else key @ self.down.to(key.dtype).mT)
        shrink = key.square().sum(-1, keepdim=True).clamp_min(1.0).rsqrt()
        scale = shrink if self.rule.step != "token" else shrink * self._token_rate().to(key.dtype)
        return [key * shrink, -scale * target, scale if tail is None else scale / shrink]

    def _token_rate(self) -> Tensor:
        assert self.rate is not None and self.period is not None
        return torch.sigmoid(self.rate) / self.period

    def _collect(self, state: LevelState, key: Tensor, error: Tensor, begin: int) -> LevelState:
        """The state with some of a period's tokens, whose first stands in slot `begin`.

        Slots without a token hold a key of zeros: they write and erase nothing.
        """
        assert self.period is not None
        if state.running is not None:
            return replace(state, running=self._write(state.running, key, error))
        if state.period is None:
            return replace(state, period=PeriodState.of(key, error, begin % self.period, self.period))
        return replace(state, period=state.period.add(key, error, begin % self.period, self.period))

    def _write(self, running: Tensor, key: Tensor, error: Tensor) -> Tensor:
        """Gradient steps on 1/2 |W key - target|^2 at the period's first weights, token by token; `error` has the rate.

        Rates sum to at most 1 over a period. Then the map from one period's weights to the next never stretches,
        whatever the keys. With the erase, e_t |key|^2 <= 1 for each token alone is not enough: the gradients see none
        of the period's erases, and keys that turn slowly make the weights grow without bound.
        """
        if not self.rule.erase:
            return torch.baddbmm(running, error.mT, key, alpha=-1)
        rates = self._token_rate().to(key.dtype).expand(key.shape[:2])
        for at in range(0, key.shape[1], MAX_SOLVE):
            t = slice(at, at + MAX_SOLVE)
            decay = decay_products(torch.zeros_like(key[:, t, 0]))
            writes = chunk_writes(key[:, t], error[:, t], rates[:, t], decay, running)
            running = chunk_advance(writes, decay, running)[0]
        return running

    def _update(self, state: LevelState, grid: Grid, end: int) -> LevelState:
        """The state after the slot `end`, where a period is over and with it, perhaps, a nested level's context."""
        moved = state.running if state.running is not None else state.start + self._step(state)
        surprise, initial = state.surprise, state.initial
        if self.momentum is not None:
            assert surprise is not None
            surprise = with_momentum(moved - state.start, surprise, torch.sigmoid(self.momentum).to(moved.dtype))
            moved = state.start + surprise
        if self.retention is not None:
            kept = torch.sigmoid(self.retention).to(moved.dtype)
            first = self._first(moved.dtype) if initial is None else initial
            moved = torch.lerp(first.expand_as(moved), moved, kept)
            surprise = None if surprise is None else kept * surprise
        if self.context is not None and end % self.context == 0:
            assert initial is not None and self.transfer is not None
            initial = moved = torch.lerp(initial, moved, torch.sigmoid(self.transfer.to(initial.dtype)))
            surprise = None if surprise is None else torch.zeros_like(surprise)
        after = LevelState(moved, None if state.running is None else moved, initial, state.tail, None, surprise)
        return _where_crossed(grid, end, after, state)

    def _step(self, state: LevelState) -> Tensor:
        """D of a step over the whole period."""
        assert self.rate is not None and self.period is not None and state.period is not None
        rate = torch.sigmoid(self.rate).to(state.start.dtype)
        step = spectral_step if self.rule.step == "spectral" else proximal_step
        return step(state.period, rate, self.period)


def _where_crossed(grid: Grid, end: int, after: LevelState, before: LevelState) -> LevelState:
    """`after` in the rows that cross the end of a period in this call, `before` in the others."""
    if grid.offsets is None:
        return after
    if before.period is not None:
        after = replace(after, period=before.period.map(torch.zeros_like))
    old = (t for name, t in before.tensors())
    return after.map(lambda new: grid.where_crossed(end, new, next(old)))


def _last(h: Tensor, tail: Tensor, lengths: Tensor | None) -> Tensor:
    """The last hidden activation that was read, `[N, 1, intermediate]`."""
    if lengths is None:
        return h[:, -1:]
    index = lengths.to(h.device)[:, None, None].expand(-1, 1, h.shape[2])
    return torch.cat([tail, h], dim=1).gather(1, index)


class ContinuumMemory(SequenceLayer):
    """A chain of MLPs that update at different frequencies, each with its pre-norm and residual.

    Level i computes x <- x + W_i h_i with h_i = silu(W_gate u) * (W_up u), u = RMSNorm(x). Its down-projection W_i is
    the fast weight: every `period` tokens it takes one step of the level's inner optimizer (Eq. 71;
    `layers.continuum_update`) on the sum of 1/2 |W_i key - target|^2 over the period's tokens, each over
    max(1, |key|^2), at a learnable rate r in (0, 1), so that the error on a constant stream shrinks (with `erase`, the
    distance to half the target). With `gain`, y = W_0 h + g * (W_i - W_0) h. The pair (key, target) of token t is

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
        found = []
        for i, level in enumerate(self._chain()):
            if level.period is None:
                continue
            rule = level.rule
            text = write_rule(retention=rule.retention, erase=rule.erase, momentum=rule.momentum)
            found.append(
                MemoryDescription(
                    name=f"level {i}",
                    period=level.period,
                    objective=OBJECTIVES["l2"],
                    rule=f"{text}; g at the start of {level.period} tokens{OVER[rule.step]}",
                    state=level.down.numel(),
                    initial=(f"levels.{i}.down",),
                    part=f"levels.{i}",
                    restarts=f"level {i + 1}" if level.context is not None else None,
                )
            )
            if rule.momentum:
                found.append(
                    MemoryDescription(
                        name=f"level {i} surprise",
                        period=level.period,
                        objective=SURPRISE[0],
                        rule=SURPRISE[1],
                        state=level.down.numel(),
                        feeds=(f"level {i}",),
                        part=f"levels.{i}",
                        restarts=f"level {i + 1}" if level.context is not None else None,
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
