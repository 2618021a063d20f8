"""Generalized momentum, and generalized gradient descent over a window of past weights (NL section 4.5, Eq. 59)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.optim import DeltaMomentum, GeneralizedGradientDescent, GeneralizedMomentum
from nestling.optim.objectives import DOT, HUBER, L2
from tests.optim.test_identities import run


def test_the_dot_product_is_momentum() -> None:
    """To rounding, under a schedule; the inner rate multiplies the gradients."""
    found = run(lambda p: GeneralizedMomentum(p, 0.1, 0.9, window=1, objective=DOT, inner_lr=0.5))
    wanted = run(lambda p: torch.optim.SGD(p, 0.05, 0.9))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner_lr", [0.1, 1.0, 30.0])
def test_l2_is_delta_momentum(inner_lr: float) -> None:
    """With delta = momentum w at the rate lr w, w = inner_lr / (1 + inner_lr)."""
    share = inner_lr / (1 + inner_lr)
    found = run(lambda p: GeneralizedMomentum(p, 0.1, 0.9, window=1, inner_lr=inner_lr))
    wanted = run(lambda p: DeltaMomentum(p, 0.1 * share, 0.9, 0.9 * share))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def quartic(m: Tensor, past: Tensor) -> Tensor:
    """A retention that is not quadratic."""
    return 0.5 * (m - past).square().sum() + 0.01 * (m - past).pow(4).sum()


@pytest.mark.parametrize(("objective", "retention"), [(HUBER, None), (L2, quartic)])
def test_the_momentum_is_the_minimiser(objective: Any, retention: Any) -> None:
    """Over a window of three, by a numerical solver that sees the whole objective."""
    generator = torch.Generator().manual_seed(0)
    gradients = [3 * torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(6)]
    held = retention or (lambda m, past: 0.5 * (m - past).square().sum())
    w = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    settings = {} if retention is None else {"retention": retention}
    optimizer = GeneralizedMomentum([w], 1.0, 0.9, window=3, objective=objective, inner_steps=500, **settings)
    past = [torch.zeros(4, 6, dtype=torch.float64)]
    for g in gradients:
        w.data.zero_()
        w.grad = g
        optimizer.step()
        m = past[-1].clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [m], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss(m: Tensor = m, g: Tensor = g, solver: Any = solver) -> Tensor:
            solver.zero_grad()
            length = g.norm(dim=1, keepdim=True)
            answers = (m * g / length).sum(1, keepdim=True)
            value = objective.loss(answers, length).sum()
            value = value + sum(held(m, 0.9 * p) for p in past[-3:]) / len(past[-3:])
            value.backward()
            return value

        solver.step(loss)
        torch.testing.assert_close(-w.detach(), m.detach(), rtol=1e-5, atol=1e-5)
        past.append(-w.detach().clone())


@pytest.mark.parametrize("window", [1, 3])
def test_the_dot_product_descends_from_the_mean_of_the_window(window: int) -> None:
    """For weights of linear layers and for all others alike; a first step is gradient descent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = GeneralizedGradientDescent(
        model.parameters(), 0.1, model=model, objective=DOT, window=window, inner_steps=1
    )
    past: list[list[Tensor]] = []
    for step in range(7):
        optimizer.zero_grad()
        x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        past.append([p.detach().clone() for p in model.parameters()])
        means = [torch.stack(t).mean(0) for t in zip(*past[-window:], strict=True)]
        wanted = [m - 0.1 * p.grad for m, p in zip(means, model.parameters(), strict=True)]
        optimizer.step()
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)


def test_a_window_holds_longer() -> None:
    """What was written once is there for longer, at the same retention; and nothing is kept beyond the window."""
    left = {}
    for window in (1, 4):
        w = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
        optimizer = GeneralizedMomentum([w], 0.0, 0.9, window=window)
        w.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        optimizer.step()
        w.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        for _ in range(40):
            optimizer.step()
        left[window] = float(optimizer.state[w]["momentum"][0, 0])
        assert len([name for name in optimizer.state[w] if name.startswith("momentum")]) == window
    assert left[4] > left[1] > 0


def test_settings_are_checked() -> None:
    w = [nn.Parameter(torch.zeros(2, 2))]
    for wrong in ({"window": 0}, {"momentum": 1.0}, {"inner_lr": -1.0}, {"inner_steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            GeneralizedMomentum(w, **wrong)
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="window must be"):
        GeneralizedGradientDescent(layer.parameters(), model=layer, window=0)
