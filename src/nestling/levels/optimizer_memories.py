"""The levels of an optimizer: what it keeps for the parameters, how often that and they are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nestling.levels.components import Component, Frequency
from nestling.levels.probe import MANY, ProbeError, StateMemory, probe_optimizer, state_tensors
from nestling.optim import MultiFrequency
from nestling.optim.multi_frequency import ACCUMULATED


@dataclass
class OptimizerPart:
    """Parameters that one optimizer updates at one period.

    Attributes:
        label: name of the level of a `MultiFrequency`, else "".
        period: steps between two updates.
        optimizer: the one that updates.
        parameters: of it.
        total: the gradient sum of a slow level.
        states: the memories of gradients.
        feeds_parameters: names of the states that the parameters' update needs.
        feeds_states: by state, names of the states whose update needs it.
        notes: what could not be found out.
    """

    label: str
    period: int
    optimizer: Optimizer
    parameters: list[Tensor]
    total: Component | None = None
    states: list[Component] = field(default_factory=list)
    feeds_parameters: list[str] = field(default_factory=list)
    feeds_states: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rule_text(self) -> str:
        """The optimizer with its learning rate and decay; a range where groups differ."""
        text = type(self.optimizer).__name__
        for name, words in (("lr", "lr"), ("weight_decay", "decay")):
            values = sorted({float(g[name]) for g in self.optimizer.param_groups if g.get(name) is not None})
            if values and values[-1]:
                text += f", {words} {values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else "")
        return text


def find_optimizer_states(optimizer: Optimizer) -> list[OptimizerPart]:
    """One part for every level of a `MultiFrequency`, one for any other optimizer."""
    if not isinstance(optimizer, MultiFrequency):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parts = [OptimizerPart("", 1, optimizer, parameters)]
    else:
        parts = [OptimizerPart(v.name, v.period, v.optimizer, v.parameters) for v in optimizer.levels]
    for part in parts:
        if part.period > 1:
            part.total = _gradient_sum(part, optimizer.state)
        _find_states(part)
    return parts


def _gradient_sum(part: OptimizerPart, state: Mapping[Tensor, Any]) -> Component:
    held = [state[p][ACCUMULATED] if ACCUMULATED in state.get(p, {}) else None for p in part.parameters]
    count = sum(p.numel() for p in part.parameters)
    size = sum(p.numel() * max(p.element_size(), 4) for p in part.parameters)
    if any(t is not None for t in held):
        count = sum(t.numel() for t in held if t is not None)
        size = sum(t.numel() * t.element_size() for t in held if t is not None)
    return Component(
        name=f"{part.label}: gradient sum",
        kind="optimizer state",
        frequency=Frequency("step"),
        context="gradients",
        objective="−⟨A, g⟩",
        rule=f"A ← A + g; emptied every {part.period:,} steps",
        state=count,
        state_bytes=size,
    )


def _find_states(part: OptimizerPart) -> None:
    """Components for all states of the part's parameters, equal ones of different parameters as one."""
    kinds: dict[StateMemory, list[Tensor]] = {}
    probed: dict[tuple[int, int, bool], tuple[StateMemory, ...]] = {}
    for index, group in enumerate(part.optimizer.param_groups):
        for p in group["params"]:
            key = (index, p.dim(), p.numel() > 1)
            if key not in probed:
                probed[key] = _memories(part, group, p)
            for memory in probed[key]:
                kinds.setdefault(memory, []).append(p)
    names: dict[StateMemory, str] = {}
    for memory in kinds:
        name = f"{part.label}: " * bool(part.label) + f"{type(part.optimizer).__name__} {memory.name}"
        same = sum(other.startswith(name) for other in names.values())
        names[memory] = f"{name} ({same + 1})" if same else name
    for memory, parameters in kinds.items():
        fed = tuple(n for other, n in names.items() if other.name in memory.feeds)
        if memory.period is None:
            part.notes.append(f"{names[memory]} was not seen to change in {MANY} steps; it may be slower than that")
        part.states.append(_state_component(part, memory, names[memory], parameters, fed))
        part.feeds_states[names[memory]] = fed
        if memory.feeds_parameter:
            part.feeds_parameters.append(names[memory])


def _memories(part: OptimizerPart, group: Mapping[str, Any], p: Tensor) -> tuple[StateMemory, ...]:
    """By experiment; where that fails, the tensors that are there, of which no more is known."""
    if p.numel() < 2:
        return ()  # a number has no matrix to try, and its states weigh nothing
    try:
        return probe_optimizer(part.optimizer, group, p)
    except ProbeError as error:
        name = type(part.optimizer).__name__
        part.notes.append(f"{name} could not be tried on a small matrix ({error}); rules of its states are unknown")
        tensors = state_tensors(part.optimizer.state.get(p, {}))
        return tuple(StateMemory(n, 1, t.shape == p.shape, None, None, None, (), True) for n, t in tensors)


def _state_component(
    part: OptimizerPart, memory: StateMemory, name: str, parameters: Sequence[Tensor], fed: tuple[str, ...]
) -> Component:
    count, size = 0, 0
    for p in parameters:
        held = dict(state_tensors(part.optimizer.state.get(p, {}))).get(memory.name)
        if held is None and memory.like_parameter:  # before the first step
            held = p
        count += 0 if held is None else held.numel()
        size += 0 if held is None else held.numel() * held.element_size()
    objective, rule = describe_memory(memory)
    return Component(
        name=name,
        kind="optimizer state",
        frequency=Frequency("step", part.period * memory.period) if memory.period else Frequency("never"),
        context="gradients",
        objective=objective,
        rule=rule,
        copies=len(parameters),
        state=count,
        state_bytes=size,
        feeds=fed,
    )


def describe_memory(memory: StateMemory) -> tuple[str, str]:
    """Objective and rule of a state m. The line m <- a m + b u is gradient descent on

    b/2 |m - u|^2 with 1 - a = b (NL App. B), on -b <m, u> with a = 1 (Eq. 13), and otherwise on the latter with a decay
    of 1 - a (Eq. 100).
    """
    if memory.retention is None or memory.write is None or memory.degree is None:
        return "unknown", "not a line in g or g²"
    a, b, u = memory.retention, memory.write, "g" if memory.degree == 1 else "g²"
    kept = "m" if abs(a - 1) < 1e-9 else "" if abs(a) < 1e-9 else f"{a:.4g} m"
    sign = " − " if b < 0 else " + " if kept else ""
    size = "" if abs(abs(b) - 1) < 1e-9 else f"{abs(b):.4g} "
    many = memory.period is not None and memory.period > 1
    rule = f"m ← {kept}{sign}{size}{'Σ ' if many else ''}{u}"
    if abs(1 - a - b) < 1e-6:
        return f"½|m − {u}|²", rule
    if abs(a - 1) < 1e-9:
        return f"−⟨m, {u}⟩", rule
    return f"−⟨m, {u}⟩ + ½|m|²", rule
