"""Which parameters take a matrix step, as what matrix, and the steps on whole matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nestling.ops.newton_schulz import MUON, Coefficients, newton_schulz_many, triples
from nestling.optim.shards import part_of, whole

Kind = Literal["auto", "matrices", "kernels", "elementwise"]
"""What a group's parameters are, in the group's entry `kind`:

- "matrices": `[rows, cols]`, or stacks of them over the last two dimensions;
- "kernels": convolution kernels `[out, in, *size]`, taken as `[out, in * size]`;
- "elementwise": anything that is no map between spaces (embeddings, output heads, gains, biases): AdamW's step;
- "auto" (default): by shape. Two dimensions are a matrix, more are a kernel, fewer are elementwise.
"""

KINDS = ("auto", "matrices", "kernels", "elementwise")
AdjustLr = Literal["original", "match_rms_adamw"] | None


def kind_of(parameter: Tensor, kind: Kind) -> Kind:
    """`kind`, with "auto" resolved by the parameter's shape.

    Raises:
        ValueError: an unknown kind, or "matrices" or "kernels" for fewer than two dimensions.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "auto":
        return "elementwise" if parameter.dim() < 2 else "matrices" if parameter.dim() == 2 else "kernels"
    if kind != "elementwise" and parameter.dim() < 2:
        raise ValueError(
            f'a group of kind "{kind}" holds a parameter of shape {tuple(parameter.shape)}, which is no matrix'
        )
    return kind


def as_matrix(x: Tensor, kind: Kind) -> Tensor:
    """`[*stack, rows, cols]` of a whole tensor."""
    return x.flatten(1) if kind == "kernels" and x.dim() > 2 else x


def as_rows(x: Tensor) -> Tensor:
    """`[rows, cols]`: a kernel's rows are its outputs, a vector is one row, a number is one row of one column."""
    if x.dim() < 2:
        return x.reshape(1, -1)
    return x.flatten(1) if x.dim() > 2 else x


def lr_ratio(rows: int, cols: int, adjust: AdjustLr) -> float:
    """Factor on an orthogonal step of a `[rows, cols]` matrix.

    "original" (Muon): sqrt(max(1, rows / cols)). "match_rms_adamw" (Moonlight, arXiv:2502.16982): 0.2 sqrt(max(rows,
    cols)), which gives entries of root mean square 0.2, about AdamW's, so that one rate serves both. None: 1.

    Raises:
        ValueError: another name.
    """
    if adjust is None:
        return 1.0
    if adjust == "original":
        return math.sqrt(max(1.0, rows / max(1, cols)))
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    raise ValueError(f'adjust must be "original", "match_rms_adamw" or None, got {adjust!r}')


@dataclass(frozen=True)
class Orthogonalizer:
    """Settings of a Newton-Schulz step on a list of parameters' memories.

    Attributes:
        steps, coefficients, eps, dtype, zeta: of `nestling.ops.newton_schulz`.
        adjust: see `lr_ratio`.
    """

    steps: int = 5
    coefficients: Coefficients | tuple[Coefficients, ...] = MUON
    eps: float = 1e-7
    adjust: AdjustLr = "match_rms_adamw"
    dtype: torch.dtype | None = None
    zeta: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot be."""
        lr_ratio(1, 1, self.adjust)
        triples(self.coefficients, self.steps)

    def factors(self, parts: list[Tensor], parameters: list[Tensor], kinds: list[Kind]) -> list[Tensor]:
        """Orthogonal factors of the memories whose local parts are given, times `lr_ratio`; local parts again."""
        fulls = [whole(part, p) for part, p in zip(parts, parameters, strict=True)]
        matrices = [as_matrix(full, kind) for full, kind in zip(fulls, kinds, strict=True)]
        found = newton_schulz_many(matrices, self.steps, self.coefficients, self.eps, self.dtype, self.zeta)
        results = []
        for full, y, parameter in zip(fulls, found, parameters, strict=True):
            y = y.to(full.dtype) * lr_ratio(y.shape[-2], y.shape[-1], self.adjust)
            results.append(part_of(y.reshape(full.shape), parameter))
        return results
