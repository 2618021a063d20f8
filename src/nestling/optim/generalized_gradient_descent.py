"""Generalized gradient descent: any inner loss on self-generated targets, any retention (NL Definition 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, OnNonfinite, check_range, shared_settings
from nestling.optim.layer_inputs import InputOptimizer, LayerInputs, Reduction, check_reduction, record_pairs
from nestling.optim.memories import Memories
from nestling.optim.replicas import Replicas
from nestling.optim.shards import local, part_of, whole

InnerLoss = Callable[[Tensor, Tensor], Tensor]
Retention = Callable[[Tensor, Tensor], Tensor]
Target = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """An inner loss.

    Attributes:
        loss: of outputs `[n, out]` and targets `[n, out]`, one number a token, `[n]`.
        smoothness: bound of its second derivative in the output, which sets the inner step.
    """

    loss: InnerLoss
    smoothness: float


DOT = Objective(lambda y, u: -(y * u).sum(-1), 0.0)
"""-<y, u>: with the surprise as target this is gradient descent (Eq. 55)."""

L2 = Objective(lambda y, u: 0.5 * (y - u).square().sum(-1), 1.0)
"""1/2 |y - u|^2: delta gradient descent (Eq. 56)."""

HUBER = Objective(lambda y, u: F.huber_loss(y, u, reduction="none").sum(-1), 1.0)
"""Huber's loss of every coordinate, width 1: one outlier pulls with a force of at most 1."""


def surprise(x: Tensor, y: Tensor, pull: Tensor) -> Tensor:
    """The target of Eq. 58: u = -dL/dy at the present weights."""
    return pull


def improved_output(x: Tensor, y: Tensor, pull: Tensor) -> Tensor:
    """The target u = y - dL/dy, the output after a gradient step on it: only the error is learned, nothing decays."""
    return y + pull


def squared_distance(w: Tensor, start: Tensor) -> Tensor:
    """1/2 |W - W_t|^2, the retention of Eq. 55 and 56; it is divided by the learning rate."""
    return 0.5 * (w - start).square().sum()


class GeneralizedGradientDescent(InputOptimizer):
    """W <- argmin of mean_i loss(W x_i, u_i) + Ret(W, W_t) / lr with u_i = f(x_i, W_t x_i, -dL_i/dy_i) (NL Definition
    5, Eq. 59-60).

    Every `nn.Linear` weight of `model` solves this by `inner_steps` steps of gradient descent from W_t, of size lr / (1
    + lr smoothness mean|x|^2), which is below the inverse of the objective's largest curvature. The paper fixes neither
    loss, target, retention nor solver. `objective=DOT` with one step is gradient descent; `L2` converges to
    `DeltaGradientDescent`, which has the closed form.

    The retention window c of Eq. 59 is 1: only W_t is kept.

    Shapes: as `DeltaGradientDescent`: biases and all other parameters take gradient descent. Sparse gradients and
    complex parameters are refused. State per parameter: none; between backward and step, in + out numbers a token and
    layer.

    At a level of `MultiFrequency` with a period above 1, linear layers learn from the tokens of the period's last step
    alone: an arbitrary inner loss needs the tokens themselves, and a period's are too many to keep. Where that step had
    no gradient they take gradient descent.

    Several processes: as `DeltaGradientDescent`; the mean of Definition 5 is over the tokens of all of them, at the
    price of adding up one slope of the weight's size an inner step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        model: nn.Module,
        objective: Objective = L2,
        target: Target = surprise,
        retention: Retention = squared_distance,
        inner_steps: int = 5,
        reduction: Reduction = "mean",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: weight of the inner loss against the retention (the paper's eta).
            model: whose `nn.Linear` layers are watched by forward hooks; `close()` takes them off.
            objective: `DOT`, `L2`, `HUBER` or another.
            target: f of inputs `[n, in]`, outputs without bias `[n, out]` and -dL/dy `[n, out]`.
            retention: of weights and the weights at the start, one number.
            inner_steps: five come within 1% of L2's minimiser where lr mean|x|^2 is below 1.
            reduction: "mean" if the loss is a mean over tokens (or examples), "sum" if it is a sum.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            process_group: as of `DeltaGradientDescent`.

        Raises:
            ValueError: a setting outside its range; in a forward pass, DistributedDataParallel over several processes
                without `process_group`.
        """
        check_range("inner_steps", inner_steps, 1)
        check_range("objective.smoothness", objective.smoothness, 0.0)
        check_reduction(reduction)
        self.objective, self.target, self.retention = objective, target, retention
        self.inner_steps, self.reduction = inner_steps, reduction
        super().__init__(params, shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite))
        self.layers = LayerInputs(model, record_pairs, Replicas(process_group))

    def take_inputs(self, last: bool) -> dict[Tensor, Tensor]:
        """Nothing, since tokens do not add up: those of the last gradients are kept for the step, others forgotten."""
        if not last:
            self.layers.clear()
        for p in [p for p in self.layers.seen if p.grad is None]:
            del self.layers.seen[p]
        return {}

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        results = []
        lr, sign = float(group["lr"]), -1.0 if group["maximize"] else 1.0
        for parameter, gradient in zip(memories.parameters, gradients, strict=True):
            solved = self._solve(parameter, gradient.dtype, lr, sign) if lr and self.layers.watches(parameter) else None
            results.append(gradient if solved is None else part_of(solved, parameter))
        return results

    def _solve(self, parameter: Tensor, dtype: torch.dtype, lr: float, sign: float) -> Tensor | None:
        """(W_t - W) / lr of the whole weight; None where no process has a token.

        Tokens stay where they are: the processes add up their slopes, and so take the same inner steps.
        """
        replicas, seen = self.layers.replicas, self.layers.of(parameter)
        if seen is None and not replicas.groups(parameter):
            return None
        start = whole(local(parameter.detach()).to(dtype), parameter)
        x, pull = start.new_empty(0, start.shape[1]), start.new_empty(0, start.shape[0])
        if seen is not None:
            x, pull = torch.cat(seen.inputs), torch.cat(seen.output_gradients)
        tokens, squares = float(len(x)), float(x.square().sum())
        if replicas.groups(parameter):
            counted = replicas.add_up(torch.tensor([tokens, squares], dtype=torch.float64, device=x.device), parameter)
            tokens, squares = counted.tolist()
        if not tokens:
            return None
        share = 1.0 / tokens if self.reduction == "mean" else 1.0
        processes = replicas.count(parameter)
        u = self.target(x, x @ start.mT, pull * (-sign / (share * processes)))
        rate = lr / (1 + lr * self.objective.smoothness * share * squares)
        w = start
        for _ in range(self.inner_steps):
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                loss = self.objective.loss(x @ w.mT, u).sum() * share + self.retention(w, start) / (lr * processes)
                (slope,) = torch.autograd.grad(loss, w)
            w = w.detach() - rate * replicas.add_up(slope, parameter)
        return (start - w) / lr
