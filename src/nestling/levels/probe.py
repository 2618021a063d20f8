"""What an optimizer keeps for a parameter and how it learns it, found by experiment on a small matrix of its own.

An optimizer's states are memories of gradients (NL section 4), but nothing in `torch.optim.Optimizer` says how often
one is updated, from what, or what depends on it. So a twin with the same settings takes steps on a small parameter, and
the answers are read from what changes. The real optimizer, its parameters and its states are not touched.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LARGEST = 6
"""Largest side of the small parameter: the answers do not depend on it, the time does."""
FEW, MANY = 6, 600
"""Steps that show a state of period 1, and the most that are taken to find a longer period."""
RATE = 0.01
CLOSE = 1e-6


@dataclass(frozen=True)
class StateMemory:
    """A state tensor, as a memory m of the gradients g.

    Attributes:
        name: its key in `optimizer.state[p]`.
        period: steps between two updates; None if it was not seen to change.
        like_parameter: it has its parameter's shape.
        retention: a in m <- a m + b g^degree; None if the update is no such line.
        write: b, for a gradient of every step of the period.
        degree: 1 or 2.
        feeds: states whose update needs this one's.
        feeds_parameter: the parameter's update needs it.
    """

    name: str
    period: int | None
    like_parameter: bool
    retention: float | None
    write: float | None
    degree: int | None
    feeds: tuple[str, ...]
    feeds_parameter: bool


class ProbeError(RuntimeError):
    """The optimizer could not be tried on a parameter of its own; the message says why."""


def probe_optimizer(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> tuple[StateMemory, ...]:
    """The states `optimizer` keeps for a parameter of this group and shape.

    Args:
        optimizer: any; its settings are copied, with all but its states and parameters.
        group: one of its parameter groups.
        parameter: whose number of dimensions and device count; its sides are cut to `LARGEST`.

    Raises:
        ProbeError: the optimizer does not work away from its own parameters.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return _Experiment(optimizer, group, parameter).run()
    except Exception as error:  # an optimizer is arbitrary code
        raise ProbeError(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error


class _Experiment:
    """A twin of an optimizer, on one small parameter."""

    def __init__(self, optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> None:
        shape = [min(side, LARGEST) for side in parameter.shape]
        draw = torch.Generator().manual_seed(0)
        self.gradient = (0.5 + torch.rand(shape, generator=draw, dtype=torch.float64)).to(parameter.device)
        self.gradient *= torch.where(torch.rand(shape, generator=draw) < 0.5, -1.0, 1.0).to(parameter.device)
        self.p = nn.Parameter(torch.ones_like(self.gradient))
        memo = {id(p): p for g in optimizer.param_groups for p in g["params"]}
        skip = {"state", "param_groups", "step"}  # a scheduler leaves a patched `step` on the object
        settings = {k: v for k, v in vars(optimizer).items() if k not in skip and not k.startswith("_optimizer_")}
        self.twin: Optimizer = object.__new__(type(optimizer))
        own = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
        own |= {"params": [self.p]} | ({"lr": RATE} if "lr" in own else {})
        if isinstance(group.get("lr"), Tensor):
            own["lr"] = torch.full_like(group["lr"], RATE)
        state: defaultdict[Any, Any] = defaultdict(dict)
        self.twin.__setstate__(copy.deepcopy(settings, memo) | {"state": state, "param_groups": [own]})

    def run(self) -> tuple[StateMemory, ...]:
        changes = self._changes()
        # What is seen first was made, which may be another step than an update: two changes after it say a period.
        periods = {n: times[-1] - times[-2] if len(times) > 2 else None for n, times in changes.items()}
        due = [(times[-1], p) for times, p in zip(changes.values(), periods.values(), strict=True) if p is not None]
        # A whole period with one gradient, then up to just before a step at which every state is updated.
        for _ in range(max((p for _, p in due), default=0)):
            self._step()
        while self.steps < 3 * MANY and any((self.steps + 1 - last) % p for last, p in due):
            self._step()
        before = self._save()
        found = {name: self._follow(before, name) for name in periods}
        return tuple(self._describe(before, name, periods[name], *found[name]) for name in periods)

    def _changes(self) -> dict[str, list[int]]:
        """The steps at which every state tensor changed, with gradients that vary in size and sign."""
        changes: dict[str, list[int]] = {}
        last: dict[str, Tensor] = {}
        self.steps = 0
        while self.steps < FEW or (self.steps < MANY and not all(_regular(c, self.steps) for c in changes.values())):
            self._step(math.cos(2.0 * self.steps))
            now = {name: t.detach().clone() for name, t in self._tensors()}
            for name, t in now.items():
                past = changes.setdefault(name, [])
                if name not in last or not torch.equal(last[name], t):
                    past.append(self.steps)
            last = now
        return changes

    def _follow(self, before: dict[str, Any], name: str) -> tuple[float | None, tuple[str, ...], bool]:
        """Retention of a state, and what else a small change of it changes."""
        self._load(before)
        self._step()
        plain = self._values()
        self._load(before)
        state = dict(self._tensors())[name]
        change = 1e-3 * (1 + torch.rand(state.shape, generator=torch.Generator().manual_seed(1)).to(state.device))
        with torch.no_grad():
            state.add_(change.to(state.dtype))
        self._step()
        other = self._values()
        moved = {n: (other[n] - plain[n]).abs().max() > 1e-12 for n in plain if n in other}
        ratio = (other[name] - plain[name]) / change
        feeds = tuple(n for n, m in moved.items() if m and n not in (name, ""))
        return _constant(ratio), feeds, bool(moved[""])

    def _describe(
        self,
        before: dict[str, Any],
        name: str,
        period: int | None,
        retention: float | None,
        feeds: tuple[str, ...],
        feeds_parameter: bool,
    ) -> StateMemory:
        self._load(before)
        old = dict(self._tensors())[name].detach().clone()
        with torch.no_grad():
            self.p.zero_()  # so that a weight decay inside the gradient is nothing
        # A gradient of another direction shows what only looked like a line; a slow state has summed the old one.
        turn = torch.rand(self.gradient.shape, generator=torch.Generator().manual_seed(2)).to(self.gradient) + 0.5
        gradient = self.gradient * turn if period == 1 else self.gradient
        self._step(gradient / self.gradient)
        new = dict(self._tensors())[name].detach()
        write, degree = None, None
        if old.shape == self.gradient.shape and retention is not None:
            for power in (1, 2):
                slope = _constant((new - retention * old) / gradient**power)
                if slope is not None and abs(slope) > CLOSE:
                    write, degree = slope / (period or 1), power
                    break
        line = degree is not None
        like = old.shape == self.gradient.shape
        kept = None if retention is None or not line else round(retention, 9)
        write = None if write is None else round(write, 9)
        return StateMemory(name, period, like, kept, write, degree, feeds, feeds_parameter)

    def _step(self, scale: float | Tensor = 1.0) -> None:
        self.steps += 1
        self.p.grad = self.gradient * scale
        type(self.twin).step(self.twin)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from state_tensors(self.twin.state[self.p])

    def _values(self) -> dict[str, Tensor]:
        """Copies of the states, and of the parameter under the empty name."""
        return {name: t.detach().clone() for name, t in self._tensors()} | {"": self.p.detach().clone()}

    def _save(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self.twin).items() if not k.startswith("_optimizer_")}
        return copy.deepcopy({"twin": kept, "p": self.p, "steps": self.steps})

    def _load(self, saved: dict[str, Any]) -> None:
        again = copy.deepcopy(saved)
        self.p, self.steps = again["p"], again["steps"]
        vars(self.twin).update(again["twin"])


def state_tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor of more than one number in a parameter's state, with its dotted name."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and state.dim() > 0 and state.numel() > 1:
            yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from state_tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from state_tensors(value, f"{name}.{i}")


def _regular(times: list[int], now: int) -> bool:
    """Whether the changes so far show a period."""
    if len(times) >= FEW - 1:
        return True
    if len(times) < 3:
        return False
    last, before = times[-1] - times[-2], times[-2] - times[-3]
    return last == before and now - times[-1] <= last


def _constant(values: Tensor) -> float | None:
    """The one value of all entries, or None."""
    middle = float(values.median())
    spread = float((values - middle).abs().max())
    return middle if spread <= 1e-4 * max(abs(middle), 1e-2) else None
