"""A whole call of a layer with one bank: compiled at one go where compiled code covers it, else chunk after chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nestling.layers.rates import Scales
from nestling.memory.bank import BankState, MemoryBank
from nestling.memory.grid import Grid
from nestling.memory.rule import Rule
from nestling.ops import native
from nestling.ops.native import LoopShape, LoopTensors, RateRule

Base = list[Tensor] | None
Plain = Callable[[dict[str, Tensor], Scales, Base, BankState], tuple[Tensor, BankState]]


@dataclass(frozen=True)
class BankLoop:
    """The loop over the chunks of one bank, whose first memory answers the queries if it is called "memory".

    Attributes:
        rule: the learning rule.
        rates: formula of the rates.
        bank: the memories; the others make what their names say, "k", "v", "q", "eta" and "alpha".
        chunk: tokens in a chunk.
        self_targets: every memory's target is its own M(v_t), else v_t.
    """

    rule: Rule
    rates: RateRule
    bank: MemoryBank
    chunk: int
    self_targets: bool

    def run(
        self,
        plain: Plain,
        tokens: dict[str, Tensor],
        scales: Scales,
        base: Base,
        state: BankState,
        grid: Grid,
    ) -> tuple[Tensor, BankState]:
        """Answers `[N, H, L, V]`, or what a bank without M_memory makes, side by side; and the bank after all tokens.

        Args:
            plain: the same chunk after chunk, of the tokens, the scales, the base and the state.
            tokens: what the memories do not make of "k", "v", "q" `[N, H, L, K]`, "eta", "alpha" and "log_b"
                `[N, H, L]`, and `[N, H, L, K]` of which they make the rest: "u_k", "u_v", "u_q" and "u_gates".
            scales: of the rates.
            base: `MemoryBank.base`.
            state: of the bank before the first token.
            grid: of the call.
        """
        time = next(iter(tokens.values())).shape[2]
        if not self.covered(tokens, state, grid):
            return plain(tokens, scales, base, state)
        shape = self._shape(min(self.chunk - grid.phase, time), state)
        layers = len(state.start)
        split = any(a is not b for a, b in zip(state.start, state.running, strict=True))
        given = LoopTensors(
            [tokens.get(name) for name in native.TOKENS],
            [getattr(scales, name) for name in native.SCALES],
            state.start,
            state.running if split else [None] * layers,
            state.surprise or [None] * layers,
            base or [None] * layers,
        )
        y, (running, surprise, begun) = native.native_loop(_flat(plain, begins=grid.slots > self.chunk), shape, given)
        start = state.start if begun[0] is None else begun
        if grid.slots % self.chunk == 0:
            start = running
        return y, BankState(start, running, surprise if state.surprise else None)

    def covered(self, tokens: dict[str, Tensor], state: BankState, grid: Grid) -> bool:
        """Whether the compiled loop can run this: rows in step, quadratic or linear objectives, sizes of a cache."""
        rule, depth = self.rule, self.bank.depth
        simple = rule.objective in ("l2", "dot") and rule.read == "token" and depth <= native.MAX_LAYERS
        if not simple or grid.offsets is not None or min(self.chunk, grid.slots) > native.MAX_CHUNK:
            return False
        some = next(iter(tokens.values()))[..., :1, :]
        return all(native.fits(some, weight) for weight in state.running)

    def _shape(self, first: int, state: BankState) -> LoopShape:
        rule, bank = self.rule, self.bank
        dot, answers = rule.objective == "dot", bank.deep[:1] == ("memory",)
        memories = native.BankShape(
            len(bank.deep), len(bank.gates), bank.hidden, bank.activation, self.self_targets, dot, rule.clip, 1
        )
        return LoopShape(
            memories,
            self.rates,
            self.chunk,
            first,
            answers,
            bank.deep[answers:],
            bank.gates,
            online=rule.online,
            momentum=state.surprise is not None,
            read_before=rule.read_before,
        )


def _flat(plain: Plain, begins: bool) -> Callable[[LoopTensors], list[Tensor | None]]:
    """`plain` with tensors for arguments and results; `begins`: the last chunk's first weights are a result."""

    def run(given: LoopTensors) -> list[Tensor | None]:
        tokens = {n: t for n, t in zip(native.TOKENS, given.tokens, strict=True) if t is not None}
        start = list(given.start)
        running = [t for t in given.running if t is not None] or start
        surprise = [t for t in given.surprise if t is not None] or None
        base = [t for t in given.base if t is not None] or None
        scales = Scales(**dict(zip(native.SCALES, given.scales, strict=True)))  # type: ignore[arg-type]
        y, after = plain(tokens, scales, base, BankState(start, running, surprise))
        nothing: list[Tensor | None] = [None] * len(start)
        # Where the last chunk is complete its weights are the running ones.
        began = begins and after.start[0] is not after.running[0]
        return [y, *after.running, *(after.surprise or nothing), *(after.start if began else nothing)]

    return run
