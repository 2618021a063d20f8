"""Oja's rule for linear layers: gradient descent that forgets along its own writes (NL Eq. 66-67)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, OnNonfinite, check_range, shared_settings
from nestling.optim.delta_gradient_descent import delta_direction
from nestling.optim.layer_inputs import (
    InputOptimizer,
    Reduction,
    Seen,
    check_reduction,
    record_surprises,
    scale_between,
)
from nestling.optim.memories import Memories, working_dtype
from nestling.optim.shards import local, part_of, whole


class OjaGradientDescent(InputOptimizer):
    """W <- argmin of mean_i (-<W x_i, u_i> + 1/2 |W^T u_i|^2) + 1/(2 lr) |W - W_t|^2 with u_i = -dL_i/dy_i, for every
    `nn.Linear` (NL Eq. 66-67).

    The paper has Oja's rule as a sequence model's (OjaNet, Irie et al. 2022), M <- M + eta v (k - M^T v)^T. With the
    layer's input for the key and the surprise of Eq. 58 for the value it is a rule for training, as the delta rule is
    in `DeltaGradientDescent`: W <- W + lr u (x - W^T u)^T. That rule erases W along the inputs in use; this one erases
    it along the outputs that are about to be changed, and not at all where there is no surprise.

    With U the mean of u u^T over the tokens behind the gradient G, the minimiser is (I + lr U)^-1 (W - lr G), stable
    for every lr >= 0; for one short token it is the rule above to first order. Multiplied by 1,000, a loss erases 10^6
    times as much and moves 1,000 times as far: the rule's fixed point, u x^T = u u^T W on average, is about losses of
    the size of 1. Training a network by a loss that can reach 0 it is gradient descent in the end.

    **The surprise is that of `.grad`**, after clipping, unscaling and averaging: u is multiplied by the factor that
    takes what the layers saw nearest to `.grad`, as in `GeneralizedGradientDescent`.

    Shapes: as `DeltaGradientDescent`: biases and all other parameters take gradient descent. Sparse gradients and
    complex parameters are refused. State per parameter: none; between backward and step, one `[out, in]` and one `[out,
    out]` matrix a layer. A level of `MultiFrequency` with a period above 1 keeps and saves the latter, summed, U of the
    whole period. Several processes: as `DeltaGradientDescent`.

    Examples:
        >>> import torch
        >>> from nestling.optim import OjaGradientDescent
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = OjaGradientDescent(model.parameters(), lr=0.1, model=model)  # it sees the layer's surprises
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
        reduction: Reduction = "mean",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool = True,
        on_nonfinite: OnNonfinite = "raise",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Args:
            params: parameters or groups.
            lr: step size; as for gradient descent.
            model: whose `nn.Linear` layers are watched by forward hooks; `close()` takes them off.
            erase: strength of the decay along the surprises; 1 is the paper's, 0 gradient descent.
            reduction: "mean" if the loss is a mean over tokens (or examples), "sum" if it is a sum.
            weight_decay, maximize, foreach, on_nonfinite: see `nestling.optim.base.shared_settings`.
            process_group: as of `DeltaGradientDescent`.

        Raises:
            ValueError: a setting outside its range; in a forward pass, DistributedDataParallel over several processes
                without `process_group`.
        """
        check_range("erase", erase, 0.0)
        check_reduction(reduction)
        self.reduction = reduction
        defaults = {**shared_settings(lr, weight_decay, maximize, foreach, on_nonfinite), "erase": erase}
        super().__init__(params, defaults, model, record_surprises, process_group)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        results = []
        sign = -1.0 if group["maximize"] else 1.0
        for parameter, gradient in zip(memories.parameters, gradients, strict=True):
            if not self._erases(group, parameter):
                results.append(gradient)
                continue
            g = whole(gradient, parameter)
            surprises = self._surprises(parameter, sign * g)
            if surprises is None:
                results.append(gradient)
                continue
            w = whole(local(parameter.detach()).to(gradient.dtype), parameter)
            results.append(part_of(oja_direction(w, g, surprises * group["erase"], float(group["lr"])), parameter))
        return results

    def take_inputs(self, last: bool) -> dict[Tensor, Tensor]:
        """U of every layer, for sums over several steps."""
        found: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not self._erases(group, p):
                    continue
                surprises = self._surprises(p, whole(local(p.grad).to(working_dtype(p.dtype)), p))
                if surprises is not None:
                    found[p] = surprises
        self.layers.clear()
        return found

    def inputs_shape(self, weight: Tensor) -> tuple[int, ...]:
        """`[out, out]`."""
        return weight.shape[0], weight.shape[0]

    def _erases(self, group: Group, weight: Tensor) -> bool:
        return bool(group["erase"]) and self.layers.watches(weight)

    def _surprises(self, weight: Tensor, gradient: Tensor) -> Tensor | None:
        """U behind the whole gradient, whose sign is the backward pass's; None where no process has a token."""
        layers, replicas = self.layers, self.layers.replicas
        if weight in layers.summed:
            return layers.summed[weight]
        seen = layers.of(weight)
        if seen is None and not replicas.groups(weight):
            return None
        if seen is None:
            seen = Seen(0, gram=gradient.new_zeros(len(gradient), len(gradient)), product=torch.zeros_like(gradient))
        assert seen.gram is not None and seen.product is not None
        gram, product, tokens = seen.gram, seen.product, seen.tokens
        if replicas.groups(weight):
            gram, product = (replicas.add_up(t.clone(), weight) for t in (gram, product))
            tokens = int(replicas.add_up(torch.tensor(tokens, device=gram.device), weight))
        if not tokens:
            return None
        factor = scale_between(gradient, product)
        # The loss's gradient at a token's output is what the layer saw times their number, if the loss is their mean.
        return gram * (factor.square() * (tokens if self.reduction == "mean" else 1))


def oja_direction(
    w: Float[Tensor, "out inner"],
    gradient: Float[Tensor, "out inner"],
    surprises: Float[Tensor, "out out"],
    lr: float,
) -> Float[Tensor, "out inner"]:
    """d with W - lr d the minimiser: (I + lr U)^-1 (G + U W), the delta rule's for the transposed weight."""
    return delta_direction(w.mT, gradient.mT, surprises, lr).mT
