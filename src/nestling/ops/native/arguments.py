"""The arguments of the compiled functions, as the C++ files declare them: laid out from the same text, filled by name.

A structure is declared once, in C++. Nothing here knows an order or a count, so the two sides cannot disagree in
silence: a name that one side lacks is an error, and what this file cannot read in a declaration is one as well.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HERE = Path(__file__).parent
_NUMBERS = {"int64_t": "q", "double": "d"}
_MEMBER = re.compile(r"(?P<const>const )?(?P<type>\w+) ?(?P<names>[\w*][\w*\[\], ]*)")
_NAME = re.compile(r"(?P<star>\*?)(?P<name>\w+)(?:\[(?P<bound>\w+)\])?")


@dataclass(frozen=True)
class Field:
    """One member of a structure.

    Attributes:
        name: of the member.
        code: "q" a whole number, "d" a real one, "P" a pointer, as the module `struct` names them.
        count: how many; 1 for what is no array.
        names: of the members of an enum, which its values come from or its array is indexed by; else none.
        bytes: the pointer is to bytes, and not to numbers of the function's dtype.
    """

    name: str
    code: str
    count: int | None = None
    names: tuple[str, ...] = ()
    bytes: bool = False

    @property
    def backward(self) -> bool:
        """Gradients are left out of a forward pass."""
        return self.code == "P" and self.name.startswith("d")

    @property
    def plain(self) -> bool:
        """A number that goes into the structure as it is."""
        return self.code != "P" and self.count is None and not self.names

    def values(self, given: Any, dtype: torch.dtype) -> Sequence[Any]:
        """What stands at this place, from a tensor or a number, a list of them, or a mapping from an enum's names."""
        if self.count is None:
            return (self.value(given, dtype),)
        if self.names:
            if given.keys() != set(self.names):
                raise TypeError(f"{self.name} needs {', '.join(self.names)}, and has {', '.join(given)}")
            given = [given[name] for name in self.names]
        if len(given) > self.count:
            raise ValueError(f"{self.name} has room for {self.count} layers, and {len(given)} were given")
        return [0 if v is None else self.value(v, dtype) for v in given] + [0] * (self.count - len(given))

    def value(self, given: Any, dtype: torch.dtype) -> Any:
        """A number, or the address of a tensor that compiled code can read.

        Raises:
            ValueError: the tensor is not contiguous, of another dtype, or not in the memory of the CPU.
        """
        if self.code != "P":
            return self.names.index(given) if self.names and self.count is None else given
        if self.bytes:
            dtype = torch.bool
        if given.is_cpu and given.dtype is dtype and given.is_contiguous():
            return given.data_ptr()
        if not given.is_cpu:
            raise ValueError(elsewhere(self.name, given))
        order = "contiguous" if given.is_contiguous() else "not contiguous"
        raise ValueError(f"{self.name} is {order}, of {given.dtype}; compiled code takes contiguous {dtype}")


def elsewhere(name: str, tensor: Tensor) -> str:
    """The sentence about a tensor that is not where the CPU can read it."""
    hint = "move the whole layer and its state to one device"
    if tensor.device.type == "meta":
        hint = "its values were left on the disk or never loaded; call the layer itself, so that hooks can fetch them"
    return f"{name} is on the device '{tensor.device}', but compiled memories read the CPU's memory; {hint}"


@dataclass(frozen=True)
class Structure:
    """A structure of arguments: its name in C++, and its fields in their order."""

    name: str
    fields: tuple[Field, ...]

    @cached_property
    def forward(self) -> _Plan:
        """How a forward pass fills it: without gradients."""
        return _Plan.of(self.fields, [field for field in self.fields if not field.backward])

    @cached_property
    def backward(self) -> _Plan:
        """How a backward pass fills it."""
        return _Plan.of(self.fields, list(self.fields))

    def pack(self, given: Mapping[str, Any], dtype: torch.dtype, back: bool) -> bytes:
        """The structure's memory.

        Args:
            given: a value for every field; a forward pass has no gradients.
            dtype: of all tensors but masks.
            back: whether this is a backward pass.

        Raises:
            TypeError: a field is missing, or a name is no field.
            ValueError: a tensor that compiled code cannot read.
        """
        plan = self.backward if back else self.forward
        try:
            found = plan.get(given)
        except KeyError:
            found = ()
        if len(given) != len(found):
            missing = [name for name in plan.names if name not in given]
            unknown = [name for name in given if name not in plan.names]
            raise TypeError(f"{self.name}: missing {', '.join(missing) or '-'}, unknown {', '.join(unknown) or '-'}")
        values = list(found[: plan.numbers])
        for field, pointer, value in zip(plan.rest, plan.pointers, found[plan.numbers :], strict=True):
            if value is None and field.count is None:
                values.append(0)
            elif pointer and value.dtype is dtype and value.is_cpu and value.is_contiguous():
                values.append(value.data_ptr())  # as `Field.value`, without the time of a call
            elif field.count is not None:
                values += field.values(value, dtype)
            else:
                values.append(field.value(value, dtype))
        return plan.layout.pack(*values)

    def replace(self, packed: bytes, name: str, tensor: Tensor) -> bytes:
        """The structure's memory with another tensor in one field."""
        at = 0
        for field in self.fields:
            if field.name == name:
                return packed[:at] + struct.pack("P", field.value(tensor, tensor.dtype)) + packed[at + 8 :]
            at += 8 * (field.count or 1)
        raise TypeError(f"{self.name} has no {name}")


@dataclass(frozen=True)
class _Plan:
    """How a structure is filled, made once: a small call takes 40 microseconds in all.

    Attributes:
        names: of the fields that are given.
        get: their values out of a mapping.
        numbers: how many of the first ones go into the structure as they are.
        rest: the others.
        pointers: which of those are each one pointer to numbers of the function's dtype.
        layout: of the structure.
    """

    names: list[str]
    get: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    numbers: int
    rest: list[Field]
    pointers: list[bool]
    layout: struct.Struct

    @staticmethod
    def of(fields: Sequence[Field], given: list[Field]) -> _Plan:
        codes = [f"{f.count or 1}{f.code}" if f in given else f"{8 * (f.count or 1)}x" for f in fields]
        names, numbers = [f.name for f in given], len(list(takewhile(lambda f: f.plain, given)))
        rest, layout = given[numbers:], struct.Struct(f"@{''.join(codes)}")
        pointers = [field.code == "P" and field.count is None and not field.bytes for field in rest]
        return _Plan(names, itemgetter(*names), numbers, rest, pointers, layout)


@cache
def declared() -> dict[str, Structure]:
    """Every structure of arguments, by its name in C++."""
    found = {}
    for file in sources():
        for name, body in re.findall(r"struct (\w+Arguments) \{\n(.*?)\n\}", _text(file), re.DOTALL):
            found[name] = Structure(name, tuple(_fields(f"{file.name}: {name}", body)))
    return found


@cache
def enumerators(name: str) -> tuple[str, ...]:
    """Members of an enum of `arguments.h`, without the one that counts them."""
    return _enums()[name]


@cache
def constant(name: str) -> int:
    """A `constexpr int64_t` of `arguments.h`."""
    found = re.search(rf"constexpr int64_t {name} = (\d+);", _text(_HERE / "arguments.h"))
    if found is None:
        raise ValueError(f"arguments.h has no constexpr int64_t {name}")
    return int(found[1])


def sources() -> list[Path]:
    """The C++ files."""
    return sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")])


def _text(file: Path) -> str:
    return re.sub(r" *//.*", "", file.read_text(encoding="utf-8"))


@cache
def _enums() -> dict[str, tuple[str, ...]]:
    found = re.findall(r"enum (?:class )?(\w+) : int64_t \{ (.*?) \};", _text(_HERE / "arguments.h"))
    return {name: tuple(n for n in body.split(", ") if not n.startswith("all_")) for name, body in found}


def _fields(where: str, body: str) -> list[Field]:
    """Members up to the first method."""
    fields: list[Field] = []
    for statement in (s.strip() for s in body.split(";")):
        if "(" in statement or not statement:
            break
        member = _MEMBER.fullmatch(" ".join(statement.split()).replace("* ", " *"))
        if member is None:
            raise ValueError(f"{where}: cannot read '{statement}'")
        for declarator in member["names"].split(", "):
            fields.append(_field(f"{where}: '{statement}'", member["type"], declarator))
    return fields


def _field(where: str, kind: str, declarator: str) -> Field:
    read = _NAME.fullmatch(declarator)
    pointer = bool(read and read["star"])
    names = () if pointer else _enums().get(kind, ())
    if read is None or (kind not in ("T", "uint8_t") if pointer else kind not in _NUMBERS and not names):
        raise ValueError(f"{where} is no number, enum, or pointer to T or uint8_t")
    code = "P" if pointer else "q" if names else _NUMBERS[kind]
    count, bound = None, read["bound"]
    if bound and bound.startswith("all_"):
        names = next(members for name, members in _enums().items() if f"all_{name.lower()}s" == bound)
        count = len(names)
    elif bound:
        count = constant(bound)
    return Field(read["name"], code, count, names, bytes=kind == "uint8_t")
