"""Newton-Schulz: the orthogonal factor of a matrix by products alone (NL Eq. 42-44; Muon, Jordan et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

MUON = (3.4445, -4.7750, 2.0315)
"""Muon's quintic: the slope at zero is 3.44, so that small singular values rise fast; it never settles at 1."""

CONVERGENT = (1.875, -1.25, 0.375)
"""The quintic whose value is 1 and whose first two derivatives are 0 at 1: slow from below, then exact."""

Coefficients = tuple[float, float, float]
_STACK_ENTRIES = 1 << 20  # of one batched product on a CPU: larger stacks leave its caches and gain nothing


def newton_schulz(
    x: Float[Tensor, "*batch rows cols"],
    steps: int = 5,
    coefficients: Coefficients | Sequence[Coefficients] = MUON,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    zeta: float = 0.0,
) -> Float[Tensor, "*batch rows cols"]:
    """Bring the singular values of `x` near 1 and keep its singular vectors: U S V^T becomes about U V^T.

    One step is X <- a X + (b A + c A^2) X - zeta (X - G) with A = X X^T and G the start; without `zeta` it acts on
    every singular value s as a s + b s^3 + c s^5. `x` is divided by its Frobenius norm first, so its scale does not
    matter.

    NL Eq. 44 is `gradient_step(zeta)` as coefficients with the same `zeta`: gradient descent on 1/2 |O - G|^2 + 1/2
    |O^T O - I|^2. The pull towards G is left out by default, as in Muon: with it, a singular value s of G ends at the
    root of 2 o^3 - o = s, between 0.71 and 1, and not near 1.

    With the defaults every singular value of at least 1/300 of the Frobenius norm ends in [0.68, 1.21] (the polynomial
    itself gives that interval in exact arithmetic); smaller ones grow by 3.4445 a step, 485 times in all, and zero
    stays zero. `CONVERGENT` with 30 steps reaches U V^T to 1e-6 for singular values of at least 1e-4 of the norm.

    Args:
        x: matrices over the last two dimensions, tall or wide: products are taken on the shorter side.
        steps: iterations; five, as Muon.
        coefficients: one triple (a, b, c), or one a step.
        eps: smallest norm that is divided by, so that a zero matrix gives zero.
        dtype: of the products. None: bfloat16 on an accelerator, as Muon; on a CPU that of `x`, at least float32, since
            most CPUs emulate bfloat16.
        zeta: of the pull towards the start.

    Returns:
        The result in `dtype` (the caller casts).

    Raises:
        ValueError: `x` has fewer than two dimensions, or there is not one triple a step.
    """
    if x.dim() < 2:
        raise ValueError(f"newton_schulz needs matrices [..., rows, cols], got shape {tuple(x.shape)}")
    polynomials = triples(coefficients, steps)
    y = x.to(dtype or _product_dtype(x))
    if y.numel() == 0:
        return y
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    add_product = torch.addmm if y.dim() == 2 else torch.baddbmm
    flat = start = y.flatten(0, -3) if y.dim() > 3 else y
    for a, b, c in polynomials:
        gram = flat @ flat.mT
        flat = add_product(flat, add_product(gram, gram, gram, beta=b, alpha=c), flat, beta=a - zeta)
        if zeta:
            flat = flat.add_(start, alpha=zeta)
    y = flat.view(y.shape)
    return y.mT if tall else y


def newton_schulz_many(
    matrices: Sequence[Float[Tensor, "... _ _"]],
    steps: int = 5,
    coefficients: Coefficients | Sequence[Coefficients] = MUON,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    zeta: float = 0.0,
) -> list[Float[Tensor, "... _ _"]]:
    """`newton_schulz` of every matrix; those of one shape, up to a transposition, run as one batch.

    A stack of matrices is a batch of its own.
    """
    results: list[Tensor] = list(matrices)
    stacks: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(matrices):
        stacks.setdefault((*sorted(x.shape[-2:]), x.dim(), x.dtype, x.device, x.dim() > 2 and i), []).append(i)
    for indices in stacks.values():
        first = matrices[indices[0]]
        size = len(indices) if first.is_cuda else max(1, _STACK_ENTRIES // max(1, first.numel()))
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            if len(part) == 1:
                results[part[0]] = newton_schulz(matrices[part[0]], steps, coefficients, eps, dtype, zeta)
                continue
            wide = [m.mT if m.shape[-2] > m.shape[-1] else m for m in (matrices[i] for i in part)]
            found = newton_schulz(torch.stack(wide), steps, coefficients, eps, dtype, zeta)
            for i, y in zip(part, found, strict=True):
                results[i] = y.mT if matrices[i].shape[-2] > matrices[i].shape[-1] else y
    return results


def gradient_step(zeta: float) -> Coefficients:
    """The cubic of NL Eq. 44, O <- O - zeta (O - G + 2 O (O^T O - I)), for `newton_schulz(..., zeta=zeta)`.

    Below zeta = 0.4 it settles for every G. A small singular value s grows by the factor 1 + zeta a step, and by zeta s
    besides, so five steps do little for it.
    """
    return 1 + 2 * zeta, -2 * zeta, 0.0


def triples(coefficients: Coefficients | Sequence[Coefficients], steps: int) -> list[Coefficients]:
    """One triple a step.

    Raises:
        ValueError: neither one triple nor one a step.
    """
    given: list[Any] = list(coefficients)
    if len(given) == 3 and all(isinstance(c, float | int) for c in given):
        given = [given] * steps
    if len(given) != steps or any(isinstance(c, float | int) or len(c) != 3 for c in given):
        raise ValueError(f"coefficients must be one triple (a, b, c), or one a step ({steps}); got {coefficients}")
    return [(float(a), float(b), float(c)) for a, b, c in given]


def _product_dtype(x: Tensor) -> torch.dtype:
    if x.device.type != "cpu":
        return torch.bfloat16
    return torch.promote_types(x.dtype, torch.float32)
