"""M3 where a public implementation fails: the direction's singular values, linear regression, cycles."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nestling.optim import M3


@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (8, 30), (6, 4, 3, 3), (3, 8, 5)])
def test_singular_values_of_a_step(shape: tuple[int, ...]) -> None:
    """Tall, wide, square, kernel and stack: without the second moment one step is orthogonal up to Newton-Schulz."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    w.grad = torch.randn(shape, dtype=torch.float64)
    kind = "matrices" if len(shape) < 4 else "kernels"
    M3([{"params": [w], "kind": kind}], 1.0, alpha=0.0, second_moment=False, adjust_lr=None).step()
    step = w.detach().flatten(1) if kind == "kernels" else w.detach()
    values = torch.linalg.svdvals(step)
    gradient = torch.linalg.svdvals(w.grad.flatten(1) if kind == "kernels" else w.grad)
    large = gradient > gradient.norm(dim=-1, keepdim=True) / 300
    assert (values[large] > 0.68).all() and (values < 1.21).all()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_linear_regression_converges(scale: float) -> None:
    """Whatever the data's units, to the least-squares solution as the rate falls."""
    torch.manual_seed(0)
    x, truth = torch.randn(256, 10, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    w = nn.Parameter(torch.zeros(4, 10, dtype=torch.float64))
    optimizer = M3([w], 0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    errors = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = scale * (x @ (w - truth).T).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        errors.append((w - truth).norm().item())
    assert max(errors) < 1.5 * truth.norm().item()
    assert errors[-1] < 1e-2 * truth.norm().item()


def test_the_slow_factor_changes_at_the_end_of_a_cycle() -> None:
    """Not before, and it enters the step after."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = M3([w], 0.1, alpha=1.0, frequency=4)
    factors = []
    for _ in range(9):
        w.grad = torch.randn_like(w)
        optimizer.step()
        factors.append(optimizer.state[w]["slow_factor"].clone())
    assert all(f.eq(0).all() for f in factors[:3])
    assert not torch.equal(factors[3], factors[2])
    assert all(torch.equal(f, factors[3]) for f in factors[4:7])
    assert not torch.equal(factors[7], factors[6])


def test_settings_are_checked() -> None:
    w = nn.Parameter(torch.zeros(4, 6))
    for wrong in (
        {"betas": (0.9, 1.0, 0.9)},
        {"frequency": 0},
        {"alpha": -1.0},
        {"form": "sum"},
        {"adjust_lr": "rms"},
        {"eps": 0.0},
    ):
        with pytest.raises(ValueError):
            M3([w], **wrong)
    with pytest.raises(ValueError, match="no matrix"):
        optimizer = M3([{"params": [nn.Parameter(torch.zeros(3))], "kind": "matrices"}])
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(3)
        optimizer.step()
