"""Full-matrix AdaGrad as an output map: the whole second moment in place of its diagonal (NL Eq. 106-111)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.optim.matrices import Kind, as_matrix
from nestling.optim.memories import Memories
from nestling.optim.preconditioners import AdaGradDiagonal
from nestling.optim.shards import part_of, whole

Side = Literal["shorter", "rows"]


@dataclass(frozen=True)
class AdaGradMatrix:
    """H^(-1/2) X with H the plain sum of beta G G^T: NL Eq. 110-111, and AdaGrad of Duchi et al. 2011 for beta = 1.

    As a memory: the m that answers every past gradient with 1 in the coordinates that P = H^(1/2) makes of them, the
    minimiser of sum (<P^-1 g_i, m> - 1)^2 + lambda |m|^2 for lambda -> 0, is H^(-1/2) sum g_i. Eq. 106 leaves P out of
    the product, and its minimiser P (sum g)^T H^-1 has then not the shape of W; Eq. 111 is as here. Where H has lost
    rank, H^(-1/2) is that of its range, the limit of Eq. 107.

    Shapes: matrices and stacks of them, kernels as `[out, in * size]`. H has the size of one side. What is no matrix
    (vectors, tables of kind "elementwise"), and matrices whose side is longer than `limit`, take the diagonal,
    `AdaGradDiagonal`. State: 4 side^2 bytes a matrix. Cost: one eigendecomposition `[side, side]` a step. Gradients
    beyond the root of the largest float overflow H, as they do AdaGrad's.

    Attributes:
        beta: weight of every outer product (the paper's beta_2).
        eps: added to the roots of the eigenvalues, as `torch.optim.Adagrad` does to those of the diagonal.
        side: "shorter" (default) takes G^T G and X H^(-1/2) where a matrix has more rows than columns; "rows" is Eq.
            110 to the letter, and takes a vector as one column, whose H is then the full matrix.
        limit: longest side with a matrix of its own.
    """

    beta: float = 1.0
    eps: float = 1e-10
    side: Side = "shorter"
    limit: int = 1024

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown side."""
        if self.side not in ("shorter", "rows"):
            raise ValueError(f'side must be "shorter" or "rows", got {self.side!r}')

    def apply(self, x: list[Tensor], gradients: list[Tensor], memories: Memories) -> list[Tensor]:
        """One more outer product in H, then the product with its inverse root."""
        results = list(x)
        rest = []
        for i, (parameter, kind) in enumerate(zip(memories.parameters, memories.kinds, strict=True)):
            if self._has_matrix(parameter, kind):
                state = memories.states[i]
                full = whole(x[i], parameter)
                gradient = full if x[i] is gradients[i] else whole(gradients[i], parameter)
                found = self._mapped(self._as_matrix(full, kind), self._as_matrix(gradient, kind), state)
                results[i] = part_of(found.reshape(full.shape), parameter)
            else:
                rest.append(i)
        if rest:
            diagonal = AdaGradDiagonal(self.beta, self.eps)
            found_rest = diagonal.apply([x[i] for i in rest], [gradients[i] for i in rest], memories.some(rest))
            for i, y in zip(rest, found_rest, strict=True):
                results[i] = y
        return results

    def _mapped(self, x: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        left = self.side == "rows" or gradient.shape[-2] <= gradient.shape[-1]
        outer = gradient @ gradient.mT if left else gradient.mT @ gradient
        if "outer" not in state:
            state["outer"] = torch.zeros_like(outer)
        state["outer"].add_(outer, alpha=self.beta)
        root = inverse_root(state["outer"], self.eps)
        return root @ x if left else x @ root

    def _as_matrix(self, x: Tensor, kind: Kind) -> Tensor:
        return x[:, None] if x.dim() == 1 else as_matrix(x, kind)

    def _has_matrix(self, parameter: Tensor, kind: Kind) -> bool:
        if parameter.dim() < 2 or kind == "elementwise":
            return self.side == "rows" and parameter.dim() == 1 and 0 < len(parameter) <= self.limit
        rows, cols = self._as_matrix(parameter, kind).shape[-2:]
        return 0 < (rows if self.side == "rows" else min(rows, cols)) <= self.limit


def inverse_root(h: Float[Tensor, "*batch d d"], eps: float) -> Float[Tensor, "*batch d d"]:
    """(H^(1/2) + eps)^-1 on the range of a positive semidefinite H, 0 beside it.

    Eigenvalues below d times the rounding of the largest count as 0: their roots would divide by noise.
    """
    values, vectors = torch.linalg.eigh(h)
    least = values[..., -1:] * (h.shape[-1] * torch.finfo(h.dtype).eps)
    scales = torch.where(values > least, 1 / (values.clamp(min=0).sqrt() + eps), 0.0)
    return (vectors * scales[..., None, :]) @ vectors.mT
