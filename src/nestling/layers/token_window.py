"""The tokens of a window that reaches back over calls and chunks: what the Omega rule's inner objective covers.

N rows, H heads, L tokens of a call, D head width, P tokens before the first, E = 2 D + 1: a token's key, value and
importance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nestling.layers.chunks import Span
from nestling.memory.activation import ACTIVATIONS
from nestling.memory.bank import BankState, MemoryBank, Mix
from nestling.memory.grid import Grid, shift_rows
from nestling.memory.lesson import Rates
from nestling.memory.rule import Rule
from nestling.ops.short_conv import last_inputs
from nestling.ops.window_rule import window_shares, window_step


@dataclass(frozen=True)
class Seen:
    """A chunk's tokens behind the P before it: keys `[N, H, P + C, D]`, values, log importance, and which are there."""

    key: Tensor
    value: Tensor
    log_importance: Tensor
    valid: Bool[Tensor, "N 1 S"] | None
    past: int


@dataclass(frozen=True)
class TokenWindow:
    """The tokens of a call behind the P before it, in the slots of its grid.

    Attributes:
        tokens: `[N, H, P + slots, E]`.
        valid: `[N, 1, P + slots]`, None when all are there.
        origin: slot of the grid that stands at P.
        past: P.
    """

    tokens: Float[Tensor, "N H S E"]
    valid: Bool[Tensor, "N 1 S"] | None
    origin: int
    past: int

    @staticmethod
    def of(
        tail: Float[Tensor, "N H P E"],
        key: Float[Tensor, "N H L D"],
        value: Float[Tensor, "N H L D"],
        log_importance: Float[Tensor, "N H L"],
        position: Int[Tensor, " N"],
        lengths: Tensor | None,
        grid: Grid,
    ) -> tuple[TokenWindow, Float[Tensor, "N H P E"]]:
        """The window of a call, and the tail for the next one.

        Args:
            tail: the last tokens of earlier calls; a row that has read fewer than P has anything in front.
            key: of the call's tokens, as left-aligned rows.
            value: likewise.
            log_importance: likewise.
            position: tokens read before, of every row.
            lengths: of the rows; None when all are L long.
            grid: of the call.
        """
        past = tail.shape[2]
        seen = torch.cat([tail, torch.cat([key, value, log_importance[..., None]], -1)], 2)
        after = last_inputs(seen, past, lengths, dim=2)
        known = position.clamp_max(past)
        if grid.offsets is None or grid.ends is None:
            first, ends, origin = past - known, None, grid.phase
        else:
            first, ends, origin = grid.offsets + past - known, grid.ends + past, 0
            seen = shift_rows(seen, Grid(0, grid.slots + past, grid.offsets, ends))
        slots = torch.arange(seen.shape[2], device="cpu")
        valid = slots >= first[:, None]
        if ends is not None:
            valid = valid & (slots < ends[:, None])
        there = None if bool(valid.all()) else valid[:, None].to(key.device)
        return TokenWindow(seen, there, origin, past), after

    def part(self, span: Span) -> Seen:
        """The tokens in slots `span` of the grid and the P before them."""
        start, end = span[0] - self.origin, span[1] - self.origin + self.past
        key, value, importance = self.tokens[:, :, start:end].split_with_sizes(self._sizes, -1)
        valid = None if self.valid is None else self.valid[..., start:end]
        return Seen(key, value, importance.squeeze(-1), valid, self.past)

    @property
    def _sizes(self) -> list[int]:
        width = self.tokens.shape[-1] // 2
        return [width, width, 1]


def learn_window(
    rule: Rule, bank: MemoryBank, state: BankState, seen: Seen, rates: Rates, q: Tensor, mix: Mix | None = None
) -> tuple[Tensor, BankState]:
    """`chunks.learn_chunk` of one deep memory whose objective at every token covers the P tokens before it too.

    Args:
        rule: the learning rule, with chunk gradients and no erase.
        bank: of one deep memory.
        state: before the chunk.
        seen: the chunk's tokens behind the P before it, on which its objectives are.
        rates: of the chunk's tokens.
        q: queries `[N, H, C, K]`.
        mix: see `MemoryBank.update`.
    """
    lesson = bank.lesson(rule, state.start, seen.key, seen.value, self_targets=False)
    shares = window_shares(seen.log_importance, seen.past + 1, seen.valid)
    decay = rates.decay.products
    running: list[Tensor] = []
    surprises: list[Tensor] = []
    z: Tensor | None = q if rule.read == "token" else None
    for layer, (x, g) in enumerate(zip(lesson.inputs, lesson.gradients, strict=True)):
        weight, surprise = state.running[layer], None if state.surprise is None else state.surprise[layer]
        deep = layer > 0
        if deep:  # the one memory of the bank
            x, g, weight = x.squeeze(2), g.squeeze(2), weight.squeeze(2)
            surprise = None if surprise is None else surprise.squeeze(2)
            z = None if z is None else ACTIVATIONS[bank.activation](z)
        asked, band = z, rates.inner_lr[layer][..., None] * shares
        z, weight, surprise = window_step(
            x, g, band, decay, weight, surprise, q=z, normalise=deep, read_before=rule.read_before
        )
        if mix is not None and asked is not None and z is not None:
            z = mix(layer, asked, z)
        running.append(weight.unsqueeze(2) if deep else weight)
        if surprise is not None:
            surprises.append(surprise.unsqueeze(2) if deep else surprise)
    after = BankState(state.start, running, surprises or None)
    if z is None:
        return bank.read(state.start, dict.fromkeys(bank.deep, q))[bank.deep[0]], after
    return z + q if bank.depth > 1 else z, after
