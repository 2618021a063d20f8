"""Analytic gradients of the inner objectives equal autograd of the objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestling.memory.objective import inner_loss, output_gradient
from nestling.memory.rule import Rule

RULES: list[dict[str, Any]] = [
    {"objective": "l2"},
    {"objective": "dot"},
    {"objective": "lp", "p": 3.0},
    {"objective": "lp", "p": 1.5},
    {"objective": "huber", "delta": 0.5},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_gradient_is_the_derivative_of_the_loss(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    v = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    rule = Rule(**settings, clip=1e6)
    loss = inner_loss(rule, y, v)
    assert loss.shape == (4,)
    (wanted,) = torch.autograd.grad(loss.sum(), y)
    torch.testing.assert_close(output_gradient(rule, y, v), wanted)


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_gradient_is_differentiable(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    y, v = (torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    rule = Rule(**settings)
    assert torch.autograd.gradcheck(lambda a, b: output_gradient(rule, a, b), (y, v))


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_no_coordinate_exceeds_the_clip(settings: dict[str, Any]) -> None:
    y, v = torch.tensor([1e9, -1e9, 0.0]), torch.tensor([-1e9, 1e9, 1e9])
    found = output_gradient(Rule(**settings, clip=0.3), y, v)
    assert bool(torch.isfinite(found).all())
    assert bool((found.abs() <= 0.3).all())


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_no_error_gives_a_finite_outer_gradient(settings: dict[str, Any]) -> None:
    """|y - v|^(p-1) has an infinite slope at 0 for p < 2; training would see NaN."""
    y, v = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    gradient = output_gradient(Rule(**settings), y, v)
    assert bool((gradient.abs() < 1e-5).all())
    for found in torch.autograd.grad(gradient.sum(), (y, v), allow_unused=True):
        assert found is None or bool(torch.isfinite(found).all())


def test_known_values() -> None:
    y, v = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0])
    assert inner_loss(Rule(), y, v).item() == pytest.approx(0.5 * (4 + 0.25))
    assert inner_loss(Rule(objective="dot"), y, v).item() == pytest.approx(-0.5)
    assert inner_loss(Rule(objective="lp", p=3.0), y, v).item() == pytest.approx((8 + 0.125) / 3)
    assert inner_loss(Rule(objective="huber", delta=1.0), y, v).item() == pytest.approx(1.5 + 0.125)
