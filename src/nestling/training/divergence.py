"""Finding what broke when a loss is no longer a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nestling.errors import UserError
from nestling.memory.state import State


class DivergenceError(UserError):
    """The loss, a gradient or a parameter became NaN or infinite.

    Attributes:
        step: the optimizer step, counted from 1, that was being computed.
        where: the layer and the tensor that broke first.
    """

    def __init__(self, step: int, where: str, advice: str) -> None:
        super().__init__(f"training stopped at step {step}: {where}; {advice}")
        self.step = step
        self.where = where


@torch.no_grad()
def locate_nonfinite(model: nn.Module, input_ids: Tensor, state: State | None) -> str:
    """Run a batch again and name what breaks first: a parameter, the carried state, or a layer's output or new state.

    Args:
        model: the unwrapped model, called as `model(input_ids=..., past_key_values=..., use_cache=True)`.
        input_ids: the batch whose loss was not finite.
        state: the state it was read with.
    """
    if (name := first_nonfinite(model.named_parameters())) is not None:
        return f"parameter {name} holds NaN or infinity"
    if state is not None and (name := state.first_nonfinite()) is not None:
        return f"the carried state {name} holds NaN or infinity"
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not found and (part := _broken_part(output)) is not None:
            found.append(f"layer {name or 'the model'} ({type(module).__name__}) gave NaN or infinity in its {part}")

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
    ]
    try:
        model(input_ids=input_ids, past_key_values=state, use_cache=True)
    except (ArithmeticError, ValueError, RuntimeError) as error:
        found.append(f"reading the batch again failed ({error})")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself is NaN or infinite although every layer's output is finite"


def locate_nonfinite_gradient(model: nn.Module) -> str:
    """Name the first parameter whose gradient is not finite."""
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    name = first_nonfinite(gradients)
    return f"the gradient of {name} holds NaN or infinity" if name else "the gradient norm overflows"


def first_nonfinite(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _broken_part(output: Any) -> str | None:
    """`output`, or `state NAME`, if some of a module's output is not finite."""
    if isinstance(output, Tensor):
        broken = output.is_floating_point() and not bool(torch.isfinite(output).all())
        return "output" if broken else None
    if isinstance(output, State):
        name = output.first_nonfinite()
        return None if name is None else f"state {name}"
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((part for item in output if (part := _broken_part(item)) is not None), None)
    return None
