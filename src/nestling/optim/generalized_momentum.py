"""Generalized momentum: the memory of gradients solves a problem of its own over a window (NL section 4.5, Eq. 59)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, MemoryOptimizer, OnNonfinite, check_range, shared_settings
from nestling.optim.matrices import as_rows
from nestling.optim.memories import Memories
from nestling.optim.objectives import L2, Objective, Retention, squared_distance
from nestling.optim.shards import part_of, whole
from nestling.optim.windows import mean, remember_, remembered


class GeneralizedMomentum(MemoryOptimizer):
    """W <- W - lr m, m <- argmin of sum_r loss(m_r . k_r, |g_r|) + mean_{i < window} Ret(m, momentum m_{t-i}) /
    inner_lr (NL section 4.5: Definition 5 for the momentum).

    The paper says that the keys and values of a momentum are given and not self-generated, and no more. Here, as in
    `DeltaMomentum`, every output unit (row of `[out, in]`, kernel `[in * size]`, embedding vector) has a memory m_r;
    its key is the gradient's direction k_r = g_r / |g_r| and its value the gradient's length, so that nothing depends
    on the loss's scale. Then

    - `DOT` with window 1 is SGD with momentum, its gradients times `inner_lr` (Eq. 47);
    - `L2` (default) with window 1 is delta momentum (Eq. 49): with w = inner_lr / (1 + inner_lr), `DeltaMomentum(delta=
      momentum w)` at the rate lr w. Along a steady gradient m stays near it, where momentum piles up 1 / (1 - momentum)
      of them;
    - a window of c keeps m near the mean of the last c momenta and not near the last alone. What was written once is
      then held for longer (c steps at least) at the same retention, and new gradients count as before.

    The problem is solved by `inner_steps` steps of gradient descent from momentum times the window's mean, of size
    inner_lr / (1 + inner_lr smoothness): one step is exact for `DOT` and `L2` with the squared distance.

    Shapes: all, 0-d and empty ones included; a vector is one row. Sparse gradients and complex parameters are refused.
    State per parameter: 4 window bytes (float32 for half-precision parameters).

    Examples:
        >>> import torch
        >>> from nestling.optim import GeneralizedMomentum
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = GeneralizedMomentum(layer.parameters(), lr=0.1)
        >>> layer(torch.randn(5, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        *,
        window: int = 4,
        objective: Objective = L2,
        retention: Retention = squared_distance,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size, as of gradient descent (of SGD with momentum for `DOT`).
            momentum: kept fraction of the past momenta (the paper's alpha).
            window: past momenta that the new one is held near (the paper's c).
            objective: of answers `[rows, 1]` and gradient lengths `[rows, 1]`: `DOT`, `L2`, `HUBER` or another.
            retention: of the new momentum `[rows, columns]` and a past one, one number.
            inner_lr: weight of the loss against the retention (the paper's eta).
            inner_steps: more than one for other losses and retentions.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.

        Raises:
            ValueError: a setting outside its range.
        """
        check_range("momentum", momentum, 0.0, 1.0, open_end=True)
        check_range("window", window, 1)
        check_range("inner_lr", inner_lr, 0.0)
        check_range("inner_steps", inner_steps, 1)
        check_range("objective.smoothness", objective.smoothness, 0.0)
        self.window, self.objective, self.retention = window, objective, retention
        defaults = {
            **shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite),
            "momentum": momentum,
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
        }
        super().__init__(params, defaults)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        momenta = memories.tensors("momentum")
        pasts = remembered(memories, "momentum", self.window)
        news = []
        for m, past, g, parameter in zip(momenta, pasts, gradients, memories.parameters, strict=True):
            kept = [group["momentum"] * as_rows(whole(t, parameter)) for t in (m, *past)]
            gradient = whole(g, parameter)
            rows = self._solve(as_rows(gradient), kept, group["inner_lr"], group["inner_steps"])
            news.append(part_of(rows.reshape(gradient.shape), parameter))
        remember_(memories, "momentum", self.window, momenta)
        for m, new in zip(momenta, news, strict=True):
            m.copy_(new)
        return momenta

    def _solve(
        self, gradient: Float[Tensor, "out inner"], kept: list[Tensor], inner_lr: float, steps: int
    ) -> Float[Tensor, "out inner"]:
        length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        key = gradient / length.masked_fill(length == 0, 1.0)
        rate = inner_lr / (1 + inner_lr * self.objective.smoothness)
        m = mean(kept)
        if not m.numel() or not inner_lr:
            return m
        for _ in range(steps):
            with torch.enable_grad():
                m = m.detach().requires_grad_()
                loss = self.objective.loss((m * key).sum(-1, keepdim=True), length).sum()
                held = torch.stack([self.retention(m, past) for past in kept]).mean()
                (slope,) = torch.autograd.grad(loss + held / inner_lr, m)
            m = m.detach() - rate * slope
        return m
