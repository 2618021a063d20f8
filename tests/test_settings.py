"""Settings declared once: what is refused, and the flags that a command gets of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import typer

from nestling.cli.flags import Flags, with_flags
from nestling.errors import UserError
from nestling.settings import NO_FLAG, check, component_of, setting, settings_of


@dataclass(frozen=True, kw_only=True)
class Replay:
    capacity: int = setting(256, help="Chunks kept.", flag="replay", off=0, at_least=1)
    weight: float = setting(1.0, help="Of their loss.", at_least=0, below=math.inf)
    teacher: Literal["average", "base"] | None = setting(None, help="One of: {choices}.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str = setting(help="Of the plan.")
    rate: float | None = setting(None, help="Positive.", flag="lr", above=0, panel="Learning")
    beta: float = setting(0.9, help="A momentum.", at_least=0, below=1)
    part: float = setting(0.1, help="A part.", at_least=0, at_most=1)
    kind: str = setting("a", help="One of: {choices}.", choices=("a", "b", "c"))
    paths: tuple[str, ...] = setting((), help="Files.")
    fast: bool = setting(False, help="Quick.")
    shown: bool = setting(True, help="On the screen.")
    table: dict[str, int] = setting(default_factory=dict, help="Not on the command line.", flag=NO_FLAG)
    replay: Replay | None = None
    unsaid: int = field(default=-7)

    def __post_init__(self) -> None:
        check(self, UserError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "rate is 0, but must be positive"),
        ({"rate": math.nan}, "rate is nan, but must be a number, positive"),
        ({"rate": "fast"}, "rate is fast, but must be a number, positive"),
        ({"rate": True}, "rate is True, but must be a number, positive"),
        ({"beta": 1.0}, "beta is 1.0, but must be at least 0 and below 1"),
        ({"beta": None}, "beta is None, but must be a number, at least 0 and below 1"),
        ({"part": -0.1}, "part is -0.1, but must be between 0 and 1"),
        ({"kind": "d"}, "kind is d, but must be a, b or c"),
        ({"kind": 3}, "kind is 3, but must be a, b or c"),
        ({"fast": 1}, "fast is 1, but must be true or false"),
        ({"paths": "a"}, "paths is a, but must be tuple"),
        ({"part": 10**40}, "part is a number of more than 64 bits, but must be of a sensible size"),
        ({"name": "x" * 900, "kind": "y" * 900}, f"kind is {'y' * 77}..., but must be"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        Plan(**{"name": "n"} | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity": 0}, "capacity is 0, but must be at least 1"),
        ({"capacity": 2.0}, "capacity is 2.0, but must be a whole number, at least 1"),
        ({"weight": math.inf}, "weight is inf, but must be at least 0 and finite"),
        ({"teacher": "nobody"}, "teacher is nobody, but must be average or base"),
    ],
)
def test_library_callers_get_a_value_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Replay(**values)


def test_what_can_be_is_taken() -> None:
    Plan(name="", rate=math.inf, beta=0, paths=("a",), replay=Replay(teacher="base", weight=2))
    assert list(settings_of(Replay)) == ["capacity", "weight", "teacher"]
    assert settings_of(Replay)["teacher"].choices == ("average", "base")
    assert component_of(Plan, "replay") is Replay and component_of(Plan, "paths") is None


def run(*arguments: str) -> Flags[Plan]:
    """What a command gets of a command line."""
    caught: list[Flags[Plan]] = []

    @with_flags
    def command(plan: Flags[Plan], more: Annotated[int, typer.Option("--more")] = 0) -> None:
        """Do it."""
        assert more == 5
        caught.append(plan)

    app = typer.Typer()
    app.command()(command)
    app(["--more", "5", *arguments], standalone_mode=False)
    return caught[0]


def test_flags_make_the_dataclass() -> None:
    flags = run("--name", "x", "--lr", "1e-3", "--paths", "a", "--paths", "b", "--fast", "--no-shown", "--beta", "0.9")
    assert flags.make() == Plan(name="x", rate=1e-3, paths=("a", "b"), fast=True, shown=False)
    assert flags.given == {"name", "rate", "paths", "fast", "shown", "beta"}
    assert flags.make(unsaid=3, kind="b", replay=Replay()) == Plan(
        name="x", rate=1e-3, paths=("a", "b"), fast=True, shown=False, unsaid=3, kind="b", replay=Replay()
    )
    assert "table" not in flags.values and "unsaid" not in flags.values


def test_a_component_is_made_where_its_flags_say_so() -> None:
    assert run("--name", "x").make().replay is None
    assert run("--name", "x", "--replay", "0").make().replay is None
    made = run("--name", "x", "--replay", "8", "--replay-weight", "0.5", "--replay-teacher", "base")
    assert made.make().replay == Replay(capacity=8, weight=0.5, teacher="base")
    assert made.given == {"name", "replay.capacity", "replay.weight", "replay.teacher"}
    with pytest.raises(UserError, match="--replay-weight has no effect without --replay"):
        run("--name", "x", "--replay-weight", "2").make()
    with pytest.raises(UserError, match="kind is z, but must be a, b or c"):
        run("--name", "x", "--kind", "z").make()


def test_help_says_what_was_declared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises((SystemExit, IndexError)):
        run("--help")
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for part in ("Do it.", "Learning", "One of: a, b, c.", "One of: average, base.", "--replay ", "[default: 0]"):
        assert part in text
    assert "--no-shown" in text and "--no-fast" not in text and "--table" not in text
