"""A feature map of the gradient whose coefficients are learned on an objective of their own (NL Eq. 51 with 41, 43)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.optim.matrices import as_matrix, as_rows
from nestling.optim.memories import Memories
from nestling.optim.shards import part_of, whole


@dataclass(frozen=True)
class LearnedFeatures:
    """phi(g) = r sum_k c_k T_k(g / r), an odd polynomial of the gradient as a matrix whose c is learned (NL Eq. 51).

    T_1, T_3, T_5, ... are Chebyshev's polynomials of the singular values, T_1(X) = X and T_{k+2} = 2 (2 X X^T - I) T_k
    - T_{k-2}: they stay in [-1, 1] and are near orthogonal, so that each c_k is learned alike. r = |G G^T|^(1/2) is
    just above the largest singular value. At every step, before phi is read, c moves down

        L(c) = 1/4 |Y Y^T - I|^2 / d,    Y = sum_k c_k T_k(X), d the shorter side

    (NL Eq. 43): features of different rows shall be orthogonal, which is what a linear memory needs of its keys. c
    starts at (1, 0, ...): the first features are the gradient, and become about r times its orthogonal factor, as far
    as a polynomial of this order can. `SpectralFeatures` is the same with c fixed.

    The rate is divided by a bound of L's curvature, sum_k |T_k|^2 / d (1 + 3 (sum_k |c_k|)^2), so c stays bounded for
    every gradient. A gradient of zero teaches nothing.

    Shapes: as `SpectralFeatures`; a vector is one row, and its features are the vector. State: `4 * order` bytes a
    matrix. Cost: two products `[d, d] x [d, n]` for every order beyond the first, and three more.

    Attributes:
        order: number of polynomials, T_1 to T_(2 order - 1).
        rate: zeta of Eq. 41, in (0, 1].
    """

    order: int = 3
    rate: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for settings outside their range."""
        if self.order < 1:
            raise ValueError(f"order must be at least 1, got {self.order}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """Learn from every whole tensor, then its features."""
        results = []
        for part, parameter, state, kind in zip(x, memories.parameters, memories.states, memories.kinds, strict=True):
            full = whole(part, parameter)
            matrix = as_matrix(full, kind) if full.dim() > 1 else as_rows(full)
            y = self._features(state, matrix)
            results.append(part_of(y.reshape(full.shape), parameter))
        return results

    def _features(self, state: dict[str, Any], g: Float[Tensor, "*stack rows cols"]) -> Tensor:
        if "coefficients" not in state:
            first = torch.zeros(*g.shape[:-2], self.order, dtype=g.dtype, device=g.device)
            first[..., 0] = 1.0
            state["coefficients"] = first
        if not g.numel():
            return g
        tall = g.shape[-2] > g.shape[-1]
        x, size = _to_unit(g.mT if tall else g)
        basis = chebyshev(x, self.order)
        c = learned_coefficients(state["coefficients"], basis, self.rate)
        state["coefficients"] = c
        y = size * torch.einsum("...k,...krc->...rc", c, basis)
        return y.mT if tall else y


def chebyshev(x: Float[Tensor, "*stack d n"], order: int) -> Float[Tensor, "*stack order d n"]:
    """T_1(X), T_3(X), ... of the singular values."""
    found, before = [x], x
    if order > 1:
        twice = 4 * x @ x.mT
        twice.diagonal(dim1=-2, dim2=-1).sub_(2)
        for _ in range(order - 1):
            before, after = found[-1], twice @ found[-1] - before
            found.append(after)
    return torch.stack(found, -3)


def learned_coefficients(
    c: Float[Tensor, "*stack order"], basis: Float[Tensor, "*stack order d n"], rate: float
) -> Float[Tensor, "*stack order"]:
    """One step of c down its objective, of the size that the docstring of `LearnedFeatures` says."""
    d = basis.shape[-2]
    y = torch.einsum("...k,...krc->...rc", c, basis)
    error = y @ y.mT
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    slope = torch.einsum("...krc,...rc->...k", basis, error @ y) / d
    curvature = basis.square().sum((-3, -2, -1)) / d * (1 + 3 * c.abs().sum(-1).square())
    return c - rate * slope / torch.where(curvature > 0, curvature, 1.0)[..., None]


def _to_unit(g: Tensor) -> tuple[Tensor, Tensor]:
    """G / r and r, by way of the largest entry, since squares of tiny gradients underflow."""
    largest = g.abs().amax((-2, -1), keepdim=True)
    x = g / torch.where(largest > 0, largest, 1.0)
    size = (x @ x.mT).norm(dim=(-2, -1), keepdim=True).sqrt()
    return x / torch.where(size > 0, size, 1.0), size * largest
