"""What a nested system is made of: components, their frequencies, levels of them, and transfers between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["query", "token", "item", "step", "never"]
Context = Literal["tokens", "gradients", "samples"]
Kind = Literal["attention", "fast weights", "optimizer state", "parameters"]
TransferKind = Literal["parametric", "non-parametric", "backpropagation", "initialisation", "generation"]

_SPEED: dict[Unit, int] = {"query": 0, "token": 1, "item": 1, "step": 2, "never": 3}


@dataclass(frozen=True)
class Frequency:
    """How often a component is updated (NL Definition 2).

    Attributes:
        unit: what `period` counts. "query": a non-parametric solution is found anew for every query, frequency
            infinity; "never" is frequency 0, and `period` then means nothing for either. A step of the optimizer reads
            whole sequences, so everything that is updated by the token (or by the item of another context) is faster
            than all that is updated by the step.
        period: tokens or steps between two updates.
    """

    unit: Unit
    period: int = 1

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is faster."""
        return _SPEED[self.unit], 0 if self.unit in ("query", "never") else self.period

    def __str__(self) -> str:
        if self.unit in ("query", "never"):
            return "∞" if self.unit == "query" else "0"
        return f"1 / {self.unit}" if self.period == 1 else f"1 / {self.period:,} {self.unit}s"


@dataclass(frozen=True, kw_only=True)
class Component:
    """One optimization problem of a system: its objective, its context and its parameters (NL Definition 3).

    Attributes:
        name: unique in its system.
        kind: "attention" for non-parametric solutions, "fast weights", "optimizer state" or "parameters".
        frequency: of updates.
        context: what flows in: tokens, the gradients of other parameters, or samples of the training data.
        objective: what it minimises.
        rule: how.
        copies: how many such components stand side by side, in blocks of the model or among parameters.
        parameters: trainable numbers.
        parameter_bytes: of these.
        state: other numbers it holds: fast weights of one row, or an optimizer's.
        state_bytes: of these.
        growth: further numbers with every token of a row.
        feeds: names of components whose update needs this one's state at the same time. At equal frequency this is
            what makes it the faster one.
    """

    name: str
    kind: Kind
    frequency: Frequency
    context: Context
    objective: str
    rule: str
    copies: int = 1
    parameters: int = 0
    parameter_bytes: int = 0
    state: int = 0
    state_bytes: int = 0
    growth: int = 0
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class SystemLevel:
    """The components that share a frequency and do not wait for one another.

    Attributes:
        index: from 1, the fastest, as in Definition 2. (The paper's figures count the other way round, from the
            outermost loop.)
        frequency: of all components.
        components: in no order.
    """

    index: int
    frequency: Frequency
    components: tuple[Component, ...]


@dataclass(frozen=True)
class Transfer:
    """Knowledge that passes from one component to another (NL section 3.3).

    Attributes:
        source, target: names of components.
        kind: "parametric" (Eq. 24-26: the target's computation is conditioned on the source's state), "non-parametric"
            (Eq. 27), "backpropagation" (one gradient flow through both), "initialisation" (Eq. 28: the target starts
            from what the source has learned) or "generation" (the source makes the target's weights or its context).
        what: what passes.
    """

    source: str
    target: str
    kind: TransferKind
    what: str


def count_text(count: int, size: int) -> str:
    """`1.2 k (4.8 kB)`, or nothing for nothing."""
    return f"{_short(count)} ({_short(size)}B)" if count else ""


def state_text(component: Component) -> str:
    """What a component holds beside parameters."""
    parts = [count_text(component.state, component.state_bytes)] if component.state else []
    if component.growth:
        parts.append(f"{_short(component.growth)} a token")
    return " + ".join(parts)


def _short(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000 or unit == " G":
            return f"{number:.0f}{unit}" if number >= 100 or not unit else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError
