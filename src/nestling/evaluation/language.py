"""Loss of a language model on held-out text: per token, per byte, and against position, the state kept or reset."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LossReport:
    """Loss over a text.

    Attributes:
        loss: nats per token, the mean over `tokens` predictions.
        tokens: predictions made; the first token of a text is not predicted.
        bytes: UTF-8 bytes the tokens stand for; None when unknown.
    """

    loss: float
    tokens: int
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that overflows."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Total bits over total bytes: comparable between tokenizers, as perplexity is not."""
        return self.loss * self.tokens / (math.log(2) * self.bytes) if self.bytes else None


@torch.no_grad()
def token_losses(
    model: nn.Module,
    token_ids: np.ndarray | Tensor,
    *,
    reset_every: int | None = None,
    segment: int = 512,
    batch_size: int = 8,
    state: Any = None,
    on_segment: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, " n"], Any]:
    """Loss of every token of a text but the first, in nats, in order.

    The text is read in windows of `reset_every` tokens. A window starts from `state` (or the model's initial state) and
    is read in segments with the state carried, so the same tokens are scored whatever the window: only how far back
    the model can look differs.

    Args:
        model: called as `model(input_ids, past_key_values=..., use_cache=True)`.
        token_ids: `[n + 1]`.
        reset_every: tokens after which the state is reset; None carries it through the whole text.
        segment: tokens per forward pass. A matter of memory and speed: it changes no result.
        batch_size: windows read side by side.
        state: a state of one row that every window starts from; None is the model's initial state.
        on_segment: called with the tokens scored since the last call, for progress.

    Returns:
        losses `[n]` in float32 on the CPU, and the state after the last window, detached.
        With one window that is the state after token n, the last one not yet read.

    Raises:
        ValueError: fewer than two tokens, a bad window or segment length, or a state of several rows.
    """
    ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long)
    n = len(ids) - 1
    if ids.dim() != 1 or n < 1:
        raise ValueError(f"loss needs a one-dimensional text of at least two tokens, not shape {tuple(ids.shape)}")
    window = n if reset_every is None else min(reset_every, n)
    if window < 1 or segment < 1 or batch_size < 1:
        raise ValueError(f"window {window}, segment {segment} and batch_size {batch_size} must all be at least 1")
    if state is not None and state.batch_size != 1:
        raise ValueError(f"the starting state has {state.batch_size} rows; give one row with state.select([row])")
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    final = state
    try:
        for starts, length in _batches(n, window, batch_size):
            inputs = torch.stack([ids[s : s + length] for s in starts])
            targets = torch.stack([ids[s + 1 : s + length + 1] for s in starts])
            start_state = None if state is None else state.select([0] * len(starts))
            found, final = _read_windows(model, inputs, targets, segment, start_state, on_segment)
            losses.append(found.flatten())
    finally:
        model.train(was_training)
    return torch.cat(losses), final.detach()


def read_text(
    model: nn.Module,
    token_ids: np.ndarray | Tensor,
    *,
    state: Any = None,
    segment: int = 512,
    on_segment: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, " n"], Any]:
    """Read a whole text with the state kept: losses as `token_losses` has them, and the state after the last token."""
    losses, state = token_losses(model, token_ids, segment=segment, state=state, on_segment=on_segment)
    last = torch.as_tensor(np.asarray(token_ids)[-1:], dtype=torch.long)[None]
    with torch.no_grad():
        out = model(input_ids=last.to(next(model.parameters()).device), past_key_values=state, use_cache=True)
    return losses, out.past_key_values.detach()


def evaluate_loss(
    model: nn.Module,
    token_ids: np.ndarray | Tensor,
    sequence_length: int,
    carry: bool = False,
    *,
    batch_size: int = 8,
    state: Any = None,
    n_bytes: int | None = None,
) -> LossReport:
    """Mean loss over a text.

    Args:
        model: a causal language model.
        token_ids: `[n + 1]`.
        sequence_length: the state is reset after so many tokens, or with `carry` the length of a forward pass.
        carry: keep the state instead. The text is then cut into `batch_size` contiguous parts read side by side, each
            with a state of its own; `batch_size=1` reads it as one.
        batch_size: windows, or parts, read side by side.
        state: a state of one row to start every window or part from.
        n_bytes: UTF-8 bytes of the text, for bits per byte.
    """
    n = len(token_ids) - 1
    reset = max(1, math.ceil(n / batch_size)) if carry else sequence_length
    losses, _ = token_losses(
        model, token_ids, reset_every=reset, segment=sequence_length, batch_size=batch_size, state=state
    )
    return LossReport(float(losses.double().mean()), len(losses), n_bytes)


@dataclass(frozen=True)
class PositionBin:
    """Mean loss (nats per token) over the positions `start` to `stop - 1`."""

    start: int
    stop: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return _exp(self.loss)


def loss_by_position(losses: Float[Tensor, " n"], bins: int = 12, window: int | None = None) -> list[PositionBin]:
    """Loss against position, in bins of equal width.

    Args:
        losses: per token, as `token_losses` gives them.
        bins: how many; fewer where there are fewer positions.
        window: fold the text at this length, so that position counts from each reset and a bin averages over all
            windows; None takes the whole text as one window.
    """
    n = len(losses)
    if n < 1:
        raise ValueError("no losses to average")
    length = n if window is None else min(window, n)
    place = torch.arange(n) % length
    edges = np.linspace(0, length, min(bins, length) + 1).round().astype(int)
    found = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        chosen = losses[(place >= start) & (place < stop)]
        found.append(PositionBin(start, stop, float(chosen.double().mean())))
    return found


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _batches(n: int, window: int, batch_size: int) -> list[tuple[list[int], int]]:
    """(window starts, window length) of each batch; a shorter last window is a batch of its own."""
    whole = list(range(0, n - window + 1, window))
    batches = [(whole[i : i + batch_size], window) for i in range(0, len(whole), batch_size)]
    rest = n % window
    return [*batches, ([n - rest], rest)] if rest else batches


def _read_windows(
    model: nn.Module,
    inputs: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    segment: int,
    state: Any,
    on_segment: Callable[[int], None] | None,
) -> tuple[Float[Tensor, "B T"], Any]:
    device = next(model.parameters()).device
    parts = []
    for x, y in zip(inputs.split(segment, 1), targets.split(segment, 1), strict=True):
        out = model(input_ids=x.to(device), past_key_values=state, use_cache=True)
        state = out.past_key_values
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), y.to(device).flatten(), reduction="none")
        parts.append(loss.view(y.shape).cpu())
        if on_segment is not None:
            on_segment(y.numel())
    return torch.cat(parts, 1), state
