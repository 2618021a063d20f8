"""Delta momentum's contraction, and delta gradient descent as the closed minimiser of NL Eq. 56."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.optim import DeltaGradientDescent, DeltaMomentum, GeneralizedGradientDescent, OjaGradientDescent
from nestling.optim.delta_gradient_descent import delta_direction
from nestling.optim.generalized_gradient_descent import improved_output
from nestling.optim.objectives import DOT, L2


def minimiser(w: Tensor, x: Tensor, u: Tensor, lr: float) -> Tensor:
    """Eq. 56 by a numerical solver that knows nothing of its closed form."""
    z = w.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = 0.5 * (x @ z.T - u).square().sum() / len(x) + (z - w).square().sum() / (2 * lr)
        loss.backward()
        return loss

    solver.step(objective)
    return z.detach()


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
def test_delta_gradient_descent_is_the_minimiser(tokens: int, lr: float) -> None:
    """One step of the optimizer on a real layer, few tokens or many, small rates or huge."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    x, y = torch.randn(tokens, 6, dtype=torch.float64), torch.randn(tokens, 4, dtype=torch.float64)
    start = layer.weight.detach().clone()
    surprise = -(x @ start.T - y)  # of the loss 1/2 |Wx - y|^2, averaged over tokens
    optimizer = DeltaGradientDescent(layer.parameters(), lr, model=layer)
    (0.5 * (layer(x) - y).square().sum(-1).mean()).backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), minimiser(start, x, surprise, lr), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "step"])
def test_one_token_is_equation_57(solver: Any) -> None:
    """W (I - lr' x x^T) - lr' G with lr' = lr / (1 + lr |x|^2), for inputs of any length."""
    torch.manual_seed(0)
    w, x, dy = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), (6,), (4,)))
    for lr in (0.1, 3.0):
        rate = lr / (1 + lr * x @ x)
        gradient = torch.outer(dy, x)
        wanted = w @ (torch.eye(6, dtype=torch.float64) - rate * torch.outer(x, x)) - rate * gradient
        found = w - lr * delta_direction(w, gradient, torch.outer(x, x), lr, solver)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "step"])
def test_huge_rates_do_not_blow_up(solver: Any) -> None:
    """With no gradient the weights only shrink, at any rate; at a rate of 0 the direction has its limit."""
    torch.manual_seed(0)
    w, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64) * 100
    gram = x.T @ x / 50
    for lr in (1e-6, 1.0, 1e6):
        assert (w - lr * delta_direction(w, torch.zeros_like(w), gram, lr, solver)).norm() <= w.norm()
    torch.testing.assert_close(delta_direction(w, w, gram, 0.0, solver), w + w @ gram)


def train_once(optimizer_of: Any, erase_padding: bool = False) -> Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    x, y = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    optimizer = optimizer_of(layer)
    (layer(x) - y).square()[:, :3].sum(-1).mean().backward() if erase_padding else (
        (layer(x[:, :3]) - y[:, :3]).square().sum(-1).mean().backward()
    )
    optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("kind", [DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent])
def test_tokens_outside_the_loss_do_not_count(kind: Any) -> None:
    """Padding is the same as not being there."""
    make = lambda layer: kind(layer.parameters(), 0.3, model=layer)  # noqa: E731
    torch.testing.assert_close(train_once(make, True), train_once(make, False))


def test_without_erasing_it_is_gradient_descent() -> None:
    found = train_once(lambda layer: DeltaGradientDescent(layer.parameters(), 0.3, model=layer, erase=0.0))
    torch.testing.assert_close(found, train_once(lambda layer: torch.optim.SGD(layer.parameters(), 0.3)))


def test_generalized_has_its_special_cases() -> None:
    """The dot product is gradient descent; L2 with many inner steps is delta gradient descent."""
    sgd = train_once(lambda layer: torch.optim.SGD(layer.parameters(), 0.3))
    dot = {"objective": DOT, "inner_steps": 1}
    l2 = {"objective": L2, "inner_steps": 300}
    found = [
        train_once(lambda layer, s=s: GeneralizedGradientDescent(layer.parameters(), 0.3, model=layer, **s))
        for s in (dot, l2)
    ]
    torch.testing.assert_close(found[0], sgd)
    exact = train_once(lambda layer: DeltaGradientDescent(layer.parameters(), 0.3, model=layer))
    torch.testing.assert_close(found[1], exact)


def test_generalized_with_the_improved_output_has_the_loss_fixed_point() -> None:
    """With u = y - dL/dy nothing decays: where the gradient is zero, nothing moves."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    truth = layer.weight.detach().clone()
    x = torch.randn(9, 6, dtype=torch.float64)
    for target, moves in ((improved_output, False), (None, True)):
        layer.weight.data.copy_(truth)
        settings = {} if target is None else {"target": target}
        optimizer = GeneralizedGradientDescent(layer.parameters(), 0.5, model=layer, **settings)
        optimizer.zero_grad()
        (layer(x) - x @ truth.T + 1e-12).square().mean().backward()
        optimizer.step()
        assert torch.allclose(layer.weight, truth) != moves
        optimizer.close()


@pytest.mark.parametrize("kind", [DeltaGradientDescent, GeneralizedGradientDescent, OjaGradientDescent])
def test_stale_inputs_are_forgotten(kind: Any) -> None:
    """Evaluation records nothing; a discarded gradient (the model's zero_grad, no step) takes its inputs with it."""

    def train(disturb: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x = torch.randn(5, 3)
        optimizer = kind(model.parameters(), 0.5, model=model)
        if disturb:
            model(100 * x).square().mean().backward()
            model.zero_grad()
            with torch.no_grad():
                model(7 * x)
            model(9 * x)  # a forward pass without a backward pass
        model(x).square().mean().backward()
        optimizer.step()
        assert not optimizer.layers.seen
        return model[0].weight.detach()

    torch.testing.assert_close(train(True), train(False))


def test_a_layer_that_is_used_twice_counts_twice() -> None:
    """Both calls' inputs are in the Gram matrix, as in one call with both."""
    results = []
    for twice in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(3, 3, dtype=torch.float64)
        x = torch.randn(8, 3, dtype=torch.float64)
        optimizer = DeltaGradientDescent(layer.parameters(), 0.5, model=layer)
        out = torch.cat([layer(x[:4]), layer(x[4:])]) if twice else layer(x)
        out.square().mean().backward()
        optimizer.step()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("keys", ["row", "matrix"])
@pytest.mark.parametrize("scale", ["nlms", "bounded"])
def test_delta_momentum_contracts(keys: Any, scale: Any) -> None:
    """Under huge gradients m stays within |g| / (1 - momentum); the literal factor does not."""
    torch.manual_seed(0)
    gradients = [torch.randn(4, 6, dtype=torch.float64) * 100 for _ in range(300)]
    lengths = {}
    for name in (scale, "literal"):
        w = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        optimizer = DeltaMomentum([w], 0.0, 0.9, keys=keys, scale=name)
        for g in gradients:
            w.grad = g
            optimizer.step()
            if not optimizer.state[w]["momentum"].isfinite().all():
                break
        lengths[name] = optimizer.state[w]["momentum"].norm().item()
    assert lengths[scale] <= max(g.norm().item() for g in gradients) / (1 - 0.9)
    assert not lengths["literal"] < 1e30


def test_delta_momentum_overwrites() -> None:
    """With momentum 1 and delta 1, m holds the last value under every one of a set of orthogonal keys."""
    keys = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    w = nn.Parameter(torch.zeros(1, 5, dtype=torch.float64))
    optimizer = DeltaMomentum([w], 0.0, 1.0)
    for scale in (3.0, -2.0):
        for key in keys:
            w.grad = (scale * key)[None]
            optimizer.step()
    torch.testing.assert_close(keys @ optimizer.state[w]["momentum"][0], torch.full((5,), -2.0, dtype=torch.float64))


def test_settings_are_checked() -> None:
    layer = nn.Linear(2, 2)
    for wrong in ({"delta": 2.0}, {"momentum": 1.1}, {"keys": "rows"}, {"scale": "none"}):
        with pytest.raises(ValueError):
            DeltaMomentum(layer.parameters(), **wrong)
    for wrong in ({"erase": -1.0}, {"solver": "qr"}, {"reduction": "none"}):
        with pytest.raises(ValueError):
            DeltaGradientDescent(layer.parameters(), model=layer, **wrong)
    for wrong in ({"inner_steps": 0}, {"reduction": "none"}):
        with pytest.raises(ValueError):
            GeneralizedGradientDescent(layer.parameters(), model=layer, **wrong)
