"""Generalized gradient descent: any inner loss on self-generated targets, any retention (NL Definition 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, OnNonfinite, check_range, shared_settings
from nestling.optim.layer_inputs import InputOptimizer, Reduction, Seen, check_reduction, record_pairs, scale_between
from nestling.optim.memories import Memories, working_dtype
from nestling.optim.objectives import DOT, HUBER, L2, Objective, Retention, squared_distance
from nestling.optim.shards import local, part_of, whole
from nestling.optim.windows import mean, remember_, remembered

# Where version 0.2 had its objectives; users import them from here.
__all__ = ["DOT", "HUBER", "L2", "GeneralizedGradientDescent", "Objective", "Retention"]

Target = Callable[[Tensor, Tensor, Tensor], Tensor]


def surprise(x: Tensor, y: Tensor, pull: Tensor) -> Tensor:
    """The target of Eq. 58: u = -dL/dy at the present weights."""
    return pull


def improved_output(x: Tensor, y: Tensor, pull: Tensor) -> Tensor:
    """The target u = y - dL/dy, the output after a gradient step on it: only the error is learned, nothing decays."""
    return y + pull


class GeneralizedGradientDescent(InputOptimizer):
    """W <- argmin of mean_i loss(W x_i, u_i) + mean_{j < window} Ret(W, W_{t-j}) / lr with u_i = f(x_i, W_t x_i,
    -dL_i/dy_i) (NL Definition 5, Eq. 59-60).

    Every `nn.Linear` weight of `model` solves this by `inner_steps` steps of gradient descent from the mean of the last
    `window` weights (W_t by default), of size lr / (1 + lr smoothness mean|x|^2), which is below the inverse of the
    objective's largest curvature. The paper fixes neither
    loss, target, retention nor solver. `objective=DOT` with one step is gradient descent; `L2` converges to
    `DeltaGradientDescent`, which has the closed form.

    With `window` c above 1 (the c of Eq. 59) the last c weights are kept, and the new one is held near all of them
    alike: for the squared distance, near their mean. Gradients then act on an average that follows (c - 1) / 2 steps
    behind, which damps what turns back and forth at every step.

    **The gradient is that of `.grad`**, after clipping, unscaling and averaging, and not what the backward pass showed
    the layers. With G it, and T the sum of dL_i/dy_i x_i^T that the layers saw, G = c T + R with c = max(0, <G, T>) /
    |T|^2. The factor c, 1 unless someone changed the gradient as a whole, goes into the targets, u_i = f(x_i, W_t x_i,
    -c dL_i/dy_i). The rest R, which no token explains (entries that were cut one by one, a penalty on the weight, the
    embedding that a tied head shares its weight with), joins the objective as <R, W>: gradient descent. So `DOT` with
    one step is gradient descent on `.grad`, whatever was done to it, and `L2` is what `DeltaGradientDescent` makes of
    it.

    Shapes: as `DeltaGradientDescent`: biases and all other parameters take gradient descent, from the window's mean.
    Sparse gradients and complex parameters are refused. State per parameter: 4 (window - 1) bytes; between backward and
    step, in + out numbers a token and layer.

    At a level of `MultiFrequency` with a period above 1, an arbitrary inner loss needs the tokens themselves, and a
    period's are too many to keep: those of its last step stand for all of them, with the weight of as many steps as
    had a gradient, and the gradients of the steps before differ from theirs by a part of R. Where the last step had no
    gradient, linear layers take gradient descent. State there: one number a parameter.

    Several processes: as `DeltaGradientDescent`; the mean of Definition 5 is over the tokens of all of them, at the
    price of adding up T, and one slope of the weight's size an inner step.

    Examples:
        >>> import torch
        >>> from nestling.optim import GeneralizedGradientDescent
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = GeneralizedGradientDescent(model.parameters(), lr=0.1, model=model)
        >>> model(torch.randn(5, 8)).square().mean().backward()
        >>> optimizer.step()
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
        window: int = 1,
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
            target: f of inputs `[n, in]`, outputs without bias `[n, out]` and -c dL/dy `[n, out]`.
            retention: of weights and earlier ones, one number.
            window: earlier weights that count, W_t included.
            inner_steps: five come within 1% of L2's minimiser where lr mean|x|^2 is below 1.
            reduction: "mean" if the loss is a mean over tokens (or examples), "sum" if it is a sum.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            process_group: as of `DeltaGradientDescent`.

        Raises:
            ValueError: a setting outside its range; in a forward pass, DistributedDataParallel over several processes
                without `process_group`.
        """
        check_range("inner_steps", inner_steps, 1)
        check_range("window", window, 1)
        check_range("objective.smoothness", objective.smoothness, 0.0)
        check_reduction(reduction)
        self.objective, self.target, self.retention = objective, target, retention
        self.window, self.inner_steps, self.reduction = window, inner_steps, reduction
        defaults = shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite)
        super().__init__(params, defaults, model, record_pairs, process_group)

    def take_inputs(self, last: bool) -> dict[Tensor, Tensor]:
        """A count of 1 for every weight with a gradient. Tokens do not add up: those of the last gradients are kept for
        the step, with the factor that leads from them to these gradients; others are forgotten."""
        if not last:
            self.layers.clear()
        for p in [p for p in self.layers.seen if p.grad is None]:
            del self.layers.seen[p]
        counts: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not self.layers.watches(p):
                    continue
                counts[p] = torch.ones((), device=p.device)
                tokens = self._tokens(p, working_dtype(p.dtype)) if last else None
                if tokens is not None:
                    gradient = local(p.grad).to(tokens.gradient.dtype)
                    self.layers.seen.setdefault(p, Seen()).factor = scale_between(whole(gradient, p), tokens.gradient)
        return counts

    def inputs_shape(self, weight: Tensor) -> tuple[int, ...]:
        """A number."""
        return ()

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        results = []
        lr, sign = float(group["lr"]), -1.0 if group["maximize"] else 1.0
        present = [local(p.detach()).to(g.dtype) for p, g in zip(memories.parameters, gradients, strict=True)]
        pasts = remembered(memories, "weights", self.window)
        for parameter, w, past, gradient in zip(memories.parameters, present, pasts, gradients, strict=True):
            tokens = self._tokens(parameter, gradient.dtype) if lr and self.layers.watches(parameter) else None
            if tokens is None:
                results.append(gradient + (w - mean([w, *past])) / lr if past and lr else gradient)
                continue
            kept = [whole(t, parameter) for t in (w, *past)]
            solved = self._solve(parameter, tokens, whole(gradient, parameter), kept, lr, sign)
            results.append(part_of(solved, parameter))
        remember_(memories, "weights", self.window, present)
        return results

    def _tokens(self, parameter: Tensor, dtype: torch.dtype) -> Tokens | None:
        """None where no process has one."""
        replicas, seen = self.layers.replicas, self.layers.of(parameter)
        if seen is None and not replicas.groups(parameter):
            return None
        rows, columns = parameter.shape
        x, pull = (torch.zeros(0, size, dtype=dtype, device=parameter.device) for size in (columns, rows))
        if seen is not None:
            x, pull = torch.cat(seen.inputs), torch.cat(seen.output_gradients)
        count, squares, gradient = float(len(x)), float(x.square().sum()), pull.mT @ x
        if replicas.groups(parameter):
            counted = replicas.add_up(torch.tensor([count, squares], dtype=torch.float64, device=x.device), parameter)
            count, squares = counted.tolist()
            gradient = replicas.add_up(gradient, parameter)
        return Tokens(x, pull, count, squares, gradient) if count else None

    def _solve(
        self, parameter: Tensor, tokens: Tokens, gradient: Tensor, kept: list[Tensor], lr: float, sign: float
    ) -> Tensor:
        """(W_t - W) / lr of the whole weight; `kept` are W_t and those before it.

        Tokens stay where they are: the processes add up their slopes, and so take the same inner steps.
        """
        replicas, steps = self.layers.replicas, self.layers.summed.get(parameter)
        processes = replicas.count(parameter)
        start = kept[0]
        known = self.layers.seen.get(parameter, Seen()).factor
        factor = sign * (scale_between(sign * gradient, tokens.gradient) if known is None else known)
        share = 1.0 / tokens.count if self.reduction == "mean" else 1.0
        weight = share if steps is None else share * float(steps)
        rest = gradient - factor * weight / share * tokens.gradient
        u = self.target(tokens.x, tokens.x @ start.mT, tokens.pull * (-factor / share))
        rate = lr / (1 + lr * self.objective.smoothness * weight * tokens.squares)
        w = mean(kept)
        for _ in range(self.inner_steps):
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                loss = self.objective.loss(tokens.x @ w.mT, u).sum() * weight
                held = torch.stack([self.retention(w, past) for past in kept]).mean()
                loss = loss + (held / lr + (rest * w).sum()) / processes
                (slope,) = torch.autograd.grad(loss, w)
            w = w.detach() - rate * replicas.add_up(slope, parameter)
        return (start - w) / lr


@dataclass(frozen=True)
class Tokens:
    """What a layer saw.

    Attributes:
        x, pull: inputs `[n, in]` and output gradients `[n, out]` of this process's n tokens.
        count, squares: of the tokens of all processes, their number and the sum of |x|^2.
        gradient: sum of dL/dy x^T over them, `[out, in]`.
    """

    x: Tensor
    pull: Tensor
    count: float
    squares: float
    gradient: Tensor
