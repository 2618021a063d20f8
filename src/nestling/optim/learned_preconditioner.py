"""Preconditioners that are memories themselves, learned by gradient descent on an objective (NL Eq. 39-41, 43)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.optim.matrices import Kind, as_matrix
from nestling.optim.memories import Memories
from nestling.optim.shards import part_of, whole

MapObjective = Callable[[Tensor, Tensor], Tensor]
"""L(P(u), u) of NL Eq. 40: mapped and original gradients `[*stack, d, n]`, one number."""


@dataclass(frozen=True)
class Whitening:
    """P X with P learned to make all directions of the gradient alike (NL Eq. 39-41): a running Newton-Schulz.

    G is `[d, n]`, d the shorter side; its columns are what P learns from, at every step before it is applied. Its
    objective is the negative log-likelihood of gradients with covariance P^-2,

        L(P; G) = 1/2 mean_i |P g_i|^2 - log det P,    minimal at P = C^(-1/2), C = G G^T / n on average.

    A step of size s is P <- R P R, R = I - s/2 (P C P - I): gradient descent on L in the metric of P (P - s P L'(P) P
    to first order), whose speed is the same for strong and weak directions. It is products alone, and P stays
    symmetric and positive. At s = 1/2 it is to first order Newton-Schulz's step to C^(-1/2), which makes P G an
    orthogonal factor; here the iteration goes on from gradient to gradient, so P remembers those before.

    - **Output.** Entries of root mean square 1, as Adam's, whatever the gradient's scale: P starts at I over the first
      gradient's. That of P G is at most 1 / sqrt(rate), as Adam's is by the present square's share of its second
      moment: P is scaled down to it, before a step and after it.
    - **Stability.** s = rate / max(1, rate times a bound of the largest eigenvalue of P C P): R stays positive.
    - **Weak directions.** C counts with `damping` times its mean eigenvalue added, so that P grows by 1 /
      sqrt(damping) at most where there is no gradient, and not at all while there is none at all.

    Shapes: matrices, stacks of them and kernels; an optimizer that uses it gives AdamW the rest. State: 4 d^2 bytes a
    matrix, at most 4 a parameter. Cost: four products `[d, d] x [d, d]` and four `[d, d] x [d, n]`; five steps of
    Newton-Schulz take five and ten.

    Attributes:
        rate: zeta of Eq. 41, in (0, 1]; about the share of the present gradient in what P knows.
        damping: see above.
    """

    rate: float = 0.1
    damping: float = 1e-4

    def __post_init__(self) -> None:
        """Raises ValueError for settings outside their range."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, got {self.damping}")

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """Learn from the gradients, then P x."""
        return _mapped(x, gradients, memories, self._learn)

    def _learn(self, state: dict[str, Any], g: Float[Tensor, "*stack d n"]) -> Tensor:
        u, size = _to_unit(g)
        start = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device) / torch.where(size > 0, size, float("inf"))
        known = state.get("whitening", torch.zeros_like(start))
        p = torch.where(_mean_eigenvalue(known) > 0, known, start)
        state["whitening"] = torch.where(size > 0, whitening_step(p, u, size, self.rate, self.damping), p)
        return state["whitening"]


def whitening_step(
    p: Float[Tensor, "*stack d d"],
    u: Float[Tensor, "*stack d n"],
    size: Float[Tensor, "*stack 1 1"],
    rate: float,
    damping: float,
) -> Float[Tensor, "*stack d d"]:
    """One step of `Whitening` on the gradient `size u`, the entries of u of root mean square 1."""
    q = p * size
    y = q @ u
    seen = y @ y.mT / u.shape[-1] + damping * (q @ q)
    scale = (1 / (rate * _mean_eigenvalue(seen))).clamp(max=1.0)  # of the squares: |P G|^2 / (d n) <= 1 / rate
    p, seen = p * scale.sqrt(), seen * scale
    step = rate / (rate * _bound(seen)).clamp(min=1.0)
    factor = -0.5 * step * seen
    factor.diagonal(dim1=-2, dim2=-1).add_((1 + 0.5 * step)[..., 0])
    p = factor @ p @ factor
    p = (p + p.mT) / 2
    size_after = ((p * size) @ u).square().mean(dim=(-2, -1), keepdim=True)
    return p * (1 / (rate * size_after)).clamp(max=1.0).sqrt()


def orthogonality(y: Float[Tensor, "*stack d n"], u: Float[Tensor, "*stack d n"]) -> Float[Tensor, ""]:
    """1/4 |Y Y^T / n - I|^2: NL Eq. 43 for the shorter side, in entries of root mean square 1."""
    gram = y @ y.mT / y.shape[-1]
    return 0.25 * (gram - torch.eye(y.shape[-2], dtype=y.dtype, device=y.device)).square().sum()


@dataclass(frozen=True)
class LearnedMap:
    """P X with P any matrix learned by gradient descent on any objective: NL Eq. 40-41 to the letter.

    P <- P - zeta dL(P(u); u)/dP from P = I, with the columns of u = G / rms(G), G `[d, n]`, d the shorter side, as
    keys; zeta = rate / |u u^T / n| (a bound of the largest eigenvalue), and no step is longer than `rate` times P. P
    is applied to X itself, so that the step keeps the gradient's units. NL Eq. 39 applies the inverse of a map; here
    the map that is applied is the one that is learned, as in Eq. 43.

    Shapes and state: as `Whitening`. Cost: autograd through the objective, and two products `[d, d] x [d, n]`.

    Attributes:
        objective: L; a function with a name, if the optimizer is to be pickled.
        rate: see above.
    """

    objective: MapObjective = orthogonality
    rate: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError for a rate outside its range."""
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """Learn from the gradients, then P x."""
        return _mapped(x, gradients, memories, self._learn)

    def _learn(self, state: dict[str, Any], g: Float[Tensor, "*stack d n"]) -> Tensor:
        u, _ = _to_unit(g)
        if "map" not in state:
            state["map"] = torch.eye(g.shape[-2], dtype=g.dtype, device=g.device).expand(*g.shape[:-2], -1, -1).clone()
        with torch.enable_grad():
            p = state["map"].detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.objective(p @ u, u), p)
        largest = _bound(u @ u.mT / u.shape[-1])
        step = self.rate * slope / torch.where(largest > 0, largest, 1.0)
        length, longest = (t.norm(dim=(-2, -1), keepdim=True) for t in (step, self.rate * state["map"]))
        state["map"] = state["map"] - step * (longest / torch.where(length > 0, length, 1.0)).clamp(max=1.0)
        return state["map"]


def _mapped(
    x: list[Tensor],
    gradients: list[Tensor],
    memories: Memories,
    learn: Callable[[dict[str, Any], Tensor], Tensor],
) -> list[Tensor]:
    """Every x as a matrix with its shorter side first, times what `learn` makes of the gradient; local parts."""
    results = []
    for part, g, parameter, state, kind in zip(
        x, gradients, memories.parameters, memories.states, memories.kinds, strict=True
    ):
        full = whole(part, parameter)
        if not full.numel():
            results.append(part)
            continue
        gradient = full if part is g else whole(g, parameter)
        matrix, tall = _short_first(full, kind)
        y = learn(state, _short_first(gradient, kind)[0]) @ matrix
        results.append(part_of((y.mT if tall else y).reshape(full.shape), parameter))
    return results


def _short_first(x: Tensor, kind: Kind) -> tuple[Tensor, bool]:
    matrix = as_matrix(x, kind)
    tall = matrix.shape[-2] > matrix.shape[-1]
    return (matrix.mT if tall else matrix), tall


def _to_unit(g: Tensor) -> tuple[Tensor, Tensor]:
    """G over the root mean square of its entries, and that: by way of the largest, since squares may underflow."""
    largest = g.abs().amax((-2, -1), keepdim=True)
    x = g / torch.where(largest > 0, largest, 1.0)
    size = x.square().mean((-2, -1), keepdim=True).sqrt()
    return x / torch.where(size > 0, size, 1.0), size * largest


def _mean_eigenvalue(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _bound(x: Tensor) -> Tensor:
    """The fourth root of the sum of a symmetric matrix's eigenvalues to the fourth: just above the largest."""
    return (x @ x).norm(dim=(-2, -1), keepdim=True).sqrt()
