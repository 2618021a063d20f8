"""Well-known optimizers as special cases (NL section 4.2, appendix B), against `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer, lr_scheduler

from nestling.optim import M3, DeltaMomentum, FeatureMomentum, PreconditionedMomentum
from nestling.optim.full_matrix import AdaGradMatrix
from nestling.optim.preconditioners import AdaGradDiagonal, AdamDiagonal, NewtonSchulz

Make = Callable[[list[nn.Parameter]], Optimizer]
SHAPES = ((5, 7), (8, 3), (4,))


def run(make: Make, shapes: tuple[tuple[int, ...], ...] = SHAPES, steps: int = 50) -> Tensor:
    """All parameters after noisy descent on 1/2 |w|^2 under a falling rate."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = make(parameters)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
    return torch.cat([p.detach().flatten() for p in parameters])


ADAM: dict[str, Any] = {"output": AdamDiagonal(0.98, 1e-6), "average": True, "bias_correction": True}
IDENTITIES: dict[str, tuple[Make, Make]] = {
    "SGD": (lambda p: PreconditionedMomentum(p, 0.1, 0.0), lambda p: SGD(p, 0.1)),
    "momentum": (lambda p: PreconditionedMomentum(p, 0.1, 0.9), lambda p: SGD(p, 0.1, 0.9)),
    "Nesterov": (
        lambda p: PreconditionedMomentum(p, 0.1, 0.9, nesterov=True),
        lambda p: SGD(p, 0.1, 0.9, nesterov=True),
    ),
    "delta momentum without the delta": (lambda p: DeltaMomentum(p, 0.1, 0.9, 0.0), lambda p: SGD(p, 0.1, 0.9)),
    "its matrix form": (lambda p: DeltaMomentum(p, 0.1, 0.9, 0.0, keys="matrix"), lambda p: SGD(p, 0.1, 0.9)),
    "features of the first order": (lambda p: FeatureMomentum(p, 0.1, features=None), lambda p: SGD(p, 0.1, 0.9)),
    "Adam": (
        lambda p: PreconditionedMomentum(p, 0.1, 0.8, **ADAM),
        lambda p: Adam(p, 0.1, betas=(0.8, 0.98), eps=1e-6),
    ),
    "AdamW": (
        lambda p: PreconditionedMomentum(p, 0.1, 0.8, weight_decay=0.3, **ADAM),
        lambda p: AdamW(p, 0.1, betas=(0.8, 0.98), eps=1e-6, weight_decay=0.3),
    ),
    "AdaGrad": (
        lambda p: PreconditionedMomentum(p, 0.1, 0.0, output=AdaGradDiagonal()),
        lambda p: Adagrad(p, 0.1),
    ),
    "AdaGrad, beyond the full matrix's limit": (
        lambda p: PreconditionedMomentum(p, 0.1, 0.0, output=AdaGradMatrix(limit=1)),
        lambda p: Adagrad(p, 0.1),
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_special_case(name: str) -> None:
    """To rounding, under a schedule."""
    ours, theirs = IDENTITIES[name]
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-12, atol=1e-12)


def test_the_appendix_is_adam_but_for_its_terms() -> None:
    """Eq. 102 and 105 accumulate without decay and divide by sqrt(beta_2) once more.

    With M the sum of beta_1 g and H the sum of beta_2 g^2, W moves by lr M / (sqrt(beta_2) sqrt(H)): our sum form at
    the rate lr beta_1 / sqrt(beta_2). What Adam has besides: exponential means in place of sums, their correction for
    the zero start, and eps.
    """
    beta1, beta2, lr = 0.9, 0.999, 0.05
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    w, m, h = torch.zeros(3, 6, dtype=torch.float64)[0], 0.0, 0.0
    parameter = nn.Parameter(w.clone())
    output = AdaGradDiagonal(beta=beta2, eps=0.0)
    ours = PreconditionedMomentum([parameter], lr * beta1 / beta2**0.5, 1.0, output=output)
    for g in gradients:
        m, h = m + beta1 * g, h + beta2 * g * g
        w = w - lr / beta2**0.5 * m / h**0.5
        parameter.grad = g.clone()
        ours.step()
    torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=1e-12)


def test_adams_closed_form_minimises_the_appendix_objective() -> None:
    """Eq. 101: m = (H + lambda)^-1 (sum g) P is where the gradient of sum |m g_i - P|^2 + lambda |m|^2 vanishes."""
    g = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target, penalty = g.square().sum(0).sqrt(), 0.3
    m = (g.sum(0) * target / (g.square().sum(0) + penalty)).requires_grad_()
    loss = (m * g - target).square().sum() + penalty * m.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, m)[0], torch.zeros(5, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_newton_schulz_on_a_linear_memory_is_muon(adjust: Any, nesterov: bool) -> None:
    """torch.optim.Muon, its bfloat16 iteration, coefficients, rate adjustment and weight decay included."""
    shapes = ((5, 7), (8, 3), (6, 6))
    output = NewtonSchulz(4, (3.0, -3.2, 1.2), adjust=adjust, dtype=torch.bfloat16)
    coefficients: dict[str, Any] = {"ns_coefficients": (3.0, -3.2, 1.2), "ns_steps": 4}
    ours = run(
        lambda p: PreconditionedMomentum(
            p, 0.02, 0.9, output=output, average=True, nesterov=nesterov, weight_decay=0.1, foreach=False
        ),
        shapes,
    )
    theirs = run(
        lambda p: Muon(p, 0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn=adjust, **coefficients),
        shapes,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    still = run(lambda p: SGD(p, 0.0), shapes)
    assert (ours - theirs).norm() < 1e-4 * (theirs - still).norm()


def test_m3_without_slow_momentum_and_second_moment_is_muon() -> None:
    """alpha = 0: Muon's direction, without Nesterov's term."""
    shapes = ((5, 7), (8, 3), (6, 6))
    settings: dict[str, Any] = {"alpha": 0.0, "second_moment": False, "adjust_lr": "original", "weight_decay": 0.1}
    ours = run(lambda p: M3(p, 0.02, (0.95, 0.9, 0.9), **settings), shapes)
    theirs = run(lambda p: Muon(p, 0.02, nesterov=False, weight_decay=0.1), shapes)
    still = run(lambda p: SGD(p, 0.0), shapes)
    assert (ours - theirs).norm() < 0.02 * (theirs - still).norm()  # Muon iterates in bfloat16


def test_the_second_moment_does_not_change_the_length_of_m3s_step() -> None:
    """Uniform or not; and a loss times 1,000 takes the same steps."""
    w = nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    g = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    steps = []
    for second_moment, scale in ((False, 1.0), (True, 1.0), (True, 1e3), (True, 1e-6)):
        w.data.zero_()
        w.grad = g * scale
        M3([w], 1.0, second_moment=second_moment).step()
        steps.append(w.detach().clone())
    torch.testing.assert_close(steps[1].norm(), steps[0].norm())
    assert not torch.allclose(steps[1], steps[0])
    for other in steps[2:]:
        torch.testing.assert_close(other, steps[1])
