"""The rates of a chunk: compiled code against torch, their stable range, and tokens that are not there."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestling.layers.rates import Gates, Scales, chunk_rates
from nestling.ops import native
from nestling.ops.native import RateRule, build

KINDS = [
    RateRule("erase", 2.0, 0.25),
    RateRule("free", 2.0, 0.03),
    RateRule("dot", 2.0, 0.25),
    RateRule("online", 1.5, 0.25),
    RateRule("online", 2.0, 0.25, online_only=True),
    RateRule("split", 2.0, 0.25, stretch=1.3),
]
SHAPE = (2, 3, 5)


def made(layers: int, retention: bool, momentum: bool, missing: bool) -> tuple[Gates, Scales, list[Tensor]]:
    """Gates and scales, and the leaves among them."""
    torch.manual_seed(0)
    normal = [3 * torch.randn(SHAPE, dtype=torch.float64) for _ in range(3)]
    eta, alpha, b = (t.requires_grad_() for t in (normal[0], normal[1], -normal[2].abs()))
    eta_bias, alpha_bias = (torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    share, hidden = (torch.rand(n, 3, dtype=torch.float64).requires_grad_() for n in (layers, layers - 1))
    valid = torch.rand(2, 1, 5) < 0.6 if missing else None
    gates = Gates(eta, alpha if retention else None, b if momentum else None, valid)
    scales = Scales(eta_bias, alpha_bias if retention else None, share, hidden if layers > 1 else None)
    return gates, scales, [eta, alpha, b, eta_bias, alpha_bias, share, hidden]


def results(rule: RateRule, gates: Gates, scales: Scales, leaves: list[Tensor]) -> list[Tensor]:
    rates = chunk_rates(rule, gates, scales)
    decay = [t for t in (rates.decay.log_retention, rates.decay.log_momentum) if t is not None]
    outputs = [*decay, *rates.inner_lr, *(rates.erase or [])]
    upstream = [torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    total = sum((o * u).sum() for o, u in zip(outputs, upstream, strict=False))
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


@pytest.mark.skipif(build.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("rule", KINDS, ids=lambda r: f"{r.kind} {r.online_only}")
@pytest.mark.parametrize("layers", [1, 3])
def test_compiled_rates_equal_torch(monkeypatch: pytest.MonkeyPatch, rule: RateRule, layers: int) -> None:
    for flags in itertools.product([False, True], repeat=3):
        case = made(layers, *flags)
        compiled = results(rule, *case)
        with monkeypatch.context() as patch:
            patch.setattr(native, "fits", lambda *_: False)
            plain = results(rule, *case)
        for i, (a, b) in enumerate(zip(compiled, plain, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.parametrize("rule", KINDS, ids=lambda r: f"{r.kind} {r.online_only}")
@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_rates_stay_in_their_range(rule: RateRule, logit: float) -> None:
    gates, scales, _ = made(2, True, True, False)
    flat = torch.full(SHAPE, logit, dtype=torch.float64)
    rates = chunk_rates(rule, Gates(flat, flat, gates.log_momentum, None), scales)
    keep = rates.decay.log_retention.exp()
    for lr in rates.inner_lr:
        assert bool((lr >= 0).all()) and bool((lr <= rule.max_erase).all())
    for erase in rates.erase or []:
        assert bool((erase >= 0).all()) and bool((erase <= rule.max_erase * keep + 1e-12).all())


@pytest.mark.parametrize("rule", KINDS, ids=lambda r: f"{r.kind} {r.online_only}")
def test_tokens_that_are_not_there_have_no_rate(rule: RateRule) -> None:
    gates, scales, _ = made(2, True, True, True)
    rates = chunk_rates(rule, gates, scales)
    assert gates.valid is not None
    absent = ~gates.valid.expand(SHAPE)
    for rate in [*rates.inner_lr, *(rates.erase or [])]:
        assert bool((rate[absent] == 0).all())
        # A stretched rate reaches 0 by itself.
        assert bool((rate[~absent] > 0).all() if rule.stretch == 1 else (rate[~absent] > 0).any())


def test_a_stretched_rate_reaches_both_ends_and_is_half_in_the_middle() -> None:
    gates, scales, _ = made(1, False, False, False)
    eta = torch.tensor([-9.0, 0.0, 9.0], dtype=gates.eta.dtype).expand(*SHAPE[:2], 3)
    scales = replace(scales, eta_bias=torch.zeros_like(scales.eta_bias))
    rates = chunk_rates(RateRule("split", 2.0, 0.25, stretch=1.03), Gates(eta, None, None, None), scales)
    assert rates.erase is not None
    assert torch.equal(
        rates.erase[0] + rates.inner_lr[0], torch.tensor([0.0, 1.0, 2.0], dtype=eta.dtype).expand_as(eta)
    )


@pytest.mark.any_shapes
@pytest.mark.skipif(build.library() is None, reason="no C++ compiler")
def test_gates_of_another_shape_are_refused() -> None:
    gates, scales, _ = made(2, True, False, False)
    with pytest.raises(ValueError, match=r"alpha is \(2, 3, 4\)"):
        chunk_rates(KINDS[0], Gates(gates.eta, gates.alpha[..., :4], None, None), scales)


def in_coordinates_of_the_bound(beta: float, a: float, b: float, e: float, lr: float) -> Tensor:
    """How one token moves (y, c s), y = w + p s, of the direction of its key (`docs/paper_map.md`)."""
    p = beta / (1 - beta)
    c = (p * (1 + p)) ** 0.5
    token = torch.tensor([[a - e - lr, b], [-lr, b]], dtype=torch.float64)
    change = torch.tensor([[1.0, p], [0.0, c]], dtype=torch.float64)
    return change @ token @ torch.linalg.inv(change)


@pytest.mark.parametrize("beta", [0.02, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("online_only", [True, False])
@pytest.mark.parametrize("logit", [-3.0, 0.0, 40.0])
def test_online_gradients_with_momentum_are_a_contraction(beta: float, online_only: bool, logit: float) -> None:
    """In one quadratic norm, whatever retention, rate and key a token has, it shrinks errors by its retention."""
    rule = RateRule("online", 2.0, 0.25, online_only=online_only)
    alpha = torch.tensor([[[-60.0, -8.0, 0.0, 60.0]]], dtype=torch.float64)
    log_beta = torch.full_like(alpha, beta).log()
    for share in (0.01, 0.5, 0.999):
        one = torch.full((1, 1), share, dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        gates = Gates(torch.full_like(alpha, logit), alpha, log_beta, None)
        rates = chunk_rates(rule, gates, Scales(zero, zero, one, None))
        assert rates.decay.log_momentum is not None
        erase = torch.zeros_like(alpha) if rates.erase is None else rates.erase[-1]
        given = (rates.decay.log_retention.exp(), rates.decay.log_momentum.exp(), erase, rates.inner_lr[-1])
        for a, b, e, lr in torch.stack(given, -1)[0, 0].tolist():
            for strength in (0.0, 1.0):  # 0: directions orthogonal to the key
                moved = in_coordinates_of_the_bound(beta, a, b, strength * e, strength * lr)
                assert float(torch.linalg.matrix_norm(moved, 2)) <= a * (1 + 1e-9)
            if online_only and logit > 30 and a > 0.9:
                # The bound is no larger than it must be.
                assert lr == pytest.approx(2 * a * (1 - beta) ** 2 / (1 + beta))
                moved = in_coordinates_of_the_bound(beta, a, b, 0.0, 1.02 * lr)
                assert float(torch.linalg.matrix_norm(moved, 2)) > a
