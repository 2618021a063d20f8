"""The compiled loop over all chunks of a call against the same chunk after chunk through torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.ops import native
from nestling.ops.native import build
from tests.ops.test_native import assert_same, both, values_and_gradients

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")

ALL = ("memory", "k", "v", "q", "eta", "alpha")
MATRIX: dict[str, Any] = {"memory": "matrix"}
ONLINE: dict[str, Any] = {"gradient": "online"}
FOLLOWS: dict[str, Any] = ONLINE | {"momentum": True}
WHOLE: dict[str, Any] = ONLINE | {
    "share_of": "rate",
    "own_streams": True,
    "anchored": True,
    "others_scale": 0.3,
    "generation_gain": 0.6,
    "hidden_lr_scale": 0.2,
    "identity": True,
    "rate_stretch": 1.3,
    "gate_bias": 1.0,
    "value_length": 0.7,
}
TITANS: list[dict[str, Any]] = [
    {},
    {"momentum": True},
    {"erase": False},
    {"erase": False, "momentum": True},
    {"depth": 3, "momentum": True},
    {"depth": 4, "expansion": 2},
    {"hidden_size": 38, "momentum": True},
    {"adapt": ("memory",), "self_targets": False},
    {"adapt": ("memory", "k", "q", "eta"), "momentum": True},
    {"adapt": ("memory", "v", "alpha")},
    {"adapt": ("memory", "k", "v")},
    {"adapt": ("memory", "eta"), "momentum": True},
    {"adapt": ALL, "momentum": True},
    {"self_targets": False, "momentum": True},
    {"objective": "dot", "momentum": True},
    {"activation": "gelu"},
    {"activation": "relu", "momentum": True},
    {"clip": 0.3, "momentum": True},
    {"use_retention": False, "momentum": True},
    {"read_before": True, "momentum": True},
    {"chunk_size": 1, "momentum": True},
    {"chunk_size": 40, "momentum": True},
    MATRIX,
    MATRIX | {"momentum": True, "adapt": ALL},
    MATRIX | {"erase": False},
    MATRIX | {"objective": "dot", "self_targets": False},
    MATRIX | ONLINE,
    MATRIX | ONLINE | {"erase": False},
    MATRIX | ONLINE | {"objective": "dot", "self_targets": False},
    MATRIX | {"read_before": True},
    ONLINE,
    ONLINE | {"depth": 3, "self_targets": False},
    ONLINE | {"erase": False, "clip": 0.3},
    ONLINE | {"objective": "dot"},
    FOLLOWS,
    FOLLOWS | {"depth": 3, "self_targets": False},
    FOLLOWS | {"erase": False, "clip": 0.3},
    FOLLOWS | {"objective": "dot"},
    FOLLOWS | {"read_before": True, "use_retention": False, "adapt": ("memory", "k", "eta")},
    FOLLOWS | MATRIX | {"adapt": ALL},
    FOLLOWS | MATRIX | {"erase": False, "chunk_size": 1},
    FOLLOWS | WHOLE,
    FOLLOWS | WHOLE | {"adapt": ALL, "depth": 3, "expansion": 2},
    FOLLOWS | WHOLE | {"adapt": ("memory",), "hidden_size": 38},
    FOLLOWS | WHOLE | {"share_of": "erase", "clip": 0.3},
    FOLLOWS | WHOLE | MATRIX | {"adapt": ALL, "clip": 0.3},
    FOLLOWS | WHOLE | MATRIX | {"self_targets": False},
    WHOLE,
    WHOLE | {"adapt": ALL, "depth": 3, "expansion": 2},
    WHOLE | {"adapt": ("memory", "k", "eta"), "clip": 0.3, "activation": "gelu"},
    WHOLE | {"adapt": ("memory",)},
    WHOLE | {"self_targets": False},
    WHOLE | {"adapt": ("memory", "alpha"), "self_targets": False, "hidden_size": 38},
    WHOLE | {"gradient": "chunk", "share_of": "erase", "momentum": True},
    WHOLE | MATRIX,
    WHOLE | MATRIX | {"adapt": ALL, "clip": 0.3},
    WHOLE | MATRIX | {"adapt": ("memory",), "self_targets": False},
    WHOLE | MATRIX | {"adapt": ("memory", "eta", "alpha"), "self_targets": False, "hidden_size": 38},
    WHOLE | MATRIX | {"gradient": "chunk", "share_of": "erase", "momentum": True},
    WHOLE | MATRIX | {"objective": "dot", "share_of": "erase"},
    {"anchored": True, "momentum": True},
    {"anchored": True, "others_scale": 0.3, "momentum": True},
    {"anchored": True, "others_scale": 0.3, "erase": False},
    MATRIX | ONLINE | {"anchored": True, "others_scale": 0.3, "erase": False},
    {"own_streams": True, "adapt": ALL},
    {"self_chunk_size": 14},
    {"self_chunk_size": 14, "adapt": ("memory",)},
    {"self_chunk_size": 14, "momentum": True, "adapt": ("memory", "k", "eta")},
    {"self_chunk_size": 14, "momentum": True, "adapt": ("memory", "alpha")},
    {"self_chunk_size": 14, "depth": 3, "adapt": ("memory", "v", "q")},
    {"self_chunk_size": 14, "objective": "dot", "erase": False, "use_retention": False, "adapt": ALL},
    MATRIX | {"self_chunk_size": 14, "chunk_size": 1, "adapt": ALL},
    WHOLE | {"self_chunk_size": 14, "adapt": ALL},
    WHOLE | {"self_chunk_size": 14, "adapt": ("memory", "eta")},
    WHOLE | MATRIX | {"self_chunk_size": 14, "self_targets": False},
    FOLLOWS | WHOLE | {"self_chunk_size": 28},
]
MEMORY: list[dict[str, Any]] = [
    {},
    {"momentum": False},
    {"depth": 1},
    {"depth": 3, "expansion": 2},
    {"erase": True},
    {"erase": True, "depth": 1, "momentum": False} | ONLINE,
    {"use_retention": False},
    FOLLOWS,
    FOLLOWS | {"depth": 1, "use_retention": False},
    FOLLOWS | {"depth": 3, "erase": True, "rates": "chunk"},
    FOLLOWS | {"erase": True, "read_before": True},
    {"rates": "chunk"},
    {"read_before": True, "activation": "gelu"},
]


@dataclass
class Calls:
    """How often the loop was taken."""

    count: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen, compiled = Calls(), native.native_loop

    def counted(*arguments):
        seen.count += 1
        return compiled(*arguments)

    monkeypatch.setattr(native, "native_loop", counted)
    return seen


def shaken(layer: torch.nn.Module) -> Any:
    """In float64, every parameter away from its first value, so that no gradient is zero by luck."""
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def titans(**settings: Any) -> SelfModifyingTitans:
    torch.manual_seed(0)
    config = SelfModifyingConfig(**{"hidden_size": 12, "num_heads": 2, "chunk_size": 7} | settings)
    return shaken(SelfModifyingTitans(config))


def memory(**settings: Any) -> NeuralMemory:
    torch.manual_seed(0)
    config = NeuralMemoryConfig(**{"hidden_size": 12, "num_heads": 2, "chunk_size": 7} | settings)
    return shaken(NeuralMemory(config))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def carried(state: Any) -> list[Tensor]:
    """The floating-point tensors of a state."""
    return [t for _, t in state.tensors() if t.is_floating_point()]


def read(layer: Any, x: Tensor, lengths: tuple[int, ...]) -> tuple[list[Tensor], Any]:
    """Outputs of consecutive calls of these lengths, and the state after the last."""
    state, outputs = None, []
    for part in x.split(list(lengths), 1):
        y, state = layer(part, state)
        outputs.append(y)
    return outputs, state


# Whole chunks and a part, inside a chunk, one token, to the end of a chunk, across several.
LENGTHS = (25, 2, 1, 7, 14, 3)


def banks(layer: Any) -> int:
    """Loops that a call takes: memories with a chunk of their own have theirs."""
    return 1 if getattr(layer, "own", None) is None else 2


def compare(monkeypatch, layer: Any, calls: Calls, lengths: tuple[int, ...] = LENGTHS) -> None:
    x = normal(3, sum(lengths), layer.config.hidden_size).requires_grad_()

    def run() -> list[Tensor]:
        outputs, state = read(layer, x, lengths)
        return values_and_gradients([*outputs, *carried(state)], [x, *layer.parameters()])

    compiled, plain = both(monkeypatch, run)
    assert calls.count == banks(layer) * len(lengths)
    # A share that no rate uses: a zero from the one, nothing from the other.
    zeroed = [torch.zeros_like(a) if b is None and not a.any() else b for a, b in zip(compiled, plain, strict=True)]
    assert_same(compiled, zeroed, tolerance=1e-10)


@pytest.mark.parametrize("settings", TITANS, ids=str)
def test_self_modifying(monkeypatch, calls, settings) -> None:
    """Outputs, the state with its chunk's first weights, and all gradients through both."""
    compare(monkeypatch, titans(**settings), calls)


@pytest.mark.parametrize("settings", MEMORY, ids=str)
def test_neural_memory(monkeypatch, calls, settings) -> None:
    compare(monkeypatch, memory(**settings), calls)


@pytest.mark.parametrize("settings", [WHOLE, FOLLOWS], ids=str)
def test_chunks_of_hundreds(monkeypatch, calls, settings) -> None:
    compare(monkeypatch, titans(**settings, chunk_size=160), calls, (150, 20))


@pytest.mark.parametrize("of", ["outputs", "running", "start", "surprise", "own"])
@pytest.mark.parametrize("time", [3, 7, 10, 14])
def test_gradients_of_one_result_alone(monkeypatch, calls, of, time) -> None:
    """What has no upstream gradient counts as zero; the chunk's first weights may be given, passed on, or reached."""
    layer = titans(momentum=True, self_chunk_size=14 if of == "own" else 7)
    x = normal(2, 4 + time, 12).requires_grad_()
    initial = layer.own if of == "own" else layer.main

    def run() -> list[Tensor]:
        (_, y), state = read(layer, x, (4, time))
        results = [y] if of == "outputs" else state.own.running if of == "own" else getattr(state.main, of)
        return values_and_gradients(results, [x, *initial.parameters(), layer.conv])

    assert_same(*both(monkeypatch, run), tolerance=1e-10)
    assert calls.count == 2 * banks(layer)


def test_a_copied_state_continues_as_the_original(calls) -> None:
    """A clone's running weights are no longer the same objects as its first weights; the values decide."""
    layer = titans(momentum=True)
    x = normal(2, 14 + 9, 12)
    found = []
    for copy in (False, True):
        y, state = layer(x[:, :14])
        z, state = layer(x[:, 14:], state.clone() if copy else state)
        found.append(values_and_gradients([y, z, *carried(state)], [*layer.parameters()]))
    assert_same(*found)
    assert calls.count == 4


@pytest.mark.parametrize("layer", [titans(momentum=True), memory()], ids=["titans", "memory"])
def test_without_gradients(calls, layer) -> None:
    """Nothing is kept for a backward pass then, and chunks share their memory."""
    x = normal(2, 45, 12)
    wanted, kept = read(layer, x, (31, 14))
    with torch.no_grad():
        found, state = read(layer, x, (31, 14))
    assert calls.count == 4
    for a, b in zip([*found, *carried(state)], [*wanted, *carried(kept)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [titans, memory])
def test_checkpointed(calls, make) -> None:
    """Each segment is a call of the loop, run again in the backward pass."""
    x = normal(2, 31, 12).requires_grad_()
    found = []
    for stride in (None, 2):
        layer = make(momentum=True, checkpoint_chunks=stride)
        y, state = layer(x)
        found.append(values_and_gradients([y, *carried(state)], [x, *layer.parameters()]))
    assert_same(*found)
    assert calls.count == 1 + 2 * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "huber"},
        {"objective": "lp"},
        {"read": "chunk"},
        {"depth": 9},
    ],
    ids=str,
)
def test_what_is_not_covered_goes_chunk_by_chunk(calls, settings) -> None:
    y, _ = titans(**settings)(normal(2, 15, 12))
    assert y.isfinite().all() and not calls.count


def test_chunks_that_outgrow_a_cache_go_through_torch(monkeypatch, calls) -> None:
    monkeypatch.setattr(native, "MAX_CHUNK", 6)
    y, _ = titans(self_chunk_size=14)(normal(2, 15, 12))
    assert y.isfinite().all() and not calls.count
    titans(chunk_size=3, self_chunk_size=9)(normal(2, 15, 12))
    assert calls.count == 1  # of M_memory


@pytest.mark.parametrize(
    "settings", [{"ascend": True}, {"inner_steps": 2, "chunk_size": 1}, {"objective": "lp"}], ids=str
)
def test_what_is_not_covered_of_the_neural_memory(calls, settings) -> None:
    y, _ = memory(**settings)(normal(2, 9, 12))
    assert y.isfinite().all() and not calls.count


def test_rows_out_of_step_go_chunk_by_chunk(calls) -> None:
    """Padding, and rows that stand at different places of their chunks."""
    layer, x = titans(), normal(2, 9, 12)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    _, state = layer(x, None, mask)
    layer(x, state)
    assert not calls.count
    layer(x, state.select([1]).select([0, 0]))
    assert calls.count == 1


@pytest.mark.parametrize("settings", [{"momentum": True}, FOLLOWS, MATRIX | ONLINE, {"self_chunk_size": 14}], ids=str)
def test_second_derivatives(monkeypatch, calls, settings) -> None:
    """Of a call that begins inside a chunk and ends inside another, through its output and its state."""
    layer = titans(**settings)
    x = normal(2, 16, 12).requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p is not layer.share)]

    def run() -> list[Tensor]:
        outputs, state = read(layer, x, (4, 12))
        results = [*outputs, *carried(state)]
        first = torch.autograd.grad(results, wanted, [torch.ones_like(t) for t in results], create_graph=True)
        return values_and_gradients(first, wanted)

    assert_same(*both(monkeypatch, run), tolerance=1e-9)
    assert calls.count == 2 * banks(layer)


@pytest.mark.parametrize(("make", "settings"), [(titans, FOLLOWS | WHOLE), (titans, FOLLOWS), (memory, FOLLOWS)])
def test_gradients_against_differences(calls, make, settings) -> None:
    """Of a call that begins inside a chunk and ends inside another."""
    layer = make(**settings)
    before, x = normal(1, 3, 12), normal(1, 9, 12)
    small = [p for n, p in layer.named_parameters() if "proj" not in n and "initial" not in n and "conv" not in n]

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        y, state = layer(leaves[0], layer(before)[1])
        return (y, *carried(state))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *small), fast_mode=True)
    assert calls.count


@pytest.mark.parametrize("settings", [{}, {"momentum": True}, FOLLOWS], ids=str)
@pytest.mark.parametrize("make", [titans, memory])
def test_in_float32(monkeypatch, calls, make, settings) -> None:
    """The vectorised exponential and the order of sums differ by rounding alone."""
    layer, x = make(**settings, hidden_size=64, chunk_size=32).float(), normal(2, 75, 64).float().requires_grad_()

    def run() -> list[Tensor]:
        y, state = layer(x)
        return values_and_gradients([y, *carried(state)], [x, *layer.parameters()])

    for a, b in zip(*both(monkeypatch, run), strict=True):
        assert a is b is None or (a - b).norm() <= 2e-4 * b.norm() + 1e-6
    assert calls.count


def test_a_state_of_another_layer_is_refused() -> None:
    state = titans(expansion=2)(normal(2, 6, 12))[1]
    with pytest.raises(ValueError, match="another layer"):
        titans()(normal(2, 6, 12), state)
