"""Newton-Schulz against singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestling.ops.newton_schulz import CONVERGENT, MUON, gradient_step, newton_schulz, newton_schulz_many


def with_singular_values(values: Tensor, rows: int, cols: int) -> Tensor:
    """A `[rows, cols]` matrix with the given singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=values.dtype)).Q
    right = torch.linalg.qr(torch.randn(cols, len(values), dtype=values.dtype)).Q
    return left @ values.diag() @ right.mT


@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (60, 20), (20, 60), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_singular_values_end_in_the_stated_interval(rows: int, cols: int, dtype: torch.dtype, slack: float) -> None:
    """[0.68, 1.21] for singular values from 1/300 of the Frobenius norm to all of it, whatever the scale."""
    torch.manual_seed(0)
    count = min(rows, cols)
    for scale in (1e-3, 1.0, 1e3):
        values = torch.logspace(0, -2.0, count, dtype=torch.float64)
        assert values[-1] / values.norm() > 1 / 300
        y = newton_schulz(scale * with_singular_values(values, rows, cols), dtype=dtype).double()
        found = torch.linalg.svdvals(y)
        assert found.min() > 0.68 - slack and found.max() < 1.21 + slack


def test_the_interval_is_that_of_the_polynomial() -> None:
    """The scalar iteration over [1/300, 1], densely: its range is the documented one, not a wider one."""
    s = torch.linspace(1 / 300, 1, 200_001, dtype=torch.float64)
    a, b, c = MUON
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert 0.68 < s.min() < 0.69 and 1.20 < s.max() < 1.21


@pytest.mark.parametrize("shape", [(24, 24), (60, 20), (20, 60), (3, 5, 9), (2, 3, 9, 5)])
def test_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    """The result is U p(S) V^T: an SVD with the polynomial on the singular values gives the same, batched or not."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = MUON
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(x), u @ torch.diag_embed(s) @ v, rtol=1e-9, atol=1e-9)


def test_the_convergent_quintic_reaches_the_polar_factor() -> None:
    torch.manual_seed(0)
    x = with_singular_values(torch.logspace(0, -3.5, 12, dtype=torch.float64), 30, 12)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(newton_schulz(x, 30, CONVERGENT), u @ v, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_rank_deficient_and_empty(dtype: torch.dtype) -> None:
    """Zero gives zero; missing directions stay missing and the others reach the interval; empty stays empty."""
    torch.manual_seed(0)
    assert newton_schulz(torch.zeros(4, 6), dtype=dtype).eq(0).all()
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    found = torch.linalg.svdvals(newton_schulz(with_singular_values(values, 9, 7), dtype=dtype).double())
    assert (found[:3] > 0.6).all() and (found[:3] < 1.25).all()
    # What is missing is rounding of the input, times 485 in five steps: nothing in float32, a lot in bfloat16.
    assert (found[3:] < (0.6 if dtype == torch.bfloat16 else 0.001)).all()
    assert newton_schulz(torch.empty(0, 3), dtype=dtype).shape == (0, 3)
    stack = newton_schulz(torch.stack([torch.zeros(3, 5), torch.randn(3, 5)]))
    assert stack[0].eq(0).all() and stack.isfinite().all()


def test_is_what_torch_muon_runs() -> None:
    """In bfloat16, bit for bit up to the order of sums."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(0)
    for rows, cols in ((20, 50), (50, 20)):
        x = torch.randn(rows, cols)
        wanted = _zeropower_via_newtonschulz(x, MUON, 5, 1e-7).float()
        torch.testing.assert_close(newton_schulz(x, dtype=torch.bfloat16).float(), wanted, rtol=0, atol=0.02)


def test_many_at_once_are_each_alone() -> None:
    """Equal shapes, transposed ones, others, stacks, empty ones: results in their places."""
    torch.manual_seed(0)
    shapes = [(4, 6), (6, 4), (3, 3), (4, 6), (2, 4, 6), (0, 3), (6, 4), (2, 4, 6)]
    matrices = [torch.randn(s, dtype=torch.float64) for s in shapes]
    for found, x in zip(newton_schulz_many(matrices), matrices, strict=True):
        torch.testing.assert_close(found, newton_schulz(x), rtol=1e-12, atol=1e-12)


@pytest.mark.any_shapes
def test_one_triple_a_step() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(x, 3, [MUON] * 3), newton_schulz(x, 3))
    with pytest.raises(ValueError, match="one triple"):
        newton_schulz(x, 4, [MUON] * 3)
    with pytest.raises(ValueError, match="matrices"):
        newton_schulz(torch.ones(3))


@pytest.mark.parametrize("shape", [(7, 7), (4, 9), (9, 4), (2, 4, 9)])
def test_equation_44(shape: tuple[int, ...]) -> None:
    """Gradient descent on 1/2 |O - G|^2 + 1/2 |O^T O - I|^2 from O = G, by autograd; without the pull today's cubic."""
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    g = g / g.norm(dim=(-2, -1), keepdim=True)
    for zeta, pull in ((0.3, 1.0), (0.1, 1.0), (0.3, 0.0)):
        o = g.clone()
        for _ in range(6):
            o = o.detach().requires_grad_()
            short = o if shape[-2] > shape[-1] else o.mT  # the identity of the shorter side
            inner = short.mT @ short - torch.eye(short.shape[-1], dtype=o.dtype)
            loss = 0.5 * pull * (o - g).square().sum() + 0.5 * inner.square().sum()
            o = o - zeta * torch.autograd.grad(loss, o)[0]
        found = newton_schulz(3.0 * g, 6, gradient_step(zeta), zeta=pull * zeta)
        torch.testing.assert_close(found, o.detach(), rtol=1e-12, atol=1e-12)
        many = newton_schulz_many([g, g], 6, gradient_step(zeta), zeta=pull * zeta)
        torch.testing.assert_close(many[1], found, rtol=1e-12, atol=1e-12)


def test_the_pull_towards_the_start_moves_the_end() -> None:
    """Singular values end at the root of 2 o^3 - o = s, as the docstring says, and not at 1."""
    values = torch.tensor([1.0, 0.5, 0.1, 1e-3], dtype=torch.float64)
    g = with_singular_values(values / values.norm(), 8, 4)
    o = torch.linalg.svdvals(newton_schulz(g, 300, gradient_step(0.3), zeta=0.3))
    torch.testing.assert_close(2 * o**3 - o, values / values.norm(), rtol=1e-9, atol=1e-9)
    assert 0.7 < o.min() < o.max() < 1.0
