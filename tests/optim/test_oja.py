"""Oja's rule as an optimizer: the minimiser of NL Eq. 67's objective, and Eq. 66 for one token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestling.optim import OjaGradientDescent
from nestling.optim.oja import oja_direction


def step(layer: nn.Linear, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> Tensor:
    """The weight after a step on the mean over tokens of scale/2 |Wx - y|^2."""
    optimizer.zero_grad()
    (0.5 * scale * (layer(x) - y).square().sum(-1).mean()).backward()
    optimizer.step()
    return layer.weight.detach().clone()


def problem(tokens: int) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    return layer, torch.randn(tokens, 6, dtype=torch.float64), torch.randn(tokens, 4, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
def test_it_is_the_minimiser(tokens: int, lr: float) -> None:
    """Of mean -<Wx, u> + 1/2 |W^T u|^2 + |W - W_t|^2 / 2 lr, by a numerical solver that knows no closed form."""
    layer, x, y = problem(tokens)
    start = layer.weight.detach().clone()
    u = -(x @ start.T - y)
    z = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = (0.5 * (u @ z).square().sum() - ((x @ z.T) * u).sum()) / tokens + (z - start).square().sum() / (2 * lr)
        loss.backward()
        return loss

    solver.step(objective)
    found = step(layer, x, y, OjaGradientDescent(layer.parameters(), lr, model=layer))
    torch.testing.assert_close(found, z.detach(), rtol=1e-5, atol=1e-5)


def test_one_token_is_equation_66_at_small_rates() -> None:
    """M + eta v (k - M^T v)^T with the input for k and the surprise for v."""
    layer, x, y = problem(1)
    m, k = layer.weight.detach().clone(), x[0]
    v = -(m @ k - y[0])
    lr = 1e-6
    found = step(layer, x, y, OjaGradientDescent(layer.parameters(), lr, model=layer))
    torch.testing.assert_close((found - m) / lr, torch.outer(v, k - m.T @ v), rtol=1e-4, atol=1e-4)


def test_without_erasing_it_is_gradient_descent() -> None:
    layer, x, y = problem(7)
    start = layer.weight.detach().clone()
    found = step(layer, x, y, OjaGradientDescent(layer.parameters(), 0.3, model=layer, erase=0.0))
    layer.weight.data.copy_(start)
    torch.testing.assert_close(found, step(layer, x, y, torch.optim.SGD(layer.parameters(), 0.3)))


def test_a_loss_that_is_a_sum() -> None:
    """The sum's step is the mean's at a rate times the number of tokens."""
    found = []
    for reduction, lr in (("mean", 0.7), ("sum", 0.1)):
        layer, x, y = problem(7)
        optimizer = OjaGradientDescent(layer.parameters(), lr, model=layer, reduction=reduction)  # type: ignore[arg-type]
        found.append(step(layer, x, y, optimizer, 1.0 if reduction == "mean" else 7.0))
    torch.testing.assert_close(*found)


def test_huge_rates_do_not_blow_up() -> None:
    """With no gradient the weight only shrinks, at any rate; at a rate of 0 the direction has its limit."""
    torch.manual_seed(0)
    w, u = torch.randn(4, 6, dtype=torch.float64), 100 * torch.randn(50, 4, dtype=torch.float64)
    gram = u.T @ u / 50
    for lr in (1e-6, 1.0, 1e6):
        assert (w - lr * oja_direction(w, torch.zeros_like(w), gram, lr)).norm() <= w.norm()
    torch.testing.assert_close(oja_direction(w, w, gram, 0.0), w + gram @ w)


def test_settings_are_checked() -> None:
    layer = nn.Linear(2, 2)
    for wrong in ({"erase": -1.0}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            OjaGradientDescent(layer.parameters(), model=layer, **wrong)
    assert not layer._forward_hooks
