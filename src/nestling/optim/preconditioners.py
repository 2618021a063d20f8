"""Preconditioners P and output maps of a momentum (NL Eq. 38-47, 52, appendix B); those that learn or take the whole
second moment have modules of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nestling.ops.newton_schulz import MUON, Coefficients, newton_schulz_many
from nestling.optim.elementwise import accumulate_squares, root
from nestling.optim.learned_preconditioner import LearnedMap, Whitening
from nestling.optim.matrices import Orthogonalizer, as_matrix, as_rows
from nestling.optim.memories import Memories
from nestling.optim.shards import part_of, whole


@runtime_checkable
class Preconditioner(Protocol):
    """A map of gradients or momenta that may remember past gradients."""

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """P(x) for every parameter, new tensors; all are local parts.

        Args:
            x: what is mapped, the gradients themselves or a momentum.
            gradients: of this step.
            memories: the parameters' state, in which a preconditioner keeps tensors under names of its own.
        """
        ...


@dataclass(frozen=True)
class PerTensor:
    """Any function of one whole tensor, for instance `lambda g: g.sign()`.

    Attributes:
        function: keeps the shape; no state.
    """

    function: Callable[[Tensor], Tensor]

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """The function of each whole tensor.

        Raises:
            ValueError: the function changes the shape: a momentum must have its parameter's.
        """
        results = []
        for part, parameter in zip(x, memories.parameters, strict=True):
            full = whole(part, parameter)
            y = self.function(full)
            if y.shape != full.shape:
                raise ValueError(
                    f"the map turned shape {tuple(full.shape)} into {tuple(y.shape)}; it must keep the shape"
                )
            results.append(part_of(y, parameter))
        return results


@dataclass(frozen=True)
class AdamDiagonal:
    """x / (sqrt(h) + eps) with h the exponential mean of g^2 (NL Eq. 102 and 105, lambda = 0, as a mean).

    Attributes:
        beta: kept fraction of h; 0.999 as Adam.
        eps: added to the root, as Adam.
        bias_correction: divide h by 1 - beta^t, its weight since the zero start.
    """

    beta: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """One more square in h, then the quotient."""
        squares = memories.tensors("second_moment")
        accumulate_squares(squares, gradients, self.beta, 1 - self.beta)
        divisors = [1 - self.beta**t if self.bias_correction else 1.0 for t in memories.steps]
        return list(torch._foreach_div(x, root(squares, divisors, self.eps)))


@dataclass(frozen=True)
class AdaGradDiagonal:
    """x / (sqrt(h) + eps) with h the plain sum of beta g^2: NL Eq. 102 to the letter, and AdaGrad for beta = 1.

    Attributes:
        beta: weight of every square (the paper's beta_2).
        eps: added to the root, as `torch.optim.Adagrad`.
    """

    beta: float = 1.0
    eps: float = 1e-10

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """One more square in h, then the quotient."""
        squares = memories.tensors("second_moment")
        accumulate_squares(squares, gradients, 1.0, self.beta)
        return list(torch._foreach_div(x, root(squares, [1.0] * len(x), self.eps)))


@dataclass(frozen=True)
class NewtonSchulz(Orthogonalizer):
    """The orthogonal factor (NL Eq. 42-44): for matrices; an optimizer that uses it gives AdamW the rest."""

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """The factors, times `lr_ratio`."""
        return self.factors(x, memories.parameters, memories.kinds)


@dataclass(frozen=True)
class SpectralFeatures:
    """Odd polynomials of a gradient as a matrix: phi(g) = |g| p(g / |g|), p one or more steps a X + b X X^T X + c (X
    X^T)^2 X.

    NL section 4.2 calls Newton-Schulz such a map. One step (default) raises small singular values by up to 3.44 against
    large ones and keeps the gradient's units; zero steps are the identity, and with many phi is |g| times the
    orthogonal factor. A vector is one row, and keeps its direction.

    Attributes:
        steps, coefficients: of `nestling.ops.newton_schulz`.
    """

    steps: int = 1
    coefficients: Coefficients = MUON

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """phi of every whole tensor."""
        fulls = [whole(part, p) for part, p in zip(x, memories.parameters, strict=True)]
        matrices = [
            as_matrix(full, kind) if full.dim() > 1 else as_rows(full)
            for full, kind in zip(fulls, memories.kinds, strict=True)
        ]
        norms = [m.norm(dim=(-2, -1), keepdim=True) for m in matrices]
        found = newton_schulz_many(matrices, self.steps, self.coefficients, dtype=None)
        return [
            part_of((y.to(n.dtype) * n).reshape(full.shape), p)
            for y, n, full, p in zip(found, norms, fulls, memories.parameters, strict=True)
        ]


Map = Preconditioner | Callable[[Tensor], Tensor] | None


def as_preconditioner(given: Map) -> Preconditioner | None:
    """A preconditioner, a function of one tensor, or None, which is the identity."""
    return given if given is None or isinstance(given, Preconditioner) else PerTensor(given)


def needs_matrices(*maps: Preconditioner | None) -> bool:
    """Whether one of these maps works on matrices alone, so that what is none takes AdamW's step."""
    return any(isinstance(m, NewtonSchulz | Whitening | LearnedMap) for m in maps)
