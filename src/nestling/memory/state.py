"""State objects: what a layer or a model carries from one call to the next.

A state is a dataclass whose fields are tensors (batch first), nested states, lists of either, or None. Everything a
user does with one (detach, clone, select rows, move, save, load) follows from that shape, so a new layer declares
its fields and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nestling.memory.checked_file import CheckedFileError, checksum, read_checked, write_checked

FORMAT = "nestling-state"
FORMAT_VERSION = "1"


class StateFileError(ValueError):
    """A state file that cannot be used: damaged, of another model, or of another shape."""


@dataclass
class State:
    """Base of all states. Subclasses are dataclasses of tensors, states, lists of them, or None.

    Tensors are batch first. Fast weights and accumulators are float32 (float64 in a float64 model). Counters are int64
    and stay on the CPU, where they steer the chunk loop without a device synchronisation.

    Attributes:
        may_lack: fields that a file of an earlier release lacks; they are None after reading it.
    """

    may_lack: ClassVar[frozenset[str]] = frozenset()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """A new state with `fn` applied to every tensor."""
        return type(self)(**{f.name: _map(getattr(self, f.name), fn) for f in fields(self)})

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its dotted name."""
        for f in fields(self):
            yield from _walk(getattr(self, f.name), f"{prefix}{f.name}")

    def detach(self) -> Self:
        """The same values, cut from the autograd graph (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> Self:
        """An independent copy: writing to one never shows in the other."""
        return self.map(torch.Tensor.clone)

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """The state of the given batch rows, in that order; a row may repeat (beams, forks).

        Raises:
            IndexError: a row lies outside the batch.
        """
        index = torch.as_tensor(rows, dtype=torch.long).reshape(-1).cpu()
        size = self.batch_size
        if index.numel() and (int(index.min()) < -size or int(index.max()) >= size):
            raise IndexError(f"rows {index.tolist()} are outside this state's batch of {size}")
        index = index % size if size else index
        return self.map(lambda t: t.index_select(0, index.to(t.device)))

    def to(self, device: torch.device | str) -> Self:
        """The state on another device; counters stay on the CPU."""
        return self.map(lambda t: t if t.dtype == torch.int64 else t.to(device))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        for _, tensor in self.tensors():
            return tensor.shape[0]
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def first_nonfinite(self) -> str | None:
        """Name of the first tensor that holds a NaN or an infinity, or None."""
        for name, tensor in self.tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return name
        return None

    def like_file(self, names: Collection[str]) -> Self:
        """The template of a file that holds tensors of these names: this one, without what the file may lack."""
        return replace(self, **dict.fromkeys(self.may_lack - set(names)))

    def write_file(self, path: str | Path, fingerprint: str, **metadata: str) -> None:
        """Write all tensors as safetensors, atomically: a failure leaves an earlier file intact.

        The header holds a SHA-256 of everything else in the file, so that `read_file` notices any damage.

        Args:
            path: the file to write.
            fingerprint: identity of the model that made this state; `read_file` refuses any other.
            metadata: further strings to keep in the header.
        """
        header = {"format": FORMAT, "version": FORMAT_VERSION, "kind": type(self).__name__}
        header |= {"fingerprint": fingerprint, "extra": json.dumps(metadata)}
        write_checked(path, header, dict(self.tensors()))

    def read_file(self, path: str | Path, fingerprint: str) -> Self:
        """A state like this one (the template) with the tensors of `path`.

        The batch size may differ from the template's, and so may dimension 1 of a tensor whose template has length 0
        there (an empty attention cache).

        Raises:
            FileNotFoundError: no such file.
            StateFileError: not a state file, damaged, from another model, or of another shape.
        """
        header, found = _read_checked(Path(path))
        if header.get("fingerprint") != fingerprint:
            raise StateFileError(
                f"{path} was saved by another model (fingerprint {header.get('fingerprint', 'missing')}, this model is "
                f"{fingerprint}); load it with the model that wrote it"
            )
        template = self.like_file(found.keys())
        wanted = dict(template.tensors())
        if missing := sorted(wanted.keys() ^ found.keys()):
            raise StateFileError(f"{path} does not have this model's tensors; first difference: {missing[0]}")
        batch = {t.shape[0] if t.dim() else -1 for t in found.values()}
        if len(batch) != 1 or batch & {-1, 0}:
            raise StateFileError(f"{path} mixes batch sizes {sorted(batch)}; the file is damaged")
        for name, like in wanted.items():
            _check_like(path, name, like, found[name])
        if header.pop("sha256", None) != checksum(header, found):
            raise StateFileError(f"{path} is damaged: its content does not have the checksum in its header")
        names = iter(wanted)
        return template.map(lambda t: found[next(names)].to(t.device if t.dtype != torch.int64 else "cpu"))


def rows_of(weight: Tensor, batch_size: int) -> Tensor:
    """First fast weights of every row, `[N, ...]`, as views of one copy of a parameter.

    Of a copy, since optimizers change parameters in place: a state that was carried over a step would change with them,
    and one that was read from a file would not.
    """
    return weight.clone().expand(batch_size, *weight.shape)


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, State):
        return value.map(fn)
    return [_map(item, fn) for item in value]


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, State):
        yield from value.tensors(f"{name}.")
    elif value is not None:
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}.{i}")


def _read_checked(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no state file at {path}")
    try:
        header, found = read_checked(path)
    except CheckedFileError as error:
        raise StateFileError(str(error)) from error
    if header.get("format") != FORMAT:
        raise StateFileError(f"{path} is a safetensors file but not a nestling state")
    if header.get("version") != FORMAT_VERSION:
        raise StateFileError(f"{path} has format version {header.get('version')}; this release reads {FORMAT_VERSION}")
    return header, found


def _check_like(path: str | Path, name: str, template: Tensor, found: Tensor) -> None:
    same_rank = found.dim() == template.dim()
    grows = same_rank and template.dim() > 1 and template.shape[1] == 0
    start = 2 if grows else 1
    if not same_rank or found.shape[start:] != template.shape[start:]:
        raise StateFileError(
            f"{path}: {name} has shape {tuple(found.shape)}, this model needs {tuple(template.shape)} (batch apart)"
        )
    if found.dtype != template.dtype:
        raise StateFileError(f"{path}: {name} is {found.dtype}, this model needs {template.dtype}")
    if found.dtype == torch.int64 and bool((found < 0).any()):
        raise StateFileError(f"{path}: the counter {name} is negative; the file is damaged")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise StateFileError(f"{path}: {name} holds NaN or infinity; the file is damaged")
