"""Flags of a command from the settings of a dataclass (`nestling.settings`), so that each is declared once.

    @with_flags
    def train(settings: Flags[TrainConfig], resume: Annotated[bool, typer.Option("--resume")] = False) -> None:
        config = settings.make()

The command gets a flag for every setting, in the order of the fields, and the function gets them as one `Flags`. A
field that holds another dataclass with settings, a component, contributes the flags of that class: `replay.pieces` is
`--replay-pieces` unless it has a name of its own. A component that may be None is made when its flags say so: where one
of them is given, or, where one of its settings has an `off` value, when that one is given another value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

from nestling.errors import UserError
from nestling.settings import NO_FLAG, Setting, component_of, settings_of

T = TypeVar("T")
CONTEXT = "typer_context"  # a parameter of every command with flags; no setting is called so
BETWEEN = "__"  # component and field in the name of a parameter


@dataclass(frozen=True)
class Flags(Generic[T]):
    """What the command line said of the settings of one dataclass.

    Attributes:
        owner: the dataclass.
        values: of all its flags, given or not, by field; of a component's field by `component.field`.
        given: the names of those that stand on the command line.
    """

    owner: type[T]
    values: dict[str, Any]
    given: frozenset[str]

    def option(self, name: str) -> str:
        """The flag of one of the values, as it is typed."""
        return next(flag.option for flag in _flags(self.owner) if flag.path == name)

    def make(self, **others: Any) -> T:
        """The dataclass these flags describe; `others` are fields that no flag sets, or that are set otherwise.

        Raises:
            UserError: a flag of a component that is left out.
        """
        made: T = _make(self.owner, self.values, self.given, "", others)
        return made


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command of a function whose parameters of type `Flags[...]` stand for the flags of a dataclass."""
    hints = get_type_hints(command, include_extras=True)
    owners = {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is Flags}
    parameters = [inspect.Parameter(CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in inspect.signature(command).parameters.items():
        if name in owners:
            parameters += [_parameter(flag) for flag in _flags(owners[name])]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        context: typer.Context = values.pop(CONTEXT)
        for name, owner in owners.items():
            flags = list(_flags(owner))
            given = frozenset(flag.path for flag in flags if _on_command_line(context, flag.parameter))
            found = {flag.path: flag.value(values.pop(flag.parameter)) for flag in flags}
            values[name] = Flags(owner, found, given)
        command(**values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def flag_values(made: Any) -> dict[str, Any]:
    """What the flags of a dataclass would be for these settings, by `Flags.values`' names, unparsed."""
    found = {}
    for flag in _flags(type(made)):
        value = made
        for name in flag.path.split("."):
            value = flag.setting.off if value is None else getattr(value, name)
        found[flag.path] = value
    return found


def list_options(owner: type) -> frozenset[str]:
    """The flags of a dataclass that may be given several times."""
    return frozenset(flag.option for flag in _flags(owner) if flag.type == list[str] | None)


@dataclass(frozen=True)
class _Flag:
    """One flag: where its value goes, and what it is when it is not given."""

    path: str
    setting: Setting
    default: Any

    @property
    def parameter(self) -> str:
        return self.path.replace(".", BETWEEN)

    @property
    def option(self) -> str:
        return f"--{self.setting.flag or self.path.replace('.', '-').replace('_', '-')}"

    def value(self, raw: Any) -> Any:
        """What the field gets of what typer read."""
        if self.setting.parse is not None:
            return self.setting.parse(raw)
        return tuple(raw or ()) if self._is_tuple else raw

    @property
    def _is_tuple(self) -> bool:
        return any(get_origin(kind) is tuple for kind in self.setting.kinds)

    @property
    def is_number(self) -> bool:
        """Whether typer reads a number, whose bounds it can say."""
        return any(kind in (int, float) for kind in get_args(self.type) or (self.type,))

    @property
    def least(self) -> float | None:
        """The smallest number, which may be the one that leaves a component out."""
        known = self.setting
        if not self.is_number or known.at_least is None:
            return None
        return known.at_least if known.off is None else min(known.at_least, known.off)

    @property
    def type(self) -> Any:
        """What typer is to read."""
        if self.setting.takes is not None:
            return self.setting.takes | None
        if self._is_tuple:
            return list[str] | None
        plain = [kind for kind in self.setting.kinds if kind in (bool, int, float, str)]
        kind = float if {int, float} <= set(plain) else plain[0] if plain else str
        return kind | None if NoneType in self.setting.kinds or self.default is None else kind


def _flags(owner: type, prefix: str = "", optional: bool = False) -> Iterator[_Flag]:
    settings = settings_of(owner)
    for declared in fields(owner):
        name, path = declared.name, f"{prefix}{declared.name}"
        component = component_of(owner, name)
        if component is not None and (name not in settings or settings[name].flag != NO_FLAG):
            yield from _flags(component, f"{path}.", _default(declared) is None)
        elif name in settings and settings[name].flag != NO_FLAG:
            off = settings[name].off
            yield _Flag(path, settings[name], off if optional and off is not None else _default(declared))


def _default(declared: Field[Any]) -> Any:
    if declared.default is not MISSING:
        return declared.default
    return inspect.Parameter.empty if declared.default_factory is MISSING else declared.default_factory()


def _parameter(flag: _Flag) -> inspect.Parameter:
    known, default = flag.setting, flag.default
    names = [flag.option]
    if bool in known.kinds and default is True:
        names = [f"{flag.option}/--no-{flag.option.removeprefix('--')}"]
    if flag.type == list[str] | None:
        default = None if not default else list(default)
    option = typer.Option(
        *names,
        help=known.help.replace("{choices}", ", ".join(known.choices)),
        metavar=known.metavar,
        rich_help_panel=known.panel,
        min=flag.least,
        max=known.at_most if flag.is_number else None,
        show_default=default is not inspect.Parameter.empty,
    )
    return inspect.Parameter(
        flag.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[flag.type, option],
    )


def _make(owner: type, values: dict[str, Any], given: frozenset[str], prefix: str, others: dict[str, Any]) -> Any:
    made = dict(others)
    settings = settings_of(owner)
    for declared in fields(owner):
        name, path = declared.name, f"{prefix}{declared.name}"
        if name in made:
            continue
        component = component_of(owner, name)
        if component is not None and any(key.startswith(f"{path}.") for key in values):
            if _default(declared) is not None or _wanted(component, values, given, path):
                made[name] = _make(component, values, given, f"{path}.", {})
        elif path in values and not (name in settings and _is_off(settings[name], values[path], prefix)):
            made[name] = values[path]
    return owner(**made)


def _is_off(known: Setting, value: Any, prefix: str) -> bool:
    return bool(prefix) and known.off is not None and value == known.off


def _wanted(component: type, values: dict[str, Any], given: frozenset[str], path: str) -> bool:
    """Whether a component that may be None is to be made."""
    named = [flag for flag in _flags(component, f"{path}.", optional=True) if flag.path in given]
    switches = [flag for flag in _flags(component, f"{path}.", optional=True) if flag.setting.off is not None]
    if not switches:
        return bool(named)
    if any(values[flag.path] != flag.setting.off for flag in switches):
        return True
    if useless := [flag for flag in named if flag.setting.off is None]:
        raise UserError(f"{useless[0].option} has no effect without {switches[0].option}; add it, or leave it out")
    return False


def _on_command_line(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"
