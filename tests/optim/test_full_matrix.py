"""Full-matrix AdaGrad as the memory of NL Eq. 106-111, and against the diagonal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adagrad

from nestling.optim import PreconditionedMomentum
from nestling.optim.full_matrix import AdaGradMatrix, inverse_root
from nestling.optim.preconditioners import AdaGradDiagonal, AdamDiagonal


def draws(steps: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def last_step(gradients: list[Tensor], momentum: float, output: Any) -> Tensor:
    """-d of the last of these gradients."""
    w = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = PreconditionedMomentum([w], 1.0, momentum, output=output)
    for g in gradients:
        w.data.zero_()
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


def test_it_is_the_memory_that_answers_every_gradient_with_one() -> None:
    """With momentum 1, H^(-1/2) sum g minimises sum (<P^-1 g_i, m> - 1)^2, P = (sum g g^T)^(1/2): least squares."""
    gradients = draws(30, 6)
    values, vectors = torch.linalg.eigh(sum(torch.outer(g, g) for g in gradients))
    p = vectors @ torch.diag(values.sqrt()) @ vectors.T
    keys = torch.stack(gradients) @ torch.linalg.inv(p)
    m = torch.linalg.lstsq(keys, torch.ones(30, 1, dtype=torch.float64)).solution[:, 0]
    found = last_step(gradients, 1.0, AdaGradMatrix(eps=0.0, side="rows"))
    torch.testing.assert_close(-found, m, rtol=1e-9, atol=1e-9)


def test_the_printed_objective_has_another_shape() -> None:
    """Eq. 106 as printed, sum |m g_i - p|^2 + lambda |m|^2, is minimal at p (sum g)^T (H + lambda)^-1, of rank one."""
    gradients = torch.stack(draws(30, 6))
    p, penalty = draws(1, 4)[0], 0.3
    h = gradients.T @ gradients + penalty * torch.eye(6, dtype=torch.float64)
    m = (torch.outer(p, gradients.sum(0)) @ torch.linalg.inv(h)).requires_grad_()
    loss = (gradients @ m.T - p).square().sum() + penalty * m.square().sum()
    (slope,) = torch.autograd.grad(loss, m)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (2, 4, 9)])
def test_on_the_shorter_side(shape: tuple[int, ...]) -> None:
    """(sum G G^T)^(-1/2) G, or G (sum G^T G)^(-1/2), by a singular value decomposition; stacks in a batch."""
    gradients = draws(5, *shape)
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = PreconditionedMomentum([{"params": [w], "kind": "matrices"}], 1.0, 0.0, output=AdaGradMatrix())
    for g in gradients:
        w.data.zero_()
        w.grad = g
        optimizer.step()
    tall = shape[-2] > shape[-1]
    turned = [g.mT if tall else g for g in gradients]
    u, h, _ = torch.linalg.svd(sum(g @ g.mT for g in turned))
    wanted = u @ torch.diag_embed(h**-0.5) @ u.mT @ turned[-1]
    torch.testing.assert_close(-w.detach(), wanted.mT if tall else wanted, rtol=1e-8, atol=1e-8)
    assert optimizer.state[w]["outer"].shape == (*shape[:-2], min(shape[-2:]), min(shape[-2:]))


def test_where_outer_products_are_diagonal_it_is_torchs_adagrad() -> None:
    """Gradients with one entry a row; and vectors whose gradients lie along the axes."""
    for shape, side in (((5, 5), "shorter"), ((5,), "rows")):
        found = []
        for kind in (PreconditionedMomentum, Adagrad):
            w = nn.Parameter(torch.ones(shape, dtype=torch.float64))
            full: dict[str, Any] = {"momentum": 0.0, "output": AdaGradMatrix(side=side)}  # type: ignore[arg-type]
            optimizer = kind([w], lr=0.1, **(full if kind is PreconditionedMomentum else {}))
            for step, g in enumerate(draws(12, *shape)):
                w.grad = g.diag().diag() if len(shape) > 1 else g * (torch.arange(5) == step % 5)
                optimizer.step()
            found.append(w.detach())
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_directions_without_gradients_do_not_move() -> None:
    """Gradients of rank one in float32, where their outer products have eigenvalues of rounding: no noise is raised."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 1, generator=generator), torch.randn(1, 60, generator=generator)
    step = last_step([left @ right * 1e-3] * 4, 0.0, AdaGradMatrix())
    torch.testing.assert_close(step, -0.5 * left @ right / (left.norm() * right.norm()), rtol=1e-3, atol=1e-5)


def test_the_inverse_root_of_nothing_is_nothing() -> None:
    assert not inverse_root(torch.zeros(3, 4, 4), 1e-10).any()


def test_the_gradients_scale_does_not_matter() -> None:
    gradients = draws(5, 4, 6)
    steps = [last_step([scale * g for g in gradients], 0.0, AdaGradMatrix()) for scale in (1.0, 1e4)]
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-9)


def test_refusals() -> None:
    w = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(ValueError, match='side must be "shorter" or "rows"'):
        AdaGradMatrix(side="longer")  # type: ignore[arg-type]
    for other in (AdamDiagonal(), AdaGradDiagonal()):
        with pytest.raises(ValueError, match="give AdaGradMatrix as preconditioner or as output"):
            PreconditionedMomentum(w, preconditioner=other, output=AdaGradMatrix())
