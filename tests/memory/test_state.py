"""States as values, and as files that cannot be mistaken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nestling.memory import checked_file
from nestling.memory.state import State, StateFileError


@dataclass
class Inner(State):
    """A nested state with an optional list."""

    weights: list[Tensor]
    surprise: list[Tensor] | None


@dataclass
class Outer(State):
    """Everything a state may hold."""

    fast: Inner
    layers: list[Inner | None]
    cache: Tensor
    position: Tensor
    nothing: Tensor | None = None


def make(rows: int = 3, cache: int = 2) -> Outer:
    """A state with a different value in every entry."""
    torch.manual_seed(1)

    def inner(momentum: bool) -> Inner:
        weights = [torch.randn(rows, 2, 3), torch.randn(rows, 4)]
        return Inner(weights, [torch.randn(rows, 2)] if momentum else None)

    return Outer(inner(True), [inner(False), None, inner(True)], torch.randn(rows, cache, 2), torch.arange(rows) + 7)


def same(a: State, b: State) -> bool:
    """Equal names, values and types."""
    left, right = dict(a.tensors()), dict(b.tensors())
    if left.keys() != right.keys():
        return False
    return all(t.dtype == right[n].dtype and torch.equal(t, right[n]) for n, t in left.items())


def test_tensors_have_dotted_names() -> None:
    assert [n for n, _ in make().tensors()] == [
        "fast.weights.0",
        "fast.weights.1",
        "fast.surprise.0",
        "layers.0.weights.0",
        "layers.0.weights.1",
        "layers.2.weights.0",
        "layers.2.weights.1",
        "layers.2.surprise.0",
        "cache",
        "position",
    ]


def test_select_picks_orders_and_repeats() -> None:
    state = make()
    for rows in ([2, 0, 2], torch.tensor([2, 0, 2]), [-1, 0, -1]):
        chosen = state.select(rows)
        assert isinstance(chosen, Outer) and chosen.layers[1] is None and chosen.nothing is None
        for (_, a), (_, b) in zip(chosen.tensors(), state.tensors(), strict=True):
            assert torch.equal(a, b[[2, 0, 2]])
    assert state.select([]).batch_size == 0


@pytest.mark.parametrize("rows", [[3], [-4], [0, 5]])
def test_select_refuses_rows_outside_the_batch(rows: list[int]) -> None:
    with pytest.raises(IndexError, match="are outside this state's batch of 3"):
        make().select(rows)


def test_select_and_detach_with_gradients() -> None:
    leaf = torch.randn(3, 2, requires_grad=True)
    state = Inner([leaf * 2], None)
    (gradient,) = torch.autograd.grad(state.select([1, 1]).weights[0].sum(), leaf)
    assert gradient.tolist() == [[0, 0], [4, 4], [0, 0]]
    assert not state.detach().weights[0].requires_grad
    assert state.weights[0].requires_grad


def test_clone_is_independent() -> None:
    state = make()
    copy = state.clone()
    assert same(copy, state)
    for _, tensor in copy.tensors():
        tensor.zero_()
    assert same(state, make())


def test_to_leaves_counters_on_the_cpu() -> None:
    moved = make().to("meta")
    assert moved.position.device.type == "cpu"
    assert all(t.device.type == "meta" for n, t in moved.tensors() if n != "position")


def test_size() -> None:
    state = Inner([torch.zeros(5, 3), torch.zeros(5, dtype=torch.float64)], None)
    assert state.batch_size == 5
    assert state.nbytes == 5 * 3 * 4 + 5 * 8
    assert Inner([], None).batch_size == 0 == Inner([], None).nbytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_first_nonfinite_names_the_tensor(value: float) -> None:
    state = make()
    assert state.first_nonfinite() is None
    layer = state.layers[2]
    assert layer is not None
    layer.weights[1][0, 2] = value
    assert state.first_nonfinite() == "layers.2.weights.1"


def test_a_file_gives_the_state_back(tmp_path: Path) -> None:
    path, state = tmp_path / "memory.safetensors", make()
    state.write_file(path, "model", note="read up to page 3")
    assert same(make(rows=1).read_file(path, "model"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]


def test_views_and_expanded_tensors_are_written_whole(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = Inner([weight.expand(4, 2, 3), weight.expand(4, 2, 3).mT], None)
    state.write_file(tmp_path / "a", "model")
    assert same(state.read_file(tmp_path / "a", "model"), state)


def test_an_empty_template_dimension_may_grow(tmp_path: Path) -> None:
    make(cache=5).write_file(tmp_path / "a", "model")
    assert same(make(cache=0).read_file(tmp_path / "a", "model"), make(cache=5))
    with pytest.raises(StateFileError, match=r"cache has shape \(3, 5, 2\), this model needs \(3, 2, 2\)"):
        make(cache=2).read_file(tmp_path / "a", "model")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.safetensors"
    make().write_file(path, "model")
    before = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checked_file, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make(rows=1).write_file(path, "model")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="no state file at"):
        make().read_file("/nonexistent/memory", "model")


def test_another_models_file(tmp_path: Path) -> None:
    make().write_file(tmp_path / "a", "model A")
    with pytest.raises(StateFileError, match=r"saved by another model \(fingerprint model A, this model is model B\)"):
        make().read_file(tmp_path / "a", "model B")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a"
    make().write_file(path, "model")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StateFileError, match="damaged or not a safetensors file"):
        make().read_file(path, "model")


def test_a_damaged_header_never_escapes_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make().write_file(path, "model")
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    for at in range(0, size, 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        try:
            make().read_file(path, "model")
        except StateFileError:
            continue


def test_not_a_state_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("a shopping list")
    with pytest.raises(StateFileError, match="damaged or not a safetensors file"):
        make().read_file(path, "model")
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(StateFileError, match="not a nestling state"):
        make().read_file(path, "model")
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "nestling-state", "version": "99"})
    with pytest.raises(StateFileError, match="has format version 99; this release reads 1"):
        make().read_file(path, "model")


def test_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "a"
    Inner([torch.zeros(2, 3)], None).write_file(path, "m")
    with pytest.raises(StateFileError, match=r"weights.0 has shape \(2, 3\), this model needs \(1, 4\)"):
        Inner([torch.zeros(1, 4)], None).read_file(path, "m")
    with pytest.raises(StateFileError, match=r"weights\.0 has shape"):
        Inner([torch.zeros(1, 3, 1)], None).read_file(path, "m")
    with pytest.raises(StateFileError, match=r"does not have this model's tensors; first difference: surprise.0"):
        Inner([torch.zeros(1, 3)], [torch.zeros(1, 3)]).read_file(path, "m")
    with pytest.raises(StateFileError, match=r"weights.0 is torch.float32, this model needs torch.float64"):
        Inner([torch.zeros(1, 3, dtype=torch.float64)], None).read_file(path, "m")


def test_damaged_contents(tmp_path: Path) -> None:
    path = tmp_path / "a"
    Inner([torch.zeros(2, 3), torch.zeros(4, 3)], None).write_file(path, "m")
    with pytest.raises(StateFileError, match=r"mixes batch sizes \[2, 4\]"):
        Inner([torch.zeros(1, 3), torch.zeros(1, 3)], None).read_file(path, "m")
    Inner([torch.zeros(0, 3)], None).write_file(path, "m")
    with pytest.raises(StateFileError, match="mixes batch sizes"):
        Inner([torch.zeros(1, 3)], None).read_file(path, "m")
    Inner([torch.full((2, 3), float("nan"))], None).write_file(path, "m")
    with pytest.raises(StateFileError, match=r"weights\.0 holds NaN or infinity; the file is damaged"):
        Inner([torch.zeros(1, 3)], None).read_file(path, "m")
