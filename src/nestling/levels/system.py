"""A nested system: components with update frequencies, ordered into levels (NL Definitions 2 to 4, section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nestling.levels.components import (
    Component,
    Frequency,
    SystemLevel,
    Transfer,
    TransferKind,
    Unit,
    count_text,
    state_text,
)
from nestling.levels.problems import Problem
from nestling.levels.runner import Runner

WIDTH = 150
"""Columns of the tables in a file or a pipe; a terminal has its own."""


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
    levels: tuple[SystemLevel, ...]
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

        Frequencies are compared as updates in a step of the optimizer (`Frequency.rate`). Where it is not known how
        many tokens a step has, a note says for which numbers the order is right.

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
            levels.append(SystemLevel(index, members[0].frequency, members))
        notes = (*notes, *_unknown_rates(components))
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
        components = [_component(p) for problem in problems for p in problem.family()]
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
        """Plain JSON values; `frequency` in words, as unit and period, and as updates in a step (None: unknown, or
        infinite where the unit is "query")."""
        levels = []
        for level in self.levels:
            members = [dataclasses.asdict(c) | {"feeds": list(c.feeds)} for c in level.components]
            for member, component in zip(members, level.components, strict=True):
                member["frequency"] = str(component.frequency)
            place = {"level": level.index, "frequency": level.updates, **dataclasses.asdict(level.frequency)}
            levels.append(place | {"updates_per_step": _number(level.frequency), "components": members})
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
                rate = level.frequency.rate_text()
                first = (str(level.index), f"{level.updates}\n{rate}".strip()) if i == 0 else ("", "")
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


def _component(problem: Problem) -> Component:
    count, size = problem.size()
    frequency = Frequency("step", problem.period)
    if problem.solution is not None:
        frequency = Frequency("query")
    elif problem.start is not None:
        unit: Unit = "token" if problem.flow == "tokens" else "item"
        passed = None if problem.per_step is None else problem.per_step * problem.span
        frequency = Frequency(unit, problem.period * problem.span, passed)
    return Component(
        name=problem.name,
        kind="attention" if problem.solution else "fast weights" if problem.start else "parameters",
        frequency=frequency,
        context=problem.flow,
        objective=problem.goal,
        rule=problem.rule_text(),
        parameters=count,
        parameter_bytes=size,
        feeds=problem.feeds,
    )


def _unknown_rates(components: Sequence[Component]) -> list[str]:
    """A note for every unit whose number in a step is not known, if that could change the order."""
    steps = [c.frequency.period for c in components if c.frequency.unit == "step"]
    notes = []
    for unit in ("token", "item"):
        periods = [c.frequency.period for c in components if c.frequency.unit == unit and c.frequency.rate is None]
        if periods and steps:
            most = max(periods) // min(steps)
            notes.append(
                f"how many {unit}s pass in a step of the optimizer is not known; what is updated by the {unit} is "
                f"listed as faster than what is updated by the step, which is so from {most + 1:,} {unit}s a step"
            )
    return notes


def _number(frequency: Frequency) -> float | None:
    rate = frequency.rate
    return None if rate is None or frequency.unit == "query" else float(rate)


def _heights(components: dict[str, Component]) -> dict[str, int]:
    """For every component the longest chain of components of its frequency that wait for it; a circle counts once."""
    heights: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...]) -> int:
        if name not in heights:
            own = components[name]
            fed = [n for n in own.feeds if n in components and n not in above and n != name]
            same = [n for n in fed if components[n].frequency.rank == own.frequency.rank]
            heights[name] = 1 + max((height(n, (*above, name)) for n in same), default=-1)
        return heights[name]

    for name in components:
        height(name, ())
    return heights
