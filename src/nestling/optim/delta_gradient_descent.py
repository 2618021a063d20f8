"""Delta gradient descent: each layer erases what it says to its present inputs (NL Eq. 54-57, appendix C)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, OnNonfinite, check_range, shared_settings
from nestling.optim.layer_inputs import InputOptimizer, Reduction, check_reduction, mean_gram, record_gram
from nestling.optim.memories import Memories
from nestling.optim.shards import local, part_of, whole

Solver = Literal["exact", "step"]


class DeltaGradientDescent(InputOptimizer):
    """W <- argmin of mean_i 1/2 |W x_i - u_i|^2 + 1/(2 lr) |W - W_t|^2 with u_i = -dL_i/dy_i (NL Eq. 56), for every
    `nn.Linear`.

    With C the mean of x x^T over the tokens behind the gradient G, the minimiser is (W - lr G)(I + lr C)^-1. For one
    token that is NL Eq. 57, W (I - lr' x x^T) - lr' G, with lr' = lr / (1 + lr |x|^2): the paper states lr' for inputs
    of length 1, and appendix C's last lines lose the sign of u and invert eta. Both solvers are stable for every lr >=
    0.

    The pull of W x towards u, and not towards W x + u, is a decay along the inputs in use: the fixed point is W x = u.
    `erase` scales it; 0 is gradient descent.

    Shapes: weights of `nn.Linear` layers of `model` take the rule; their biases and all other parameters (embeddings,
    kernels, gains, 0-d) have no layer input here and take gradient descent (Eq. 54) with the same rate. Sparse
    gradients and complex parameters are refused. A weight used by other modules too (a tied embedding) counts the
    linear layer's inputs only.

    State per parameter: none. Between backward and step, one `[in, in]` matrix a layer. At a level of `MultiFrequency`
    with a period above 1, C is summed as the gradient is, and so covers the whole period: one `[in, in]` matrix a layer
    is kept and saved there.

    Several processes: C is the mean over the tokens of all of them. Under FSDP2 build it after `fully_shard`; under
    DistributedDataParallel give `process_group`. A loss that is a sum must be multiplied by the number of processes,
    since both average the gradients.

    Examples:
        >>> import torch
        >>> from nestling.optim import DeltaGradientDescent
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = DeltaGradientDescent(model.parameters(), lr=0.1, model=model)  # it sees the layers' inputs
        >>> model(torch.randn(5, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        model: nn.Module,
        erase: float = 1.0,
        solver: Solver = "exact",
        reduction: Reduction = "mean",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size (the paper's eta); as for gradient descent.
            model: whose `nn.Linear` layers are watched by forward hooks; `close()` takes them off.
            erase: strength of the decay along the inputs; 1 is the paper's.
            solver: "exact" solves the system above (one Cholesky factor of `[in, in]` a layer); "step" takes Eq. 57
                with C for x x^T and the trace of C for |x|^2: cheaper, the same for one token, a shorter step for many.
            reduction: "mean" if the loss is a mean over tokens (or examples), "sum" if it is a sum.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            process_group: the processes of a DistributedDataParallel, `torch.distributed.group.WORLD` for all. None:
                the gradients of parameters that are not spread are this process's own.

        Raises:
            ValueError: a setting outside its range; in a forward pass, DistributedDataParallel over several processes
                without `process_group`.
        """
        check_range("erase", erase, 0.0)
        if solver not in ("exact", "step"):
            raise ValueError(f'solver must be "exact" or "step", got {solver!r}')
        check_reduction(reduction)
        self.solver, self.reduction = solver, reduction
        defaults = {**shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite), "erase": erase}
        super().__init__(params, defaults, model, record_gram, process_group)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        results = []
        for parameter, gradient in zip(memories.parameters, gradients, strict=True):
            gram = self._gram(group, parameter)
            if gram is None:
                results.append(gradient)
                continue
            gram = gram.to(gradient.dtype) * group["erase"]
            w = whole(local(parameter).to(gradient.dtype), parameter)
            direction = delta_direction(w, whole(gradient, parameter), gram, float(group["lr"]), self.solver)
            results.append(part_of(direction, parameter))
        return results

    def take_inputs(self, last: bool) -> dict[Tensor, Tensor]:
        """C of every layer, for sums over several steps."""
        found = {
            p: gram
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and (gram := self._gram(group, p)) is not None
        }
        self.layers.clear()
        return found

    def inputs_shape(self, weight: Tensor) -> tuple[int, ...]:
        """`[in, in]`."""
        return weight.shape[-1], weight.shape[-1]

    def _gram(self, group: Group, parameter: Tensor) -> Tensor | None:
        """C, None where there is nothing to erase."""
        if group["erase"] == 0:
            return None
        given = self.layers.summed.get(parameter)
        return mean_gram(self.layers, parameter, self.reduction) if given is None else given


def delta_direction(
    w: Float[Tensor, "out inner"],
    gradient: Float[Tensor, "out inner"],
    gram: Float[Tensor, "inner inner"],
    lr: float,
    solver: Solver = "exact",
) -> Float[Tensor, "out inner"]:
    """d with W - lr d the minimiser (or its one-token form): (G + W C)(I + lr C)^-1, which has a limit at lr = 0."""
    pull = gradient + w @ gram
    if solver == "step":
        return pull / (1 + lr * gram.trace())
    system = gram * lr
    system.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(pull.mT, factor).mT
