"""Deep momentum (DMGD): the momentum is an MLP that is trained on its own objective at every step (NL Eq. 50, 52)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, MemoryOptimizer, OnNonfinite, check_range, shared_settings
from nestling.optim.elementwise import adamw_settings
from nestling.optim.matrices import as_rows
from nestling.optim.memories import Memories
from nestling.optim.preconditioners import Map, as_preconditioner, needs_matrices
from nestling.optim.shards import part_of, whole

Objective = Literal["dot", "l2"]


class DeepMomentum(MemoryOptimizer):
    """W <- W - lr S(s m(u)), u = G / s in rows, m trained by gradient descent on its own objective first (NL Eq. 50;
    with S Eq. 52).

    The paper leaves open what is fed to m, its shape and its objective; here:

    - **Keys.** The rows of the gradient `[out, in]` (kernels as `[out, in * size]`, embeddings one row a token),
      divided by the root mean square s of the whole gradient, so that m sees the same scale all along training; s
      multiplies its output again. All rows of a tensor share one memory of `2 * in * width` numbers. Vectors and
      numbers are fed entry by entry, as rows of one.
    - **Memory.** m(u) = u + A tanh(B u), the residual MLP of Eq. 89. A starts at 0: the first step is gradient descent.
    - **Objective.** "dot": -<A h, u> / width averaged over rows, h = tanh(B u). It is the paper's <m(u), 1> with the
      gradient for the 1: with the constant 1 the memory would learn a direction that ignores the gradient's sign. Then
      A <- alpha A + inner_lr mean u h^T / width and m(u_t) = u_t + inner_lr sum_i alpha^(t-i) mean_r u_ir <h_ir, h_t> /
      width: past gradients weighed by their likeness to the present one, where plain momentum weighs all the same. No
      entry of A exceeds inner_lr sqrt(size) / (width (1 - alpha)), since |h| <= 1 and u has unit size. An opposite past
      gradient counts as a like one: m strengthens the subspace of recent gradients and does not average signs away.
      "l2": 1/2 |A h - u|^2 / width, the delta rule, which stops at m(u) = 2 u.
    - **Retention.** alpha acts on A and on B's distance from its first value, so that B does not fade.

    Cost: two products `[out, in] x [in, width]` forward and two backward. State per parameter: `4 * (3 * in * width) /
    (out * in)` = `12 width / out` bytes (0.38 for 1,024 rows), less than any momentum of the parameter's shape. Every
    process of a sharded model holds it in full. Sparse gradients and complex parameters are refused. With
    `output=NewtonSchulz()` what is no matrix takes AdamW's step (8 bytes).

    Examples:
        >>> import torch
        >>> from nestling.optim import DeepMomentum
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = DeepMomentum(layer.parameters(), lr=0.01)
        >>> layer(torch.randn(5, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        *,
        inner_lr: float = 1.0,
        width: int = 32,
        objective: Objective = "dot",
        output: Map = None,
        seed: int = 0,
        weight_decay: float = 0.0,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size, in units of gradient descent's (with Newton-Schulz, of AdamW's).
            momentum: kept fraction alpha of the memory's weights.
            inner_lr: the memory's learning rate.
            width: hidden units of the memory.
            objective: see above.
            output: S: an object with `apply`, a function of one tensor, or None.
            seed: of the memories' first weights; the global generator is not touched.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            adamw_betas, adamw_eps: of the AdamW step beside Newton-Schulz.

        Raises:
            ValueError: a setting outside its range.
        """
        check_range("momentum", momentum, 0.0, 1.0, open_end=True)
        check_range("inner_lr", inner_lr, 0.0)
        check_range("width", width, 1)
        if objective not in ("dot", "l2"):
            raise ValueError(f'objective must be "dot" or "l2", got {objective!r}')
        self.output = as_preconditioner(output)
        self.adamw_for_rest = needs_matrices(self.output)
        self.width, self.seed = width, seed
        defaults = {
            **shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite),
            "momentum": momentum,
            "inner_lr": inner_lr,
            "objective": objective,
            "kind": "auto",
            **adamw_settings(adamw_betas, adamw_eps),
        }
        super().__init__(params, defaults)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        outputs = []
        for parameter, state, part in zip(memories.parameters, memories.states, gradients, strict=True):
            gradient = whole(part, parameter)
            keys = as_keys(gradient)
            self._start(state, keys)
            scale = keys.square().mean().sqrt() if keys.numel() else keys.new_zeros(())
            u = keys / torch.where(scale > 0, scale, 1.0)
            train_(state, u, group["momentum"], group["inner_lr"], group["objective"])
            answer = (u + torch.tanh(u @ state["inner"].mT) @ state["outer"].mT) * scale
            outputs.append(part_of(answer.reshape(gradient.shape), parameter))
        return outputs if self.output is None else self.output.apply(outputs, gradients, memories)

    def _start(self, state: dict[str, Any], keys: Tensor) -> None:
        """First weights, the same on every process: B with variance 1/in, A zero."""
        if "inner" not in state:
            generator = torch.Generator().manual_seed(self.seed)
            size = keys.shape[1]
            drawn = torch.randn(self.width, size, generator=generator, dtype=torch.float64) / math.sqrt(max(1, size))
            state["first"] = drawn.to(keys)
            state["inner"] = state["first"].clone()
            state["outer"] = keys.new_zeros(size, self.width)


def as_keys(gradient: Tensor) -> Float[Tensor, "n size"]:
    """Rows of a matrix or kernel; the entries of a vector or number, one a row."""
    return as_rows(gradient) if gradient.dim() > 1 else gradient.reshape(-1, 1)


def train_(
    state: dict[str, Any], u: Float[Tensor, "n size"], kept: float, inner_lr: float, objective: Objective
) -> None:
    """One step of gradient descent on the memory's objective, after retention towards its first weights, in place.

    The gradient is taken at the weights before retention. With h = tanh(B u) and e the objective's gradient at A h (-u,
    or A h - u): dA = mean e h^T / width, dB = mean ((A^T e) * (1 - h^2)) u^T / width.
    """
    if not u.shape[0]:
        return
    outer, inner, first = state["outer"], state["inner"], state["first"]
    hidden = torch.tanh(u @ inner.mT)
    error = -u if objective == "dot" else hidden @ outer.mT - u
    at_hidden = (error @ outer) * (1 - hidden.square())
    rate = inner_lr / (u.shape[0] * hidden.shape[1])
    outer.mul_(kept).addmm_(error.mT, hidden, alpha=-rate)
    inner.lerp_(first, 1 - kept).addmm_(at_hidden.mT, u, alpha=-rate)
