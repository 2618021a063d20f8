"""The Omega rule in closed form equals its token-by-token reference, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.ops.chunk_rule import decay_products
from nestling.ops.reference import token_rule, window_rule
from nestling.ops.window_rule import window_shares, window_step

WIDTH_IN, WIDTH_OUT, TIME = 5, 3, 7


def make_inputs(before: int, momentum: bool) -> dict[str, Tensor]:
    """Leaves of the rule in float64; rates and importances as raw logits."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(2, 2, *shape, dtype=torch.float64, generator=generator).requires_grad_()

    given = {"x": noise(before + TIME, WIDTH_IN), "g": noise(before + TIME, WIDTH_OUT), "q": noise(TIME, WIDTH_IN)}
    given |= {"weight": noise(WIDTH_OUT, WIDTH_IN), "importance": noise(before + TIME)}
    given |= {"inner_lr": noise(TIME), "retention": noise(TIME)}
    return given | ({"surprise": noise(WIDTH_OUT, WIDTH_IN), "momentum": noise(TIME)} if momentum else {})


def fast(given: dict[str, Tensor], window: int, valid: Tensor | None = None, before: bool = False) -> list[Tensor]:
    """y, W and S of one chunk."""
    log_b = F.logsigmoid(given["momentum"]) if "momentum" in given else None
    there = None if valid is None else valid[..., window - 1 :]
    decay = decay_products(F.logsigmoid(given["retention"]), log_b, there)
    shares = window_shares(F.logsigmoid(given["importance"]), window, valid)
    lr = torch.sigmoid(given["inner_lr"])[..., None]
    y, *after = window_step(
        given["x"], given["g"], lr * shares, decay, given["weight"], given.get("surprise"), q=given["q"],
        read_before=before,
    )  # fmt: skip
    return [t for t in (y, *after) if t is not None]


def slow(given: dict[str, Tensor], window: int, before: bool = False) -> list[Tensor]:
    """The same, token by token."""
    rates = {n: torch.sigmoid(given[n]) for n in ("importance", "inner_lr", "retention", "momentum") if n in given}
    plain = {n: given[n] for n in ("x", "g", "q", "weight", "surprise") if n in given}
    return [t for t in window_rule(**plain, **rates, window=window, read_before=before) if t is not None]


def gradients(outputs: list[Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in outputs]
    scalar = sum(((t * w).sum() for t, w in zip(outputs, weights, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(scalar, list(given.values())))


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4, 12])
def test_equals_the_reference(window: int, momentum: bool, read_before: bool) -> None:
    given = make_inputs(window - 1, momentum)
    found, wanted = fast(given, window, before=read_before), slow(given, window, read_before)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(found, given), gradients(wanted, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_window_of_one_token_is_the_rule() -> None:
    given = make_inputs(0, True)
    rates = {n: torch.sigmoid(given[n]) for n in ("inner_lr", "retention", "momentum")}
    wanted = token_rule(given["x"], given["g"], given["q"], weight=given["weight"], surprise=given["surprise"], **rates)
    for a, b in zip(fast(given, 1), wanted, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [False, True])
def test_tokens_that_are_not_there_count_for_nothing(momentum: bool) -> None:
    """Neither before the window's first token nor after the row's last, whatever stands there."""
    window, first, last = 4, 2, 3 + TIME - 2
    given = make_inputs(window - 1, momentum)
    valid = torch.zeros(2, 1, window - 1 + TIME, dtype=torch.bool)
    valid[..., first:last] = True
    found = fast(given, window, valid)
    cut = {"x": slice(first, last), "g": slice(first, last), "importance": slice(first, last)}
    cut |= dict.fromkeys(("q", "inner_lr", "retention", "momentum"), slice(0, TIME - 2))
    short = {n: t[:, :, cut[n]] if n in cut else t for n, t in given.items()}
    wanted = slow(short, window)
    found[0] = found[0][:, :, : TIME - 2]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(found, given), gradients(wanted, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
