"""The rates of a chunk: compiled code against torch, their stable range, and tokens that are not there."""

from __future__ import annotations

import itertools

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
    outputs = [rates.decay.log_retention, *rates.inner_lr, *(rates.erase or [])]
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
        assert bool((rate[absent] == 0).all()) and bool((rate[~absent] > 0).all())


@pytest.mark.any_shapes
@pytest.mark.skipif(build.library() is None, reason="no C++ compiler")
def test_gates_of_another_shape_are_refused() -> None:
    gates, scales, _ = made(2, True, False, False)
    with pytest.raises(ValueError, match=r"alpha is \(2, 3, 4\)"):
        chunk_rates(KINDS[0], Gates(gates.eta, gates.alpha[..., :4], None, None), scales)
