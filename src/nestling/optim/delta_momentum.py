"""Delta momentum: a momentum that overwrites what it holds under the present gradient (NL Eq. 48-49)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nestling.ops import native
from nestling.optim.base import Group, MemoryOptimizer, OnNonfinite, check_range, shared_settings
from nestling.optim.matrices import as_rows
from nestling.optim.memories import Memories
from nestling.optim.preconditioners import Map, as_preconditioner
from nestling.optim.shards import part_of, whole

Scale = Literal["nlms", "bounded", "literal"]
Keys = Literal["row", "matrix"]


class DeltaMomentum(MemoryOptimizer):
    """m <- m (momentum I - e g^T g) + P g; W <- W - lr m (NL Eq. 49; the sign of m is turned and lr taken out of it).

    The delta rule writes P g under the key g in place of adding it: what m held along the present gradient goes first.
    The literal factor has e = 1, so its eigenvalue along g is momentum - |g|^2, below -1 as soon as |g|^2 > 1 +
    momentum, and m then grows without bound. So the key is scaled:

    - `scale="nlms"` (default): e = delta / |g|^2, normalised least mean squares. The factor along g is momentum - delta
      whatever the gradient's size, so the rule works alike for a loss times 1,000, and contracts for delta <= 1 +
      momentum. A gradient of zero (in
      float32, shorter than 1e-19) erases nothing.
    - `scale="bounded"`: e = delta / max(1, |g|^2), the literal factor as long as |g| <= 1. Gradients of single units
      are mostly far below 1 in networks, where this is momentum.
    - `scale="literal"`: e = delta, Eq. 49 for delta = 1. It diverges on gradients longer than 1.4.

    Keys: `keys="row"` (default) gives every output unit (row of `[out, in]`, kernel `[in * size]`, embedding vector)
    its own memory, m_r <- momentum m_r - e_r (m_r . g_r) g_r + (P g)_r. `keys="matrix"` is Eq. 49 with the matrix G^T
    G, whose off-diagonal terms mix units, and |G|_F^2 for |g|^2: two more matrix products a parameter, dozens of times
    the cost. A vector is one row in both, and a number a row of one.

    Shapes: all, 0-d and empty ones included. Sparse gradients and complex parameters are refused. State per parameter:
    one tensor, 4 bytes (float32 for half-precision parameters).

    Examples:
        >>> import torch
        >>> from nestling.optim import DeltaMomentum
        >>> w = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = DeltaMomentum([w], lr=0.1)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.detach()
        tensor([[0.8000, 0.8000, 0.8000],
                [0.8000, 0.8000, 0.8000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        delta: float = 1.0,
        *,
        keys: Keys = "row",
        scale: Scale = "nlms",
        preconditioner: Map = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size, in the units of SGD with momentum; since the delta holds back what momentum would pile up
                along a steady gradient, the best rate is somewhat larger.
            momentum: kept fraction of m (the paper's alpha).
            delta: strength of the erasure; 1 as in the equation, 0 is SGD with momentum.
            keys, scale: see above.
            preconditioner: P: an object with `apply`, a function of one tensor, or None for the identity.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.

        Raises:
            ValueError: a setting outside its range; `delta` above 1 + momentum, unless the scale is literal.
        """
        check_range("momentum", momentum, 0.0, 1.0)
        check_range("delta", delta, 0.0, float("inf") if scale == "literal" else 1.0 + momentum)
        if keys not in ("row", "matrix"):
            raise ValueError(f'keys must be "row" or "matrix", got {keys!r}')
        if scale not in ("nlms", "bounded", "literal"):
            raise ValueError(f'scale must be "nlms", "bounded" or "literal", got {scale!r}')
        self.preconditioner = as_preconditioner(preconditioner)
        defaults = {
            **shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite),
            "momentum": momentum,
            "delta": delta,
            "keys": keys,
            "scale": scale,
        }
        super().__init__(params, defaults)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        momenta = memories.tensors("momentum")
        values = gradients
        if self.preconditioner is not None:
            values = self.preconditioner.apply(gradients, gradients, memories)
        write = write_rows_ if group["keys"] == "row" else write_matrix_
        for m, g, v, parameter in zip(momenta, gradients, values, memories.parameters, strict=True):
            full = whole(m, parameter)
            key = whole(g, parameter)
            value = key if v is g else whole(v, parameter)
            rows = as_rows(full), as_rows(key)
            write(*rows, rows[1] if value is key else as_rows(value), group["momentum"], group["delta"], group["scale"])
            if full is not m:
                m.copy_(part_of(full, parameter))
        return momenta


def write_rows_(
    m: Float[Tensor, "out inner"],
    key: Float[Tensor, "out inner"],
    value: Float[Tensor, "out inner"],
    kept: float,
    delta: float,
    scale: Scale,
) -> None:
    """m_r <- kept m_r - e_r (m_r . k_r) k_r + v_r for every row, in place; `value is key` saves a pass over memory."""
    if all(native.fits(t) and t.is_contiguous() and t.dtype == m.dtype for t in (m, key, value)):
        return native.native_delta_rows_(m, key, value, kept, delta, scale)
    square = torch.linalg.vector_norm(key, dim=-1).square()  # faster than a product of the key with itself
    erased = _strength(square, delta, scale) * torch.linalg.vecdot(m, key)
    m.mul_(kept)
    if value is key:
        m.addcmul_(key, (1.0 - erased).unsqueeze(-1))
    else:
        m.add_(value).addcmul_(key, erased.unsqueeze(-1), value=-1.0)


def write_matrix_(
    m: Float[Tensor, "out inner"],
    key: Float[Tensor, "out inner"],
    value: Float[Tensor, "out inner"],
    kept: float,
    delta: float,
    scale: Scale,
) -> None:
    """m <- m (kept I - e K^T K) + V, in place; the products are taken on the shorter side."""
    erased = (m @ key.mT) @ key if key.shape[0] <= key.shape[1] else m @ (key.mT @ key)
    m.mul_(kept).add_(value).addcmul_(erased, _strength(key.square().sum(), delta, scale), value=-1.0)


def _strength(square: Tensor, delta: float, scale: Scale) -> Tensor:
    """e for keys of squared length `square`."""
    if scale == "literal":
        return torch.full_like(square, delta)
    if scale == "bounded":
        return delta / square.clamp(min=1.0)
    return delta / square.masked_fill(square < torch.finfo(square.dtype).tiny, float("inf"))
