"""Settings declared once: a dataclass field with its default, bounds and help, which checks and commands read.

    @dataclass(frozen=True, kw_only=True)
    class Replay:
        capacity: int = setting(256, help="Chunks kept.", flag="replay", off=0, at_least=1)
        teacher: Literal["average"] | None = setting(None, help="Who teaches what is replayed.")

        def __post_init__(self) -> None:
            check(self)

`check` refuses values of a wrong type or out of bounds. `nestling.cli.flags.with_flags` makes the flags of a command
from the same declarations: `--replay INTEGER` and `--teacher TEXT` here, and where `Replay` is a field of another such
class the flags of both. This module knows nothing of command lines, so that every part of the library may declare
settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = 2**63 - 1
"""Of a whole number: what a tensor, a `deque` and a generator's seed can take."""
MOST_EXPONENT = 8.0
"""Of a rate that follows a period: far beyond any use, and no float's limit."""
MOST_SHOWN = 80  # characters of a value in a message
KEY = "setting"  # of the field's metadata
NO_FLAG = ""


@dataclass(frozen=True)
class Setting:
    """What is declared of a field. See `setting` for the arguments.

    Attributes:
        name: of the field.
        kinds: the types of its annotation, one by one: `int | None` is `(int, NoneType)`.
    """

    help: str
    panel: str | None = None
    flag: str | None = None
    metavar: str | None = None
    takes: Any = None
    parse: Callable[[Any], Any] | None = None
    off: Any = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    name: str = ""
    kinds: tuple[Any, ...] = ()


def setting(
    default: Any = MISSING,
    *,
    help: str,
    default_factory: Any = MISSING,
    panel: str | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    takes: Any = None,
    parse: Callable[[Any], Any] | None = None,
    off: Any = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a dataclass, as `dataclasses.field`, with what a check and a command need to know of it.

    Args:
        default, default_factory: as of `dataclasses.field`; with neither the setting must be given.
        help: a sentence for the user. `{choices}` stands for the choices.
        panel: heading the flag stands under in a command's help.
        flag: its name on the command line without dashes; None is the field's name with dashes (of a component's
            field, with the component's name before it), `NO_FLAG` leaves the setting out of the command.
        metavar: what a flag's value is called in a command's help.
        takes: type of the flag's value where it is not that of the field, as `list[str]`.
        parse: makes the field's value from the flag's. Raises `UserError`.
        off: of one field of a component that may be None: the flag's default, which leaves the component out.
        at_least, above, at_most, below: bounds of a number, `above` and `below` without the bound itself. Infinity is
            a number unless `below` is infinite; NaN is none.
        choices: what a text may be. Those of a `Literal` need not be said again.
    """
    known = Setting(help, panel, flag, metavar, takes, parse, off, at_least, above, at_most, below, choices)
    return field(default=default, default_factory=default_factory, metadata={KEY: known})


@cache
def settings_of(owner: type) -> dict[str, Setting]:
    """The settings a dataclass declares, by field, in order; fields without `setting` are left out."""
    hints = get_type_hints(owner)
    found = {}
    for declared in fields(owner):
        if KEY in declared.metadata:
            kinds = tuple(kinds_of(hints[declared.name]))
            literals = tuple(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))
            known: Setting = declared.metadata[KEY]
            found[declared.name] = replace(
                known, name=declared.name, kinds=kinds, choices=known.choices or tuple(map(str, literals))
            )
    return found


def component_of(owner: type, name: str) -> type | None:
    """The dataclass with settings that a field holds, itself or None; None for fields of other types."""
    for kind in kinds_of(get_type_hints(owner)[name]):
        if isinstance(kind, type) and is_dataclass(kind) and settings_of(kind):
            return kind
    return None


def check(owner: Any, error: type[Exception] = ValueError) -> None:
    """Refuse a dataclass some of whose settings have a wrong type or are out of bounds.

    Args:
        owner: with fields declared by `setting`; the others are not looked at.
        error: the kind of error raised.

    Raises:
        ValueError: or what `error` says, with the name, the value and what it must be.
    """
    kind: type = type(owner)
    for name, known in settings_of(kind).items():
        value = getattr(owner, name)
        if (allowed := _refusal(value, known)) is not None:
            raise error(f"{name} is {shown(value)}, but must be {allowed}")


def shown(value: object) -> str:
    """A value for a message, however long it is."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more than 64 bits"
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def kinds_of(hint: Any) -> Iterator[Any]:
    """The types a type hint allows, one by one: `int | None` is int and NoneType."""
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from kinds_of(part)
    else:
        yield hint


def _refusal(value: object, known: Setting) -> str | None:
    """What the value must be; None where it is that."""
    kinds = known.kinds
    numbers = [kind for kind in (int, float) if kind in kinds]
    if value is None:
        return None if NoneType in kinds else _described(known)
    if isinstance(value, bool):
        return None if bool in kinds else _described(known)
    if isinstance(value, int | float) and numbers:
        if isinstance(value, float) and (numbers == [int] or math.isnan(value)):
            return _described(known)
        if isinstance(value, int) and abs(value) > LARGEST:
            return "of a sensible size"
        return None if _inside(value, known) else _bounds(known)
    if isinstance(value, str) and (str in kinds or known.choices):
        return None if not known.choices or value in known.choices else _listed(known.choices)
    wide = [kind for kind in kinds if kind not in (NoneType, bool, int, float, str) and get_origin(kind) is not Literal]
    return None if any(_is_of(value, kind) for kind in wide) else _described(known)


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value that is no number, text, truth value or None is of a type; a list may stand for a tuple."""
    if kind is Any:
        return True
    plain = get_origin(kind) or kind
    return isinstance(value, (plain, list) if plain is tuple else plain)


def _inside(value: float, known: Setting) -> bool:
    return (
        (known.at_least is None or value >= known.at_least)
        and (known.above is None or value > known.above)
        and (known.at_most is None or value <= known.at_most)
        and (known.below is None or value < known.below)
    )


def _bounds(known: Setting) -> str:
    if known.at_least is not None and known.at_most is not None:
        return f"between {known.at_least:g} and {known.at_most:g}"
    parts = []
    if known.at_least is not None:
        parts.append(f"at least {known.at_least:g}")
    if known.above is not None:
        parts.append("positive" if known.above == 0 else f"above {known.above:g}")
    if known.at_most is not None:
        parts.append(f"at most {known.at_most:g}")
    if known.below is not None:
        parts.append("finite" if known.below == math.inf else f"below {known.below:g}")
    return " and ".join(parts)


def _described(known: Setting) -> str:
    """The types a setting may have, and its bounds."""
    if known.choices:
        return _listed(known.choices)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}
    parts = [names.get(kind, getattr(kind, "__name__", str(kind))) for kind in known.kinds if kind is not NoneType]
    bounds = _bounds(known)
    return " or ".join(dict.fromkeys(parts)) + (f", {bounds}" if bounds else "")


def _listed(choices: tuple[str, ...]) -> str:
    if len(choices) > 4:
        return f"one of {', '.join(choices)}"
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
