"""Normalisation that is safe at zero and at the end of the range."""

from __future__ import annotations

import pytest
import torch

from nestling.ops.normalize import safe_normalize


def test_equals_x_over_its_length() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(safe_normalize(x), x / x.norm(dim=-1, keepdim=True), rtol=1e-10, atol=0)


def test_zero_gives_zero_with_finite_gradients_of_both_orders() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = safe_normalize(x)
    assert torch.equal(y, torch.zeros(2, 4))
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert bool(torch.isfinite(first).all())
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert bool(torch.isfinite(second).all())


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e17, 1e30, 3e38])
def test_any_length_is_finite_in_value_and_gradient(size: float) -> None:
    """Length 1 from far above eps; entries beyond 1e17 count as 1e17, so a longer vector turns but stays finite."""
    direction = torch.tensor([[0.6, -0.8, 0.0], [0.0, 0.0, 1.0]])
    x = (direction * size).requires_grad_()
    y = safe_normalize(x)
    if 1e-3 <= size <= 1e17:
        torch.testing.assert_close(y, direction, rtol=1e-5, atol=1e-7)
    elif size < 1:
        assert bool((y.norm(dim=-1) < 1e-6).all())
    else:
        torch.testing.assert_close(y.norm(dim=-1), torch.ones(2))
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), x)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("size", [1e-7, 1e-6, 0.1, 1.0, 50.0])
def test_gradcheck_of_both_orders(size: float) -> None:
    """As a function of x / size, so that finite differences keep their digits at every size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: safe_normalize(size * t), (x,))
    assert torch.autograd.gradgradcheck(lambda t: safe_normalize(size * t), (x,))
