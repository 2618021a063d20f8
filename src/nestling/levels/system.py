"""A nested system: components with update frequencies, ordered into levels (NL Definitions 2 to 4, section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from nestling.levels.problems import Problem, Runner

Unit = Literal["query", "token", "item", "step", "never"]
Context = Literal["tokens", "gradients", "samples"]
Kind = Literal["attention", "fast weights", "optimizer state", "parameters"]
TransferKind = Literal["parametric", "non-parametric", "backpropagation", "initialisation", "generation"]

WIDTH = 150
"""Columns of the tables in a file or a pipe; a terminal has its own."""

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
class Level:
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


@dataclass(frozen=True)
class NestedSystem:
    """A model and its training as levels of optimization problems.

    `levels.inspect` finds it in a model and an optimizer; `define` makes one that runs.

    Attributes:
        name: of the whole.
        levels: fastest first.
        transfers: between components.
        notes: what could not be found out, and why.
        runner: what `step` calls; None for a system that was inspected.
    """

    name: str
    levels: tuple[Level, ...]
    transfers: tuple[Transfer, ...] = ()
    notes: tuple[str, ...] = ()
    runner: Runner | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        components: Sequence[Component],
        transfers: Sequence[Transfer] = (),
        notes: Sequence[str] = (),
        runner: Runner | None = None,
    ) -> NestedSystem:
        """Sort components into levels by Definition 2: by frequency, and among equals those that others wait for first.

        Raises:
            ValueError: two components of one name, or a transfer from or to a name that is no component's.
        """
        names = [c.name for c in components]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"components must have different names; {', '.join(sorted(twice))} is given twice")
        if unknown := {n for t in transfers for n in (t.source, t.target)} - set(names):
            raise ValueError(f"transfers name components that do not exist: {', '.join(sorted(unknown))}")
        heights = _heights({c.name: c for c in components})
        order = sorted({(c.frequency.rank, -heights[c.name]) for c in components})
        levels = []
        for index, place in enumerate(order, 1):
            members = tuple(c for c in components if (c.frequency.rank, -heights[c.name]) == place)
            levels.append(Level(index, members[0].frequency, members))
        return cls(name, tuple(levels), tuple(dict.fromkeys(transfers)), tuple(dict.fromkeys(notes)), runner)

    @classmethod
    def define(cls, name: str, problems: Sequence[Problem], transfers: Sequence[Transfer] = ()) -> NestedSystem:
        """A system that runs: `step(batch)` solves its problems, each at its frequency.

        Args:
            name: of the whole.
            problems: fastest first.
            transfers: between problems, by name, for the table and the picture.

        Raises:
            ValueError: as `of`, or a problem that is not well defined.
        """
        runner = Runner(problems)
        components = []
        for problem in problems:
            count, size = problem.size()
            inside = problem.start is not None
            components.append(
                Component(
                    name=problem.name,
                    kind="fast weights" if inside else "parameters",
                    frequency=Frequency(_unit(problem), problem.period),
                    context=problem.flow,
                    objective=problem.goal,
                    rule=problem.rule_text(),
                    parameters=0 if inside else count,
                    parameter_bytes=0 if inside else size,
                    state=count if inside else 0,
                    state_bytes=size if inside else 0,
                    feeds=problem.feeds,
                )
            )
        return cls.of(name, components, transfers, (), runner)

    def step(self, batch: Any) -> dict[str, float]:
        """One unit of time: every problem that is due learns from `batch`.

        Returns:
            The objective of every problem, before its last update.

        Raises:
            ValueError: the system was inspected, not defined, so there is nothing to run.
        """
        if self.runner is None:
            raise ValueError(
                "this system was found by inspect, which only describes; NestedSystem.define makes one to run"
            )
        return self.runner.step(batch)

    @property
    def components(self) -> tuple[Component, ...]:
        """All components, fastest first."""
        return tuple(c for level in self.levels for c in level.components)

    def level_of(self, name: str) -> int:
        """Index of the level of a component, from 1.

        Raises:
            KeyError: no such component.
        """
        for level in self.levels:
            if any(c.name == name for c in level.components):
                return level.index
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `frequency` in words and as unit and period."""
        levels = []
        for level in self.levels:
            members = [dataclasses.asdict(c) | {"feeds": list(c.feeds)} for c in level.components]
            for member, component in zip(members, level.components, strict=True):
                member["frequency"] = str(component.frequency)
            place = {"level": level.index, "frequency": str(level.frequency), **dataclasses.asdict(level.frequency)}
            levels.append(place | {"components": members})
        transfers = [dataclasses.asdict(t) for t in self.transfers]
        return {"name": self.name, "levels": levels, "transfers": transfers, "notes": list(self.notes)}

    def print(self, console: Console | None = None) -> None:
        """Show the levels and the transfers as tables."""
        console = console or Console()
        if not console.is_terminal:
            console.width = max(console.width, WIDTH)
        for table in self._tables():
            console.print(table)
        for note in self.notes:
            console.print(f"note: {note}", markup=False, highlight=False)

    def __str__(self) -> str:
        console = Console(width=200, no_color=True, file=None)
        with console.capture() as captured:
            self.print(console)
        return captured.get()

    def plot(self, path: str | Path) -> None:
        """Draw the system; the ending of `path` chooses the format (svg, png, pdf).

        Raises:
            ValueError: an ending that matplotlib does not know.
        """
        from nestling.levels.picture import draw_system

        draw_system(self, Path(path))

    def _tables(self) -> list[Table]:
        levels = Table(title=self.name, title_justify="left", show_lines=False)
        for heading in ("level", "updates", "component", "context", "objective, rule"):
            levels.add_column(heading, overflow="fold", no_wrap=heading in ("level", "updates"))
        for heading in ("parameters", "state"):
            levels.add_column(heading, justify="right")
        for level in self.levels:
            for i, c in enumerate(level.components):
                first = (str(level.index), str(level.frequency)) if i == 0 else ("", "")
                name = f"{c.name} (×{c.copies})" if c.copies > 1 else c.name
                own = count_text(c.parameters, c.parameter_bytes)
                levels.add_row(*first, name, c.context, f"{c.objective}\n{c.rule}", own, state_text(c))
            levels.add_section()
        if not self.transfers:
            return [levels]
        moves = Table(title="knowledge transfers", title_justify="left")
        for heading in ("from", "to", "kind", "what"):
            moves.add_column(heading, overflow="fold")
        for sources, targets, kind, what in joined(self.transfers):
            moves.add_row(", ".join(sources), ", ".join(targets), kind, what)
        return [levels, moves]


def joined(transfers: Sequence[Transfer]) -> list[tuple[tuple[str, ...], tuple[str, ...], TransferKind, str]]:
    """Transfers of one kind from the same sources, and then to the same targets, in one row each."""
    to: dict[tuple[str, TransferKind, str], list[str]] = {}
    for t in transfers:
        to.setdefault((t.source, t.kind, t.what), []).append(t.target)
    rows: dict[tuple[tuple[str, ...], TransferKind, str], list[str]] = {}
    for (source, kind, what), targets in to.items():
        rows.setdefault((tuple(targets), kind, what), []).append(source)
    return [(tuple(sources), targets, kind, what) for (targets, kind, what), sources in rows.items()]


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


def _unit(problem: Problem) -> Unit:
    if problem.start is None:
        return "step"
    return "token" if problem.flow == "tokens" else "item"


def _heights(components: dict[str, Component]) -> dict[str, int]:
    """For every component the longest chain of components of its frequency that wait for it; a circle counts once."""
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...]) -> int:
        if name not in heights:
            own = components[name]
            fed = [n for n in own.feeds if n in components and n not in above and n != name]
            same = [n for n in fed if components[n].frequency == own.frequency]
            heights[name] = 1 + max((height(n, (*above, name)) for n in same), default=-1)
        return heights[name]

    for name in components:
        height(name, ())
    return heights
