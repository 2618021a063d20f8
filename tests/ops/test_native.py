"""The compiled chunk, reads, inner gradients, normalisation and convolution against torch's own operations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.ops import native
from nestling.ops.chunk_step import ChunkDecay, chunk_step
from nestling.ops.native import build
from nestling.ops.normalize import safe_normalize
from nestling.ops.short_conv import short_conv

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


def both(monkeypatch: pytest.MonkeyPatch, run) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` gives compiled, and through torch."""
    compiled = run()
    with monkeypatch.context() as patch:
        patch.setattr(native, "fits", lambda *_: False)
        return compiled, run()


def assert_same(compiled: list[Tensor], plain: list[Tensor], tolerance: float = 1e-11) -> None:
    assert len(compiled) == len(plain)
    for i, (a, b) in enumerate(zip(compiled, plain, strict=True)):
        # Of a bank without deep memories the gradient is empty on one side and absent on the other.
        if a is None or b is None:
            assert all(t is None or t.numel() == 0 for t in (a, b)), i
        else:
            assert a.shape == b.shape, i
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"result {i}: {m}")


def values_and_gradients(outputs, inputs) -> list[Tensor]:
    found = [o for o in outputs if o is not None]
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in found]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return [*found, *torch.autograd.grad(found, wanted, upstream, allow_unused=True)]


SIZES = [(2, 7, 5, 9, 4), (1, 23, 16, 37, 20), (3, 1, 3, 2, 2), (1, 16, 16, 16, 16), (0, 33, 8, 66, 8)]


@dataclass(frozen=True)
class Case:
    """One chunk: sizes (memories 0: no such dimension) and what it has."""

    memories: int
    chunk: int
    width: int
    out: int
    answers: int
    momentum: bool
    erases: bool
    reads: bool
    before: bool
    normalise: bool
    missing: bool
    at_hand: bool
    online: bool

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(2, 2, *shape, dtype=torch.float64)

    def rate(self) -> Tensor:
        return torch.rand(2, 2, self.chunk, dtype=torch.float64)

    def inputs(self) -> dict[str, Tensor | None]:
        stack = (self.memories,) if self.memories else ()
        x = self.normal(*stack, self.chunk, self.width)
        made = {
            "x": x if self.normalise else safe_normalize(x),
            "g": self.normal(*stack, self.chunk, self.out),
            "lr": self.rate() * (0.3 if self.online else 1.0),
            "erase": self.rate() if self.erases else None,
            "log_a": -0.3 * self.rate(),
            "log_b": -self.rate() if self.momentum else None,
            "weight": self.normal(*stack, self.out, self.width),
            "surprise": self.normal(*stack, self.out, self.width) if self.momentum else None,
            "recalled": self.normal(*stack, self.chunk, self.out) if self.at_hand else None,
            "q": self.normal(self.chunk, self.width) if self.reads else None,
        }
        return {name: None if t is None else t.requires_grad_() for name, t in made.items()}

    def run(self, i: dict[str, Tensor | None], valid: Tensor | None) -> list[Tensor]:
        outputs = chunk_step(
            i["x"], i["g"], i["lr"], i["erase"], ChunkDecay(i["log_a"], i["log_b"], valid), i["weight"], i["surprise"],
            recalled=i["recalled"], q=i["q"], answers=self.answers, normalise=self.normalise, read_before=self.before,
            online=self.online,
        )  # fmt: skip
        return values_and_gradients(outputs, i.values())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("erases", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_chunk(monkeypatch, sizes, momentum, erases, online) -> None:
    """Every combination of read, time of the read, normalisation, missing tokens and products at hand."""
    for flags in itertools.product([False, True], repeat=5):
        torch.manual_seed(0)
        case = Case(*sizes, momentum, erases, *flags, online)
        inputs, valid = case.inputs(), torch.rand(2, 1, case.chunk) < 0.6 if case.missing else None
        if case.erases or case.online or not case.at_hand:
            assert_same(*both(monkeypatch, partial(case.run, inputs, valid)))


LAYERS = [
    {},
    {"momentum": True},
    {"erase": False, "momentum": True},
    {"depth": 3, "momentum": True},
    {"depth": 4, "expansion": 2},
    {"adapt": ("memory",), "self_targets": False},
    {"adapt": ("memory", "k", "q", "eta")},
    {"self_targets": False},
    {"objective": "dot"},
    {"activation": "gelu"},
    {"activation": "relu"},
    {"clip": 0.3},
    {"self_chunk_size": 14, "momentum": True},
    {"self_chunk_size": 14, "adapt": ("memory", "eta")},
    {"adapt": ("memory", "k", "v", "q")},
    {"depth": 9},
    {"memory": "matrix", "momentum": True},
]


@pytest.mark.parametrize("settings", LAYERS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_layer(monkeypatch, settings, padded) -> None:
    """Outputs of two calls, the state, and the gradients of every parameter."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(
        SelfModifyingConfig(hidden_size=12, num_heads=2, **({"chunk_size": 7} | settings))
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(3, 25, 12, dtype=torch.float64, requires_grad=True)
    mask = None
    if padded:
        mask = torch.ones(3, 25, dtype=torch.bool)
        mask[0, :9] = mask[1, 20:] = False

    def run() -> list[Tensor]:
        first, state = layer(x, None, mask)
        second, state = layer(x * 0.7, state, mask)
        outputs = [first, second, *state.main.running, *(state.main.surprise or ())]
        return values_and_gradients(outputs, [x, *layer.parameters()])

    assert_same(*both(monkeypatch, run), tolerance=1e-9)


def test_layer_in_float32(monkeypatch) -> None:
    """The vectorised exponential and the order of sums differ by rounding alone."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=128, num_heads=2, momentum=True))
    x = torch.randn(2, 150, 128, requires_grad=True)

    def run() -> list[Tensor]:
        return values_and_gradients([layer(x)[0]], [x, *layer.parameters()])

    for a, b in zip(*both(monkeypatch, run), strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("width", [1, 5, 64])
def test_normalize(monkeypatch, width) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, width, dtype=torch.float64)
    x[0, 0], x[1, 1, 0], x[2, 2, 0] = 0.0, 1e30, -1e30
    x.requires_grad_()
    assert_same(*both(monkeypatch, lambda: values_and_gradients([safe_normalize(x)], [x])))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("channels", [3, 32, 70])
@pytest.mark.parametrize("tokens", [11, 64, 150])
def test_short_conv(monkeypatch, taps, channels, tokens) -> None:
    torch.manual_seed(0)
    x, weight, tail = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((2, tokens, channels), (channels, taps), (2, taps - 1, channels))
    )
    assert_same(*both(monkeypatch, lambda: values_and_gradients(short_conv(x, weight, tail), [x, weight, tail])))


def test_second_derivatives_exist() -> None:
    """The compiled backward pass has none of its own; torch stands in for it."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=4, num_heads=1, chunk_size=3, momentum=True)).double()
    x = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,), atol=1e-4)


@pytest.mark.parametrize("where", ["x", "weight"])
def test_nan_is_not_swallowed(where) -> None:
    """A stopped training names the layer whose state broke; a kernel that hid NaN would hide that."""
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=8, num_heads=1, chunk_size=4))
    x = torch.randn(1, 8, 8)
    if where == "x":
        x[0, 2, 3] = torch.nan
    else:
        with torch.no_grad():
            layer.main.initial[0][0, 0, 0] = torch.nan
    y, state = layer(x)
    assert y[:, 2:].isnan().all()
    assert any(t.isnan().any() for t in state.main.running)


@pytest.mark.any_shapes
@pytest.mark.parametrize("conv", [1, 4])
def test_a_state_of_other_shape_is_refused(conv) -> None:
    """Compiled code reads raw memory: a state of fewer rows must end in a sentence, not in a crash."""
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=8, num_heads=1, conv_size=conv))
    _, state = layer(torch.randn(2, 6, 8))
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(3, 6, 8), state)
    narrow = SelfModifyingTitans(SelfModifyingConfig(hidden_size=4, num_heads=1, conv_size=conv))
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(2, 6, 8), narrow(torch.randn(2, 6, 4))[1])


def test_threads_change_nothing() -> None:
    """Every problem is one thread's from end to end."""
    layer = SelfModifyingTitans(SelfModifyingConfig(hidden_size=64, num_heads=4, chunk_size=16, momentum=True))
    x = torch.randn(2, 40, 64)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(layer(x)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("broken", ["compiler", "library", "home"])
def test_what_cannot_be_built_is_done_without(monkeypatch, tmp_path: Path, caplog, broken) -> None:
    """A compiler that fails, a damaged file in the cache, or no place for a cache leaves torch and one warning."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    elif broken == "compiler":
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\necho 'error: no such target' >&2\nexit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    else:
        monkeypatch.setattr(build, "_compile", lambda compiler, file: file.write_bytes(b"not a library"))
    build.library.cache_clear()
    try:
        assert build.library() is None
        assert "more slowly" in caplog.text
        assert not list(tmp_path.glob("nestling/*/*.o"))
        x = torch.randn(1, 6, 8)
        assert SelfModifyingTitans(SelfModifyingConfig(hidden_size=8, num_heads=1))(x)[0].isfinite().all()
    finally:
        build.library.cache_clear()


def test_it_can_be_turned_off(monkeypatch) -> None:
    monkeypatch.setenv("NESTLING_NATIVE", "0")
    build.library.cache_clear()
    try:
        assert build.library() is None
    finally:
        build.library.cache_clear()


class Bfloat16Products(TorchFunctionMode):
    """Rounds what enters a product of float32 tensors, as hardware with bfloat16 products does, and counts them."""

    NAMES = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "baddbmm_", "addmm", "mm", "linear"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.count += 1
            args = tuple(a.bfloat16().float() if isinstance(a, Tensor) and a.dim() > 1 else a for a in args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_products_in_bfloat16_on_request(memory) -> None:
    """Then PyTorch makes the products; the solve and the state stay in float32, and the answer is near."""
    config = SelfModifyingConfig(hidden_size=32, num_heads=2, chunk_size=16, memory=memory, momentum=True)
    layer, x = SelfModifyingTitans(config), torch.randn(2, 75, 32)
    exact, _ = layer(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not native.fits(x, x) and native.fits(x) and native.fits(x.double(), x.double())
        with Bfloat16Products() as products:
            y, state = layer(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert products.count > 20
    assert all(t.dtype == torch.float32 for _, t in state.main.tensors())
    error = float((y - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.05
