"""Whether a saved state is what an optimizer keeps, found out before it is taken and not at the next step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

OF_TORCH = frozenset(vars(Optimizer([torch.empty(0)], {}))) | {"step", "_opt_called"}
"""Attributes that torch manages itself when an optimizer is copied, and those that its schedulers put on one: a `step`
that is bound to the original, and a note that it was called."""


@dataclass(frozen=True)
class Layout:
    """What an optimizer keeps of a parameter after a step.

    Attributes:
        values: by name; their type, shape and precision count.
        always: the names that are there with the saved settings and with the optimizer's own. A setting that changes
            while it runs (a momentum that falls to 0) leaves names behind, or brings them at the next step only.
        spread: of a parameter that is spread over processes, the names of what has its shape and is spread likewise.
    """

    values: dict[str, Any]
    always: frozenset[str]
    spread: frozenset[str] = frozenset()


def copied_state(optimizer: Optimizer) -> dict[str, Any]:
    """What `copy` and `pickle` take of an optimizer: torch's selection, and the attributes of its own class."""
    return Optimizer.__getstate__(optimizer) | {k: v for k, v in vars(optimizer).items() if k not in OF_TORCH}


def layouts(
    optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], step: Callable[[Optimizer], object] = lambda o: o.step()
) -> dict[int, Layout | None]:
    """What the optimizer keeps of each parameter.

    It is found by a step of a copy on a parameter of that shape, on the "meta" device where nothing is computed.

    Args:
        optimizer: any; neither it nor its parameters change.
        groups: of a saved `state_dict`: their settings, and numbers for its parameters.
        step: one step of the copy.

    Returns:
        by those numbers; None where the copy cannot step, as of an optimizer that needs a closure. Empty where the
        groups are of other sizes than the optimizer's.
    """
    own = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        return {}
    found: dict[int, Layout | None] = {}
    known: dict[Any, Layout | None] = {}
    for place, (group, saved) in enumerate(zip(own, groups, strict=True)):
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            key = place, parameter.shape, parameter.dtype, parameter.device, isinstance(parameter, DTensor)
            if key not in known:
                now = then = _after_a_step(optimizer, group, parameter, step)
                if any(name != "params" and not _same(group.get(name), value) for name, value in saved.items()):
                    then = _after_a_step(optimizer, {**group, **saved}, parameter, step)
                known[key] = None
                if now is not None and then is not None:
                    values = now | then
                    spread = _spread(optimizer, group, parameter, step, values)
                    known[key] = Layout(values, frozenset(now.keys() & then.keys()), spread)
            found[number] = known[key]
    return found


def _same(a: object, b: object) -> bool:
    """Whether two settings are known to be one."""
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str | tuple) and a == b)


def _after_a_step(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, step: Callable[[Optimizer], object]
) -> dict[str, Any] | None:
    for device in (torch.device("meta"), parameter.device):
        probe = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device, requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        twin = object.__new__(type(optimizer))
        own = {"state": defaultdict(dict), "param_groups": [{**group, "params": [probe]}]}
        try:
            twin.__setstate__(copied_state(optimizer) | own)
            step(twin)
        except Exception:  # any code of any optimizer, which has its own reasons
            continue
        return dict(twin.state[probe])
    return None


def _spread(
    optimizer: Optimizer,
    group: dict[str, Any],
    parameter: Tensor,
    step: Callable[[Optimizer], object],
    values: Mapping[str, Any],
) -> frozenset[str]:
    """A square memory of a square parameter is not spread: what is has twice the rows where the parameter has."""
    if not isinstance(parameter, DTensor):
        return frozenset()
    longer = torch.empty((2 * parameter.shape[0], *parameter.shape[1:]), dtype=parameter.dtype, device="meta")
    then = _after_a_step(optimizer, group, longer, step) or {}
    return frozenset(
        name
        for name, value in values.items()
        if _kind(value) == _kind(parameter) and _kind(then.get(name, longer)) == _kind(longer)
    )


def check_state(
    optimizer: Optimizer, state: Mapping[Any, Mapping[str, Any]], kept: Mapping[int, Layout | None], exact: bool
) -> None:
    """Whether `state` is one that `optimizer` could have saved.

    Args:
        optimizer: for the message, and its parameters.
        state: of a saved `state_dict`.
        kept: see `layouts`.
        exact: whether more than is kept is wrong too. Some optimizers begin to keep things after the first step.

    Raises:
        ValueError: a name is missing or one too many, or a value has another type or shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for (number, layout), parameter in zip(kept.items(), parameters, strict=False):
        saved = state.get(number)
        if layout is None or not saved:
            continue
        of = f"the saved state is not one of {type(optimizer).__name__}: of a parameter of shape {_shape(parameter)} "
        if missing := layout.always - saved.keys():
            raise ValueError(f"{of}it has no {min(missing)!r}")
        if exact and (more := [str(name) for name in saved if name not in layout.values]):
            raise ValueError(f"{of}it has {min(more)!r}, which this optimizer does not keep")
        for name in layout.values.keys() & saved.keys():
            if (wanted := _kind(layout.values[name])) != (found := _kind(saved[name])):
                raise ValueError(f"{of}it has {found} for {name!r}, and not {wanted}")
            if name in layout.spread and not isinstance(saved[name], DTensor):
                raise ValueError(
                    f"{of}it has a whole tensor for {name!r}, and the parameter is spread over processes: save and "
                    "load with torch.distributed.checkpoint"
                )


def _kind(value: object) -> str:
    """What a step minds. A number may be a tensor of one."""
    if isinstance(value, Tensor) and value.dim():
        return f"a tensor of shape {_shape(value)}"
    if isinstance(value, Tensor | int | float):
        return "a number"
    return f"a {type(value).__name__}"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
