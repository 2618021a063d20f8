"""The causal convolution and its tail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.ops.short_conv import short_conv

CHANNELS = 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float64 noise that requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 3, 9])
def test_equals_conv1d_over_tail_and_input(width: int, time: int) -> None:
    x, weight, tail = noise(2, time, CHANNELS), noise(CHANNELS, width, seed=1), noise(2, width - 1, CHANNELS, seed=2)
    y, after = short_conv(x, weight, tail)
    seen = torch.cat([tail, x], 1)
    wanted = F.conv1d(seen.mT, weight[:, None], groups=CHANNELS).mT
    torch.testing.assert_close(y, wanted)
    assert torch.equal(after, seen[:, time:])
    mix = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = (x, weight, tail) if width > 1 else (x, weight)
    ours, theirs = (torch.autograd.grad((out * mix).sum(), inputs) for out in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("split", [(1,) * 9, (2, 7), (8, 1), (4, 0, 5)])
def test_calls_that_carry_the_tail_equal_one_call(split: tuple[int, ...]) -> None:
    x, weight, tail = noise(2, 9, CHANNELS), noise(CHANNELS, 4, seed=1), noise(2, 3, CHANNELS, seed=2)
    whole, last = short_conv(x, weight, tail)
    parts = []
    for part in x.split(split, 1):
        y, tail = short_conv(part, weight, tail)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(tail, last)


def test_lengths_end_the_tail_at_the_last_real_token() -> None:
    x, weight, tail = noise(4, 6, CHANNELS), noise(CHANNELS, 4, seed=1), noise(4, 3, CHANNELS, seed=2)
    lengths = torch.tensor([6, 4, 1, 0])
    y, after = short_conv(x, weight, tail, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, wanted = short_conv(x[row : row + 1, :length], weight, tail[row : row + 1])
        torch.testing.assert_close(y[row : row + 1, :length], alone)
        torch.testing.assert_close(after[row : row + 1], wanted)
    assert torch.equal(after[3], tail[3])


def test_tail_keeps_its_precision_under_half_precision_inputs() -> None:
    x, weight = noise(1, 5, CHANNELS).bfloat16(), noise(CHANNELS, 4, seed=1).float()
    _, after = short_conv(x, weight, torch.zeros(1, 3, CHANNELS))
    assert after.dtype == torch.float32
    assert torch.equal(after, x[:, 2:].float())


def test_gradcheck() -> None:
    lengths = torch.tensor([5, 2])
    inputs = (noise(2, 5, 2), noise(2, 3, seed=1), noise(2, 2, 2, seed=2))
    assert torch.autograd.gradcheck(lambda x, w, t: short_conv(x, w, t, lengths), inputs)
