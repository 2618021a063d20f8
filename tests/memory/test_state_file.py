"""A state file is what was written, or refused: damage, edits, other models, and writes that fail half way."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestling.memory import checked_file
from nestling.memory.state import State, StateFileError


@dataclass
class Inner(State):
    """Two weights of one shape, in different precisions, and an optional tail."""

    weight: Tensor
    half: Tensor
    tail: Tensor | None = None


@dataclass
class Outer(State):
    """Every kind of field a state may have."""

    layers: list[Inner | None]
    single: Inner
    cache: Tensor
    position: Tensor


def make_state(rows: int = 3, cached: int = 4, seed: int = 0) -> Outer:
    """A state with every kind of field."""
    g = torch.Generator().manual_seed(seed)

    def inner(tail: bool) -> Inner:
        weight = torch.randn(rows, 7, 9, generator=g)
        half = torch.randn(rows, 7, 9, generator=g).to(torch.bfloat16)
        return Inner(weight, half, torch.randn(rows, 1, 5, generator=g, dtype=torch.float64) if tail else None)

    position = torch.randint(1, 1000, (rows,), generator=g)
    return Outer([inner(True), None, inner(False)], inner(True), torch.randn(rows, cached, 2, generator=g), position)


def assert_equal(a: State, b: State) -> None:
    """The same names, types and values."""
    for (name, x), (other, y) in zip(a.tensors(), b.tensors(), strict=True):
        assert name == other
        assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Outer, Path]:
    """A state and its file."""
    state, path = make_state(), tmp_path / "memory.safetensors"
    state.write_file(path, "a model", note="from a test")
    return state, path


def read(path: Path) -> Outer:
    """Read into a template with other values and another batch size."""
    return make_state(rows=1, cached=0, seed=1).read_file(path, "a model")


def header_of(path: Path) -> dict[str, str]:
    """The strings of a file's header."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def header_bytes(whole: bytes) -> int:
    """Where a file's tensors begin."""
    return 8 + int.from_bytes(whole[:8], "little")


def test_a_file_holds_the_very_bits(saved: tuple[Outer, Path]) -> None:
    state, path = saved
    assert_equal(read(path), state)
    state.single.weight[0, 0, :3] = torch.tensor([-0.0, 1e-45, 3.4e38])
    strided = state.map(lambda t: t.mT.contiguous().mT if t.dim() > 2 else t)
    strided.write_file(path, "a model")
    found = read(path)
    assert_equal(found, state)
    assert torch.equal(found.single.weight.view(torch.int32), state.single.weight.view(torch.int32))
    assert header_of(path)["extra"] == "{}"


def test_an_empty_cache_and_a_state_in_training_are_kept(tmp_path: Path) -> None:
    state, path = make_state(rows=1, cached=0), tmp_path / "memory"
    state.map(lambda t: t.requires_grad_() if t.is_floating_point() else t).write_file(path, "a model")
    assert_equal(read(path), state)
    assert not any(t.requires_grad for _, t in read(path).tensors())


def test_a_truncated_or_longer_file_is_refused(saved: tuple[Outer, Path]) -> None:
    _, path = saved
    whole = path.read_bytes()
    start = header_bytes(whole)
    for length in (*range(12), start // 2, start - 1, *range(start, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StateFileError, match="damaged or not a safetensors file"):
            read(path)
    for more in (b"\0", whole):
        path.write_bytes(whole + more)
        with pytest.raises(StateFileError):
            read(path)


def test_no_flipped_bit_loads_silently(saved: tuple[Outer, Path]) -> None:
    """One bit in every other byte of the header, and 200 in the tensors, where most leave the number finite."""
    _, path = saved
    whole = path.read_bytes()
    start = header_bytes(whole)
    g = torch.Generator().manual_seed(0)
    places = [*range(0, start, 2), *torch.randint(start, len(whole), (200,), generator=g).tolist()]
    bits = torch.randint(0, 8, (len(places),), generator=g).tolist()
    messages = []
    for place, bit in zip(places, bits, strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(StateFileError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert sum("checksum" in message for message in messages[-200:]) > 150
    path.write_bytes(whole)
    read(path)


def test_a_block_of_zeros_is_refused(saved: tuple[Outer, Path]) -> None:
    """What a crash leaves on some file systems."""
    _, path = saved
    whole = path.read_bytes()
    for place in range(header_bytes(whole), len(whole) - 512, 512):
        path.write_bytes(whole[:place] + bytes(512) + whole[place + 512 :])
        with pytest.raises(StateFileError, match="checksum"):
            read(path)


Edit = Callable[[dict[str, str], dict[str, Tensor]], Any]


def strings(**changes: str) -> Edit:
    """Other strings in the header."""
    return lambda header, tensors: header.update(changes)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """Another tensor under its name."""
    return lambda header, tensors: tensors.update({name: change(tensors[name]).contiguous()})


def swapped(header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Two tensors of one shape trade places."""
    tensors["layers.2.weight"], tensors["single.weight"] = tensors["single.weight"], tensors["layers.2.weight"]


EDITS: dict[str, tuple[Edit, str]] = {
    "format": (strings(format="other"), "a safetensors file but not a nestling state"),
    "version": (strings(version="0"), "format version 0; this release reads 1"),
    "fingerprint": (strings(fingerprint="b"), r"saved by another model \(fingerprint b, this model is a model\)"),
    "no fingerprint": (lambda h, t: h.pop("fingerprint"), "fingerprint missing"),
    "kind": (strings(kind="Inner"), "checksum"),
    "notes": (strings(extra="{}"), "checksum"),
    "more strings": (strings(more=""), "checksum"),
    "no checksum": (lambda h, t: h.pop("sha256"), "checksum"),
    "a tensor gone": (lambda h, t: t.pop("single.half"), "first difference: single.half"),
    "a tensor more": (lambda h, t: t.update(more=torch.zeros(3)), "first difference: more"),
    "batch sizes": (changed("position", lambda t: t[:2]), r"mixes batch sizes \[2, 3\]"),
    "no rows": (lambda h, t: t.update({n: x[:0] for n, x in t.items()}), "batch sizes"),
    "shape": (changed("single.weight", lambda t: t.mT), r"shape \(3, 9, 7\), this model needs \(1, 7, 9\)"),
    "rank": (changed("single.weight", lambda t: t.flatten(1)), r"single.weight has shape \(3, 63\)"),
    "type": (changed("cache", Tensor.double), "cache is torch.float64, this model needs torch.float32"),
    "NaN": (changed("cache", lambda t: t * torch.nan), "cache holds NaN or infinity"),
    "counter": (changed("position", lambda t: -t), "counter position is negative"),
    "one value": (changed("layers.2.half", lambda t: t + (t == t.max())), "checksum"),
    "signs": (changed("layers.2.half", lambda t: -t), "checksum"),
    "a shorter cache": (changed("cache", lambda t: t[:, :3]), "checksum"),
    "rows dropped": (lambda h, t: t.update({n: x[1:].clone() for n, x in t.items()}), "checksum"),
    "rows reordered": (lambda h, t: t.update({n: x.flip(0) for n, x in t.items()}), "checksum"),
    "swapped": (swapped, "checksum"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_valid_safetensors_file_with_other_content_is_refused(saved: tuple[Outer, Path], edit: str) -> None:
    _, path = saved
    header, tensors = header_of(path), load_file(path)
    change, message = EDITS[edit]
    change(header, tensors)
    save_file(tensors, path, header)
    with pytest.raises(StateFileError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_the_same_bytes_in_another_shape_are_refused(tmp_path: Path) -> None:
    """An empty template accepts any length of dimension 1, so only the checksum knows where rows ended."""
    path = tmp_path / "memory"
    Inner(torch.arange(12.0).reshape(2, 6), torch.zeros(2, 1)).write_file(path, "a model")
    header = header_of(path)
    save_file({"weight": torch.arange(12.0).reshape(1, 12), "half": torch.zeros(1, 2)}, path, header)
    with pytest.raises(StateFileError, match="checksum"):
        Inner(torch.zeros(1, 0), torch.zeros(1, 0)).read_file(path, "a model")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["disk", "interrupt"])
@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    saved: tuple[Outer, Path], monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    state, path = saved

    def broken(*args: Any, **_: Any) -> None:
        if where == "save_file":
            Path(args[1]).write_bytes(b"half a fi")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checked_file if where == "save_file" else checked_file.os, where, broken)
        with pytest.raises(type(error)):
            make_state(seed=2).write_file(path, "a model")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_equal(read(path), state)
    make_state(seed=2).write_file(path, "a model")
    assert_equal(read(path), make_state(seed=2))
