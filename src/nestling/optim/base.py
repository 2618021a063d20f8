"""What all memory optimizers share: the step around the equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from nestling.errors import NonFiniteGradientError
from nestling.optim.elementwise import adamw_directions
from nestling.optim.matrices import kind_of
from nestling.optim.memories import Memories, working_dtype
from nestling.optim.noise_scale import KEYS
from nestling.optim.saved_state import Layout, check_state, copied_state, layouts
from nestling.optim.shards import all_finite, local

OnNonfinite = Literal["raise", "skip"]
Group = dict[str, Any]

OPTIONAL = {"param_names", "initial_lr", "level", "level_period", "level_elapsed", *KEYS}
"""What torch, its schedulers and `MultiFrequency` write into groups: a saved one need not have it."""


class MemoryOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step is p <- (1 - lr weight_decay) p - lr d, with d from `_directions`.

    It holds what does not depend on the equation: groups, closures, `maximize`, decoupled weight decay, what happens
    to gradients that are not finite, state in float32 for half-precision parameters, exact `state_dict`s, and
    parameters that FSDP2 has spread. Sparse gradients and complex parameters are refused; parameters without a gradient
    are left alone.

    The learning rate multiplies the memory's output and is not folded into the memory, where the papers often write it:
    both are the same at a constant rate, and so a schedule acts at once, as in `torch.optim.SGD`.

    Attributes:
        adamw_for_rest: whether parameters of kind "elementwise" take AdamW's step, with `adamw_betas` and `adamw_eps`
            of their group, because the equation needs a matrix.
    """

    adamw_for_rest = False

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        """Args: as torch's; `defaults` holds the equation's settings and the shared ones of `shared_settings`.

        Raises:
            ValueError: a setting outside its range, or a complex parameter.
        """
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, with the same checks as the constructor."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss.

        Raises:
            NonFiniteGradientError: a gradient holds NaN or infinity and `on_nonfinite="raise"`. Nothing has changed
            then. ValueError: a gradient is sparse, or a rate is NaN or infinite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if not self._may_step(work):
            return loss
        for group, parameters in work:
            each = [parameters] if group["foreach"] else [[p] for p in parameters]
            for some in filter(None, each):
                self._step_together(group, some)
        self._stepped()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, in the precision the state is kept in (torch casts to the parameter's).

        Raises:
            ValueError: a state of another optimizer, or of parameters of other shapes. Nothing has changed then.
        """
        taken: list[tuple[dict[str, Any], dict[int, Layout | None]]] = []
        # Last of the hooks, so that it sees what the others (a distributed wrapper's, say) made of the dictionary.
        hook = self.register_load_state_dict_pre_hook(lambda _, state: taken.append((state, self.checked(state))))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved, kept = taken[0]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for (number, layout), parameter in zip(kept.items(), parameters, strict=True):
            for name, value in saved["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    like = value if layout is None else layout.values[name]
                    self.state[parameter][name] = value.detach().clone().to(parameter.device, like.dtype)

    def checked(self, state_dict: dict[str, Any]) -> dict[int, Layout | None]:
        """What is kept of each parameter in `state_dict`, by its number there (`nestling.optim.saved_state.layouts`).

        Raises:
            ValueError: a state of another optimizer, or of parameters of other shapes.
        """
        groups = state_dict["param_groups"]
        for own, saved in zip(self.param_groups, groups, strict=False):
            if missing := own.keys() - saved.keys() - OPTIONAL:
                raise ValueError(
                    f"the saved state is not one of {type(self).__name__}: its groups have no {min(missing)!r}; load "
                    "it into the optimizer that saved it, or begin without it"
                )
        kept = layouts(self, groups, lambda twin: cast(MemoryOptimizer, twin).step_alone())
        check_state(self, state_dict["state"], kept, exact=True)
        return kept

    @torch.no_grad()
    def step_alone(self) -> None:
        """A step of the equation with none of what is around it, for `layouts`."""
        for group in self.param_groups:
            self._step_together(group, group["params"])

    def __getstate__(self) -> dict[str, Any]:
        """See `copied_state`: a copy goes on as the original would."""
        return copied_state(self)

    def _directions(self, group: Group, memories: Memories, gradients: list[Tensor]) -> list[Tensor]:
        """The equation: d of every parameter, local parts, which are only read afterwards.

        Args:
            group: settings.
            memories: the parameters and their state.
            gradients: local parts, at least float32, sign turned for `maximize`; read only.
        """
        raise NotImplementedError

    def _stepped(self) -> None:
        """Called at the end of a step that took place."""

    def _may_step(self, work: list[tuple[Group, list[Tensor]]]) -> bool:
        for group, parameters in work:
            if not math.isfinite(rate := float(group["lr"])):
                raise ValueError(f"a group has the learning rate {rate}; look at who sets it, a scheduler for instance")
            for p in parameters:
                if p.grad is not None and p.grad.layout != torch.strided:
                    name = type(self).__name__
                    raise ValueError(
                        f"{name} takes no sparse gradients; make the embedding with sparse=False, or leave its "
                        "weight to torch.optim.SparseAdam"
                    )
        if all_finite([p.grad for _, parameters in work for p in parameters if p.grad is not None]):
            return True
        if any(group["on_nonfinite"] == "raise" for group, _ in work):
            raise NonFiniteGradientError(
                'a gradient holds NaN or infinity; nothing was updated. Lower the rate, or give on_nonfinite="skip" to '
                "leave such steps out"
            )
        return False

    def _step_together(self, group: Group, parameters: list[Tensor]) -> None:
        """One update of parameters of one group: by the equation, or by AdamW where that has no matrix to work on."""
        kinds = [kind_of(p, group.get("kind", "auto")) for p in parameters]
        for rest in (False, True):
            chosen = [i for i, kind in enumerate(kinds) if (self.adamw_for_rest and kind == "elementwise") == rest]
            if not chosen:
                continue
            some = [parameters[i] for i in chosen]
            memories = Memories(some, [self.state[p] for p in some], [kinds[i] for i in chosen])
            memories.count()
            gradients = [_gradient(p, group["maximize"]) for p in some]
            directions = (adamw_directions if rest else self._directions)(group, memories, gradients)
            _descend(some, directions, float(group["lr"]), group["weight_decay"])


def shared_settings(
    lr: float | Tensor,
    weight_decay: float,
    maximize: bool,
    foreach: bool,
    on_nonfinite: OnNonfinite,
) -> Group:
    """The settings of every memory optimizer, as group defaults.

    Args:
        lr: step size.
        weight_decay: decoupled, multiplied by `lr`.
        maximize: go up.
        foreach: take all parameters of a group together. Faster; one at a time needs less memory at once.
        on_nonfinite: what a gradient with NaN or infinity does: raise an error, or skip the step. Either way parameters
            and state stay as they were.
    """
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "maximize": maximize,
        "foreach": foreach,
        "on_nonfinite": on_nonfinite,
    }


def check_range(name: str, value: float, low: float, high: float = float("inf"), open_end: bool = False) -> None:
    """Raise a ValueError that names the argument unless low <= value <= high (< high for an open end)."""
    if not (low <= value <= high) or (open_end and value == high):
        raise ValueError(f"{name} must be in [{low}, {high}{')' if open_end else ']'}, got {value}")


def _check_group(group: Group) -> None:
    check_range("lr", float(group["lr"]), 0.0)
    check_range("weight_decay", group["weight_decay"], 0.0)
    if group["on_nonfinite"] not in ("raise", "skip"):
        raise ValueError(f'on_nonfinite must be "raise" or "skip", got {group["on_nonfinite"]!r}')
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is {p.dtype}; only real floating-point parameters can be "
                "trained (keep a complex one as torch.view_as_real)"
            )


def _gradient(parameter: Tensor, maximize: bool) -> Tensor:
    assert parameter.grad is not None
    part = local(parameter.grad)
    part = part.to(working_dtype(part.dtype))
    return -part if maximize else part


def _descend(parameters: list[Tensor], directions: list[Tensor], lr: float, weight_decay: float) -> None:
    """p <- (1 - lr weight_decay) p - lr d, rounded once for half precision."""
    whole_precision, steps = [], []
    for parameter, direction in zip(parameters, directions, strict=True):
        part = local(parameter)
        if part.dtype == direction.dtype:
            whole_precision.append(part)
            steps.append(direction)
        else:
            part.copy_(part.to(direction.dtype).mul_(1 - lr * weight_decay).add_(direction, alpha=-lr))
    if whole_precision:
        if weight_decay:
            torch._foreach_mul_(whole_precision, 1 - lr * weight_decay)
        torch._foreach_add_(whole_precision, steps, alpha=-lr)
