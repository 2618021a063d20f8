"""What linear layers saw in the forward passes behind the present gradients, for rules that need x."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from nestling.optim.base import Group, MemoryOptimizer
from nestling.optim.memories import working_dtype
from nestling.optim.replicas import Replicas

Record = Callable[["Seen", Tensor, Tensor], None]
Reduction = Literal["mean", "sum"]


@dataclass
class Seen:
    """Of one weight, since its gradient was last cleared.

    Attributes:
        tokens: inputs counted.
        gram: their sum of x x^T, `[in, in]`, where Gram matrices are recorded; of dL/dy dL/dy^T, `[out, out]`, where
            surprises are.
        product: their sum of dL/dy x^T, `[out, in]`, where surprises are recorded.
        inputs, output_gradients: `[n, in]` and `[n, out]` of every backward pass, where pairs are recorded.
        factor: of the output gradients, where it is known before the step; see `GeneralizedGradientDescent`.
    """

    tokens: int = 0
    factor: Tensor | None = None
    gram: Tensor | None = None
    product: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    output_gradients: list[Tensor] = field(default_factory=list)


def record_gram(seen: Seen, x: Tensor, gradient: Tensor) -> None:
    """Add x^T x: `[in, in]` numbers, however many tokens."""
    gram = x.mT @ x
    seen.gram = gram if seen.gram is None else seen.gram.add_(gram)


def record_surprises(seen: Seen, x: Tensor, gradient: Tensor) -> None:
    """Add the output gradients' Gram matrix `[out, out]`, and their product with the inputs `[out, in]`."""
    gram, product = gradient.mT @ gradient, gradient.mT @ x
    seen.gram = gram if seen.gram is None else seen.gram.add_(gram)
    seen.product = product if seen.product is None else seen.product.add_(product)


def record_pairs(seen: Seen, x: Tensor, gradient: Tensor) -> None:
    """Keep every x and its output's gradient: in + out numbers a token.

    That gradient is the backward pass's own: what is done to `.grad` afterwards (clipping, a scaler's division, an
    average over processes) is not in it.
    """
    seen.inputs.append(x)
    seen.output_gradients.append(gradient)


class LayerHook:
    """The forward hook on one linear layer: it hands the layer's inputs to a `LayerInputs`, or does nothing.

    It belongs to the model, which is copied and pickled with it, and knows the `LayerInputs` by a weak reference that
    copies leave out. So a copy of a model alone, or a model whose optimizer is gone, records nothing; and where an
    optimizer is copied together with its model, the copied `LayerInputs` connects the copied hooks.

    Attributes:
        weight: the layer's, as it was when the hook was made: FSDP2 shows a layer another tensor during its forward
            pass.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._owner: weakref.ref[LayerInputs] | None = None

    def connect(self, owner: LayerInputs | None) -> None:
        """Hand inputs to `owner` from now on; None: to nobody."""
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """As torch calls a forward hook with keywords."""
        owner = None if self._owner is None else self._owner()
        if owner is None or not isinstance(output, Tensor):
            return
        if torch.is_grad_enabled() and self.weight.requires_grad and output.requires_grad:
            owner.before_backward(self.weight, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHook, (self.weight,)


class LayerInputs:
    """Hooks on the `nn.Linear` layers of a model.

    Only tokens through which a gradient flows count: padding and what does not enter the loss have no target. Nothing
    is recorded without a gradient (evaluation, frozen weights). Records last until `clear`, or until the next forward
    pass finds the weight's gradient gone or zero, as `model.zero_grad()` leaves it.

    A copy has no records, as copied parameters have no gradients.

    Attributes:
        seen: the records by weight, of this process.
        summed: what the inputs of several steps come to, by weight, where a caller has summed the gradients of those
            steps too (`InputOptimizer.take_inputs`); it then stands in place of `seen`.
        watched: ids of the weights whose layers are watched.
        arrived: ids of those spread by FSDP2 that got a gradient since `clear`.
    """

    def __init__(self, model: nn.Module, record: Record, replicas: Replicas) -> None:
        """Args: whose layers; what to keep of a call (`record_gram` or another); whose gradients are one."""
        self.record, self.replicas = record, replicas
        self.seen: dict[Tensor, Seen] = {}
        self.summed: dict[Tensor, Tensor] = {}
        # A layer with a parametrized weight has none of its own: it is computed anew for each pass.
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m._parameters.get("weight") is not None]
        self.hooks = [LayerHook(layer.weight) for layer in layers]
        self.handles = [
            layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in zip(layers, self.hooks, strict=True)
        ]
        self.watched: set[int] = set()
        self.arrived: set[int] = set()

    def watch(self, weights: Iterable[Tensor]) -> None:
        """Record the inputs of the layers that these parameters are the weights of."""
        wanted = {id(weight) for weight in weights}
        for hook in self.hooks:
            if id(hook.weight) in wanted:
                self.watched.add(id(hook.weight))
                hook.connect(self)
                if isinstance(hook.weight, DTensor):
                    self.handles.append(hook.weight.register_post_accumulate_grad_hook(_Arrival(self)))

    def of(self, weight: Tensor) -> Seen | None:
        """The record of a weight, None where no layer used it."""
        seen = self.seen.get(weight)
        return seen if seen is not None and seen.tokens else None

    def watches(self, weight: Tensor) -> bool:
        """Whether it is the weight of a watched layer, used or not."""
        return id(weight) in self.watched

    def clear(self) -> None:
        """Forget everything recorded."""
        self.seen.clear()
        self.summed.clear()
        self.arrived.clear()

    def remove(self) -> None:
        """Take the hooks off the model; those of a copy stay there and do nothing."""
        for hook in self.hooks:
            hook.connect(None)
        for handle in self.handles:
            handle.remove()
        self.clear()

    def before_backward(self, weight: Tensor, x: Tensor, output: Tensor) -> None:
        """A layer was called: record its inputs when the gradient of its output comes."""
        self.replicas.check_forward()
        if weight in self.seen and self._was_cleared(weight):
            del self.seen[weight]
            self.arrived.discard(id(weight))
        x = x.detach()
        output.register_hook(lambda gradient: self._backward(weight, x, gradient))

    @torch.no_grad()
    def _backward(self, weight: Tensor, x: Tensor, gradient: Tensor) -> None:
        dtype = working_dtype(weight.dtype)
        x, gradient = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (x, gradient))
        counted = gradient.ne(0).any(-1)
        seen = self.seen.setdefault(weight, Seen())
        seen.tokens += int(counted.sum())
        self.record(seen, x[counted].to(dtype), gradient[counted].to(dtype))

    def _was_cleared(self, weight: Tensor) -> bool:
        """Whether the gradient behind a record was thrown away, by `model.zero_grad()` for instance."""
        if torch._C._current_graph_task_id() != -1:  # a checkpointed layer runs again inside the backward pass
            return False
        if isinstance(weight, DTensor):
            # FSDP2 may keep gradients to itself over several passes. And one process's part may well be zero.
            return weight.grad is None and id(weight) in self.arrived
        return weight.grad is None or not bool(weight.grad.any())

    def __getstate__(self) -> dict[str, Any]:
        watched = [hook.weight for hook in self.hooks if self.watches(hook.weight)]
        return {"record": self.record, "replicas": self.replicas, "hooks": self.hooks, "watched": watched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.record, self.replicas, self.hooks = state["record"], state["replicas"], state["hooks"]
        self.seen, self.summed, self.handles, self.watched, self.arrived = {}, {}, [], set(), set()
        self.watch(state["watched"])


class _Arrival:
    """FSDP2 has given a weight its gradient."""

    def __init__(self, owner: LayerInputs) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, weight: Tensor) -> None:
        if (owner := self._owner()) is not None:
            owner.arrived.add(id(weight))


class InputOptimizer(MemoryOptimizer):
    """A memory optimizer whose rule needs the inputs of linear layers; what was recorded lasts until the step.

    A copy that is made together with the model watches the copied model; one that is made alone watches nothing, since
    its parameters are of no model.

    Attributes:
        layers: what the layers saw.
    """

    layers: LayerInputs

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        model: nn.Module,
        record: Record,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        """Args: as of `MemoryOptimizer`; whose layers are watched, and what to record; whose gradients are one."""
        super().__init__(params, defaults)
        self.layers = LayerInputs(model, record, Replicas(process_group))
        for group in self.param_groups:
            self.layers.watch(group["params"])

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, with the same checks as the constructor; its layers are watched from now on."""
        super().add_param_group(param_group)
        if "layers" in vars(self):  # not in the base class's constructor, which may still refuse a setting
            self.layers.watch(self.param_groups[-1]["params"])

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

    def inputs_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Of what `take_inputs` gives for a weight."""
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


def scale_between(gradient: Tensor, of_tokens: Tensor) -> Tensor:
    """The factor, 0 or more, that takes the tokens' own gradient nearest to `gradient`; 1 where they have none."""
    if not of_tokens.numel():
        return of_tokens.new_ones(())
    # Of the size of 1, since squares of tiny gradients underflow and of scaled ones overflow.
    size = of_tokens.abs().max()
    unit = of_tokens / torch.where(size > 0, size, 1.0)
    square = unit.square().sum()
    return torch.where(square > 0, (gradient * unit).sum().clamp(min=0) / (size * square), 1.0)
