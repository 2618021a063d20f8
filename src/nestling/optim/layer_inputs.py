"""What linear layers saw in the forward passes behind the present gradients, for rules that need x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nestling.optim.base import MemoryOptimizer
from nestling.optim.memories import working_dtype
from nestling.optim.replicas import Replicas

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

    Attributes:
        seen: the records by weight, of this process.
        summed: what the inputs of several steps come to, by weight, where a caller has summed the gradients of those
            steps too (`InputOptimizer.take_inputs`); it then stands in place of `seen`.
    """

    def __init__(self, model: nn.Module, record: Record, replicas: Replicas) -> None:
        """Args: whose layers; what to keep of a call (`record_gram` or `record_pairs`); whose gradients are one."""
        self.record, self.replicas = record, replicas
        self.seen: dict[Tensor, Seen] = {}
        self.summed: dict[Tensor, Tensor] = {}
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        # Numbers and not the weights, which a copy of this would copy.
        self.watched = frozenset(id(layer.weight) for layer in layers)
        # Parameters as they are now: FSDP2 shows a layer another tensor during its forward pass.
        self.handles = [layer.register_forward_hook(self._hook(layer.weight)) for layer in layers]

    def of(self, weight: Tensor) -> Seen | None:
        """The record of a weight, None where no layer used it."""
        seen = self.seen.get(weight)
        return seen if seen is not None and seen.tokens else None

    def watches(self, weight: Tensor) -> bool:
        """Whether it is the weight of a layer of the model, used or not."""
        return id(weight) in self.watched

    def clear(self) -> None:
        """Forget everything recorded."""
        self.seen.clear()
        self.summed.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.clear()

    def _hook(self, weight: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if not (torch.is_grad_enabled() and weight.requires_grad and output.requires_grad):
                return
            self.replicas.check_forward()
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

    def take_inputs(self, last: bool) -> dict[Tensor, Tensor]:
        """What the inputs behind the present gradients come to, for a caller that sums the gradients of several steps,
        sums this likewise, and steps with both (`give_inputs`). The inputs are forgotten.

        Args:
            last: whether these are the last gradients before that step.

        Returns:
            by parameter, a tensor that adds up as gradients do, the same on all processes that share the gradients;
            nothing for a parameter without gradient.
        """
        raise NotImplementedError

    def give_inputs(self, inputs: dict[Tensor, Tensor]) -> None:
        """For the next step, sums of what `take_inputs` gave."""
        self.layers.summed = dict(inputs)

    def _stepped(self) -> None:
        self.layers.clear()


def check_reduction(reduction: Reduction) -> None:
    """Raise a ValueError for a reduction of the loss that is neither "mean" nor "sum"."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')


def mean_gram(layers: LayerInputs, weight: Tensor, reduction: Reduction) -> Tensor | None:
    """Sum of x x^T over all tokens, of all processes, over their number (for `reduction="mean"`).

    None where no process has a token, or the weight is of no layer. Every process that shares the weight's gradient
    must call it, also one whose own tokens missed the layer.
    """
    seen = layers.of(weight)
    if not layers.watches(weight) or (seen is None and not layers.replicas.groups(weight)):
        return None
    if seen is None:
        gram = torch.zeros(weight.shape[-1], weight.shape[-1], dtype=working_dtype(weight.dtype), device=weight.device)
        tokens = 0
    else:
        assert seen.gram is not None
        gram, tokens = seen.gram, seen.tokens
    if layers.replicas.groups(weight):
        gram = layers.replicas.add_up(gram.clone(), weight)
        tokens = int(layers.replicas.add_up(torch.tensor(tokens, device=gram.device), weight))
    if not tokens:
        return None
    return gram / tokens if reduction == "mean" else gram
