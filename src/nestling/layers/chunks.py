"""What layers with chunked memories share: the loop over chunks, one chunk's lesson, and the read-out.

N rows, H heads, L tokens of a call (of a chunk, where a function says so), D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestling.memory.bank import BankState, MemoryBank, Mix
from nestling.memory.grid import Grid, chunk_spans, shift_rows, unshift_rows
from nestling.memory.lesson import Rates, generating
from nestling.memory.rule import Rule
from nestling.memory.state import State

Span = tuple[int, int]
Carry = TypeVar("Carry")
S = TypeVar("S", bound=State)


def run_checkpointed(
    run: Callable[[Tensor, S, Tensor | None], tuple[Tensor, S]],
    x: Tensor,
    state: S,
    lengths: Tensor | None,
    stride: int | None,
) -> tuple[Tensor, S]:
    """`run(x, state, lengths)` in calls of `stride` tokens whose activations the backward pass computes again.

    Without a stride, or without gradients, it is one call.
    """
    if stride is None or not torch.is_grad_enabled():
        return run(x, state, lengths)
    outputs = []
    for at in range(0, x.shape[1], stride):
        part = x[:, at : at + stride]
        held = None if lengths is None else (lengths - at).clamp(0, part.shape[1])
        y, state = checkpoint(run, part, state, held, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def scan_chunks(
    tokens: dict[str, Tensor],
    grid: Grid,
    chunk: int,
    carry: Carry,
    run: Callable[[Span, dict[str, Tensor], Carry, Grid], tuple[Tensor, Carry]],
) -> tuple[Tensor, Carry]:
    """Run chunk after chunk, every row at its own position of its chunk.

    Args:
        tokens: what `run` needs of every token, `[N, H, L, ...]`.
        grid: of the call.
        chunk: tokens in a chunk.
        carry: state before the first chunk.
        run: takes the slots `(start, end)` of the grid, their tokens, the carry and the grid; returns outputs
            `[N, H, end - start, V]` and the carry after them.

    Returns:
        Outputs `[N, H, L, V]` and the carry after the last chunk.
    """
    time = next(iter(tokens.values())).shape[2]
    if grid.offsets is not None:
        tokens = {n: shift_rows(t, grid) for n, t in tokens.items()}
    outputs = []
    spans = chunk_spans(grid.phase, grid.slots, chunk)
    sizes = [end - start for start, end in spans]
    parts = zip(*(t.split(sizes, 2) for t in tokens.values()), strict=True)
    for span, part in zip(spans, parts, strict=True):
        y, carry = run(span, dict(zip(tokens, part, strict=True)), carry, grid)
        outputs.append(y)
    o = torch.cat(outputs, dim=2)
    return (o if grid.offsets is None else unshift_rows(o, grid, time)), carry


def learn_chunk(
    rule: Rule,
    bank: MemoryBank,
    state: BankState,
    key: Tensor,
    value: Tensor,
    rates: Rates,
    q: Tensor | None,
    self_targets: bool,
    base: list[Tensor] | None = None,
    gain: Tensor | None = None,
    length: Tensor | None = None,
    mix: Mix | None = None,
) -> tuple[Tensor | None, BankState]:
    """Targets, gradients and write of one chunk, and the first deep memory's answers to `q` as `rule.read` says.

    Args:
        rule: the learning rule.
        bank: the memories.
        state: before the chunk.
        key: `[N, H, L, K]`, L tokens of one chunk, as in `value` and `q`.
        value: `[N, H, L, K]`.
        rates: of the chunk.
        q: queries; None reads nothing.
        self_targets: every memory's target is its own M(v_t), else v_t.
        base: `MemoryBank.base`.
        gain: see `MemoryBank.whole` and `memory.lesson.generating`.
        length: see `MemoryBank.lesson`.
        mix: see `MemoryBank.update`; for reads of every token's own weights.
    """
    start = bank.whole(state.start, base, gain)
    teachers = generating(state.start, base, gain) if base and gain is not None and self_targets else None
    lesson = bank.lesson(rule, start, key, value, self_targets, base, teachers, length)
    fresh = base is None and state.start[0] is state.running[0]
    y, after = bank.update(rule, state, lesson, rates, fresh, q if rule.read == "token" else None, base, mix)
    if q is not None and rule.read == "chunk":
        y = bank.read(start, dict.fromkeys((*bank.deep, "gates"), q))[bank.deep[0]]
    return y, after
