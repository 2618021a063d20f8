"""Preconditioners and feature maps that are learned on objectives of their own (NL Eq. 39-41, 43, 51)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.optim import FeatureMomentum, PreconditionedMomentum
from nestling.optim.learned_features import LearnedFeatures, chebyshev, learned_coefficients
from nestling.optim.learned_preconditioner import LearnedMap, Whitening, orthogonality, whitening_step

D, N = 5, 8


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def feed(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """The steps that these gradients take, at a rate of 1."""
    (w,) = optimizer.param_groups[0]["params"]
    steps = []
    for g in gradients:
        w.data.zero_()
        w.grad = g.clone()
        optimizer.step()
        steps.append(-w.detach().clone())
    return steps


def mapped(kind: Any, gradients: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    w = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = PreconditionedMomentum([w], 1.0, 0.0, preconditioner=kind)
    return feed(optimizer, gradients), optimizer.state[w]


def likelihood(p: Tensor, g: Tensor) -> Tensor:
    return 0.5 * (p @ g).square().sum() / g.shape[1] - torch.logdet(p)


def test_whitening_goes_down_its_objective() -> None:
    """To first order in the step, P - s P L'(P) P."""
    generator = torch.Generator().manual_seed(0)
    half, u = draw(generator, D, D), draw(generator, D, N)
    p = (half @ half.T / D + torch.eye(D, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(likelihood(p, 3.0 * u), p)
    p = p.detach()
    rate = 1e-7
    moved = whitening_step(p, u, torch.full((1, 1), 3.0, dtype=torch.float64), rate, 0.0)
    torch.testing.assert_close((moved - p) / rate, -p @ (slope + slope.T) / 2 @ p, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(D, N), (N, D), (2, D, N)])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_whitening_of_one_gradient_is_its_orthogonal_factor(shape: tuple[int, ...], scale: float) -> None:
    """The same gradient again and again: P G ends at sqrt(longer side) U V^T, whatever the gradient's scale."""
    g = scale * draw(torch.Generator().manual_seed(0), *shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    w = nn.Parameter(torch.zeros_like(g))
    output = Whitening(0.3, damping=0.0)
    optimizer = PreconditionedMomentum([{"params": [w], "kind": "matrices"}], 1.0, 0.0, preconditioner=output)
    torch.testing.assert_close(feed(optimizer, [g] * 300)[-1], math.sqrt(N) * u @ v, rtol=1e-6, atol=1e-6)


def test_whitening_learns_the_inverse_root_of_the_second_moment() -> None:
    """Of independent gradients whose rows are correlated and of sizes a hundred times apart."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(draw(generator, D, D)).Q @ torch.logspace(-1, 1, D, dtype=torch.float64).diag()
    _, state = mapped(Whitening(0.02, damping=0.0), [mix @ draw(generator, D, N) for _ in range(700)])
    p = state["whitening"]
    white = p @ mix @ mix.T @ p
    assert (white - torch.eye(D, dtype=torch.float64)).norm() < 0.3 * math.sqrt(D)
    assert (mix @ mix.T - torch.eye(D, dtype=torch.float64)).norm() > 30 * math.sqrt(D)


def hostile() -> list[Tensor]:
    """Spikes, nothing, hardly anything, one direction only, for long."""
    generator = torch.Generator().manual_seed(0)
    line = draw(generator, D, 1) @ draw(generator, 1, N)
    kinds = [0.0, 1e-30, 1e-12, 1.0, 1e6, 1e15, 1e-3]
    gradients = [scale * (line if i % 3 else draw(generator, D, N)) for i in range(12) for scale in kinds]
    return [g.float() for g in gradients + 60 * [1e-3 * line] + 100 * [0 * line] + 3 * [draw(generator, D, N)]]


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_whitening_is_bounded(rate: float) -> None:
    """Entries of P g have a root mean square of at most 1 / sqrt(rate), whatever came before."""
    steps, state = mapped(Whitening(rate), hostile())
    assert state["whitening"].isfinite().all()
    assert max(float(s.square().mean().sqrt()) for s in steps) <= 1.0001 / math.sqrt(rate)


def test_directions_without_gradients_are_raised_by_the_damping_alone() -> None:
    """To 1 / sqrt(damping) over a gradient's root mean square, however long nothing comes from them."""
    line = torch.zeros(D, N, dtype=torch.float64)
    line[0] = 1.0
    _, state = mapped(Whitening(0.5, damping=0.01), [line] * 60)
    p = state["whitening"].diagonal()
    torch.testing.assert_close(p[1:] / p[0], torch.full((D - 1,), (D / 0.01 + 1) ** 0.5, dtype=torch.float64))


@pytest.mark.parametrize("kind", [LearnedMap(rate=1.0), LearnedMap(rate=0.1)])
def test_a_learned_map_is_bounded(kind: LearnedMap) -> None:
    """Its columns are of one size, so no gradient drives it away."""
    _, state = mapped(kind, hostile())
    assert state["map"].isfinite().all() and state["map"].norm() < 1e3


def test_a_learned_map_makes_gradients_orthogonal() -> None:
    """Eq. 43 falls to a tenth of what it is for the gradients themselves."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(draw(generator, D, D)).Q @ torch.logspace(-0.5, 0.5, D, dtype=torch.float64).diag()
    whole = mix @ draw(generator, D, 64)
    steps, _ = mapped(LearnedMap(rate=0.5), [whole] * 300)
    units = [g / whole.square().mean().sqrt() for g in (whole, steps[-1])]
    before, after = (float(orthogonality(u, u)) for u in units)
    assert after < 0.1 * before


TARGET = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def regression(y: Tensor, u: Tensor) -> Tensor:
    """The value of every gradient is a given function of it."""
    return 0.5 * (y - TARGET @ u).square().sum() / u.shape[-1]


def test_any_objective_can_be_given() -> None:
    """Eq. 40 with an objective of one's own: the map that it asks for is found."""
    generator = torch.Generator().manual_seed(0)
    _, state = mapped(LearnedMap(regression, 0.5), [draw(generator, D, N) for _ in range(300)])
    torch.testing.assert_close(state["map"], TARGET, rtol=1e-6, atol=1e-6)


def test_chebyshev() -> None:
    s = torch.linspace(0.01, 1, 4, dtype=torch.float64)
    angles = torch.arccos(s)
    wanted = torch.stack([torch.diag(torch.cos(k * angles)) for k in (1, 3, 5, 7)])
    torch.testing.assert_close(chebyshev(s.diag(), 4), wanted, rtol=1e-12, atol=1e-12)


def features_objective(y: Tensor) -> float:
    """Eq. 43 for features of a gradient of unit size."""
    return float((y @ y.T - torch.eye(len(y), dtype=y.dtype)).square().sum())


@pytest.mark.parametrize("order", [2, 3, 5])
def test_features_become_orthogonal(order: int) -> None:
    """Eq. 43 falls on gradients that were not seen, and with more polynomials further."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.zeros(D, N, dtype=torch.float64))
    optimizer = FeatureMomentum([w], 1.0, 0.0, features=LearnedFeatures(order))
    gradients = [draw(generator, D, N) for _ in range(600)]
    found = feed(optimizer, gradients)[-100:]
    sizes = [(g @ g.T).norm().sqrt() for g in gradients[-100:]]
    before = sum(features_objective(g / r) for g, r in zip(gradients[-100:], sizes, strict=True))
    after = sum(features_objective(y / r) for y, r in zip(found, sizes, strict=True))
    assert after < (0.75 if order == 2 else 0.6) * before
    assert optimizer.state[w]["coefficients"].shape == (order,)


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize("start", [1.0, -3.0, 1e-3, 50.0])
def test_coefficients_stay_bounded(rate: float, start: float) -> None:
    """From anywhere, on any spectrum; the objective never rises from one step on the same gradient to the next."""
    generator = torch.Generator().manual_seed(0)
    for spectrum in ([1.0] * D, [1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.1, 1e-3, 1e-6]):
        s = torch.tensor(spectrum, dtype=torch.float64)
        basis = chebyshev((s / s.pow(4).sum() ** 0.25).diag(), 3)
        c = start * draw(generator, 3)
        losses = []
        for _ in range(200):
            losses.append(features_objective(torch.einsum("k,kij->ij", c, basis)))
            c = learned_coefficients(c, basis, rate)
        assert all(b <= a + 1e-9 for a, b in pairwise(losses))


def test_a_vector_is_its_own_feature_and_zero_teaches_nothing() -> None:
    w = nn.Parameter(torch.zeros(D))
    optimizer = FeatureMomentum([w], 1.0, 0.0, features=LearnedFeatures())
    gradients = [torch.zeros(D), torch.arange(5.0), torch.full((D,), 1e-30)]
    steps = feed(optimizer, gradients)
    torch.testing.assert_close(steps, gradients)
    torch.testing.assert_close(optimizer.state[w]["coefficients"], torch.tensor([1.0, 0.0, 0.0]))


def test_refusals() -> None:
    w = [nn.Parameter(torch.zeros(2, 2))]
    for wrong in ({"rate": 0.0}, {"rate": 1.1}, {"damping": -1.0}):
        with pytest.raises(ValueError, match="must"):
            Whitening(**wrong)
    with pytest.raises(ValueError, match="rate must be"):
        LearnedMap(rate=2.0)
    for wrong_features in ({"order": 0}, {"rate": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            LearnedFeatures(**wrong_features)
    with pytest.raises(ValueError, match="give Whitening as preconditioner or as output"):
        PreconditionedMomentum(w, preconditioner=Whitening(), output=Whitening(0.5))
