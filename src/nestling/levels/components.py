"""What a nested system is made of: components, their frequencies, levels of them, and transfers between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Unit = Literal["query", "token", "item", "step", "never"]
Context = Literal["tokens", "gradients", "samples"]
Kind = Literal["attention", "fast weights", "optimizer state", "parameters"]
TransferKind = Literal["parametric", "non-parametric", "backpropagation", "initialisation", "generation"]


@dataclass(frozen=True)
class Frequency:
    """How often a component is updated (NL Definition 2).

    Definition 2 counts updates in a unit of time that all components share. Here that is one step of the optimizer:
    `rate` is updates a step. A memory with a period of 512 tokens is slower than weights that move at every step if a
    row reads 256 tokens a step, and faster if it reads 2,048.

    Attributes:
        unit: what `period` counts. "query": a non-parametric solution is found anew for every query, frequency
            infinity; "never" is frequency 0, and `period` then means nothing for either.
        period: tokens, items of another context, or steps between two updates.
        per_step: tokens or items that pass in one step (of one row: rows of a batch have memories of their own); None
            if that is not known. Means nothing for the other units.
    """

    unit: Unit
    period: int = 1
    per_step: int | None = None

    @property
    def rate(self) -> Fraction | float | None:
        """Updates in one step: infinity for "query", and None where nobody knows how many tokens a step has."""
        if self.unit in ("query", "never"):
            return math.inf if self.unit == "query" else 0.0
        passed = 1 if self.unit == "step" else self.per_step
        return None if passed is None else Fraction(passed, self.period)

    @property
    def rank(self) -> tuple[int, Fraction | float]:
        """Smaller is faster. What is updated by the token at an unknown rate stands above all that has a known one."""
        if self.rate is None:
            return 1, self.period
        return (0, 0) if self.unit == "query" else (2, -self.rate)

    def __str__(self) -> str:
        if self.unit in ("query", "never"):
            return "∞" if self.unit == "query" else "0"
        return f"1 / {self.unit}" if self.period == 1 else f"1 / {self.period:,} {self.unit}s"

    def rate_text(self) -> str:
        """The rate in words where it says more than the period does, else nothing."""
        rate = self.rate
        if not isinstance(rate, Fraction) or self.unit == "step":
            return ""
        if rate >= 1:
            return f"{float(rate):,.4g} / step"
        return f"1 / {float(1 / rate):,.4g} steps"


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
        frequency: of all components; where some count tokens and others steps, that of the first.
        components: in no order.
    """

    index: int
    frequency: Frequency
    components: tuple[Component, ...]

    @property
    def updates(self) -> str:
        """How often, in every unit in which its components count: `1 / step = 1 / 256 tokens`."""
        return " = ".join(dict.fromkeys(str(c.frequency) for c in self.components))


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
