"""What linear layers saw in the forward passes behind the present gradients, for rules that need x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nestling.optim.base import MemoryOptimizer
from nestling.optim.memories import working_dtype

Record = Callable[["Seen", Tensor, Tensor], None]
Reduction = Literal["mean", "sum"]


@dataclass
class Seen:
    """Of one weight, since its gradient was last cleared.

    Attributes:
        tokens: inputs counted.
        gram: their sum of x x^T, `[in, in]`, where Gram matrices are recorded.
        inputs, output_gradients: `[n, in]` and `[n, out]` of every backward pass, where pairs are recorded.
    """

    tokens: int = 0
    gram: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    output_gradients: list[Tensor] = field(default_factory=list)


def record_gram(seen: Seen, x: Tensor, gradient: Tensor) -> None:
    """Add x^T x: `[in, in]` numbers, however many tokens."""
    gram = x.mT @ x
    seen.gram = gram if seen.gram is None else seen.gram.add_(gram)


def record_pairs(seen: Seen, x: Tensor, gradient: Tensor) -> None:
    """Keep every x and its output's gradient: in + out numbers a token."""
    seen.inputs.append(x)
    seen.output_gradients.append(gradient)


class LayerInputs:
    """Hooks on every `nn.Linear` of a model.

    Only tokens through which a gradient flows count: padding and what does not enter the loss have no target. Nothing
    is recorded without a gradient (evaluation, frozen weights). Records last until `clear`, or until the next forward
    pass finds the weight's gradient gone, as `model.zero_grad()` leaves it.
    """

    def __init__(self, model: nn.Module, record: Record) -> None:
        """Args: whose layers; what to keep of a call (`record_gram` or `record_pairs`)."""
        self.record = record
        self.seen: dict[Tensor, Seen] = {}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        # Parameters as they are now: FSDP2 shows a layer another tensor during its forward pass.
        self.handles = [layer.register_forward_hook(self._hook(layer.weight)) for layer in layers]

    def of(self, weight: Tensor) -> Seen | None:
        """The record of a weight, None where no layer used it."""
        seen = self.seen.get(weight)
        return seen if seen is not None and seen.tokens else None

    def clear(self) -> None:
        """Forget everything recorded."""
        self.seen.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.clear()

    def _hook(self, weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if not (torch.is_grad_enabled() and weight.requires_grad and output.requires_grad):
                return
            if weight.grad is None and weight in self.seen:
                del self.seen[weight]
            x = args[0].detach()
            output.register_hook(lambda gradient: self._backward(weight, x, gradient))

        return after_forward

    @torch.no_grad()
    def _backward(self, weight: Tensor, x: Tensor, gradient: Tensor) -> None:
        dtype = working_dtype(weight.dtype)
        x, gradient = x.flatten(0, -2) if x.dim() > 1 else x[None], gradient.reshape(-1, gradient.shape[-1])
        counted = gradient.ne(0).any(-1)
        seen = self.seen.setdefault(weight, Seen())
        seen.tokens += int(counted.sum())
        self.record(seen, x[counted].to(dtype), gradient[counted].to(dtype))


class InputOptimizer(MemoryOptimizer):
    """A memory optimizer whose rule needs the inputs of linear layers; what was recorded lasts until the step.

    Attributes:
        layers: what the layers saw; a subclass sets it before its first step.
    """

    layers: LayerInputs

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and forgets the inputs."""
        super().zero_grad(set_to_none)
        self.layers.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        self.layers.remove()

    def _stepped(self) -> None:
        self.layers.clear()


def check_reduction(reduction: Reduction) -> None:
    """Raise a ValueError for a reduction of the loss that is neither "mean" nor "sum"."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


def mean_gram(seen: Seen, weight: Tensor, reduction: Reduction) -> Tensor:
    """Sum of x x^T over all tokens, of all processes, over their number (for `reduction="mean"`)."""
    assert seen.gram is not None
    gram, tokens = seen.gram, torch.tensor(float(seen.tokens), device=seen.gram.device, dtype=torch.float64)
    if isinstance(weight, DTensor):
        gram = gram.clone()
        for dim in range(weight.device_mesh.ndim):
            dist.all_reduce(gram, group=weight.device_mesh.get_group(dim))
            dist.all_reduce(tokens, group=weight.device_mesh.get_group(dim))
    return gram / tokens.to(gram.dtype) if reduction == "mean" else gram
