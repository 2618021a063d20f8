"""Linear memories and Mamba-2 on long hostile streams: everything stays finite, and what forgets stays bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config
from nestling.layers.rwkv7 import RWKV7, RWKV7Config
from nestling.layers.scalar_retention import data_log_retention
from nestling.layers.sequence import SequenceLayer
from nestling.memory.state import State
from nestling.ops.chunk_rule import chunk_scan
from tests.layers.reference_linear import ROWS
from tests.layers.test_self_modifying_streams import HIDDEN, hostile

SHORT, LONG, CALL = 12_000, 1_000_000, 4000


def linear(**settings: Any) -> LinearMemory:
    return LinearMemory(LinearMemoryConfig(**{"hidden_size": HIDDEN, "num_heads": 2} | settings))


LAYERS: dict[str, Callable[[], SequenceLayer]] = {
    **{row: (lambda settings=settings: linear(**settings)) for row, settings in ROWS.items()},
    "rwkv7": lambda: RWKV7(RWKV7Config(HIDDEN, 2)),
    "mamba2": lambda: Mamba2(Mamba2Config(HIDDEN, 4, state_size=8, num_groups=2)),
}

# Biases that training could reach: no forgetting, all forgetting, and a rate of forgetting beyond float32.
EXTREMES: dict[str, dict[str, float]] = {
    "keeps": {"A_log": -40.0, "dt_bias": -40.0},
    "forgets": {"A_log": 5.0, "dt_bias": 50.0},
    "overflows": {"A_log": 200.0, "dt_bias": -200.0},
}


def make_layer(name: str) -> SequenceLayer:
    torch.manual_seed(0)
    return LAYERS[name]()


@torch.no_grad()
def stream(layer: SequenceLayer, tokens: int, call: int = CALL) -> Tensor:
    """Largest fast weight `[calls, streams]`; fails at the first value that is not finite."""
    state: State | None = None
    names, peaks = list(hostile(0, 1)), []
    for start in range(0, tokens, call):
        x = torch.stack(list(hostile(start, min(start + call, tokens)).values()))
        y, state = layer(x, state)
        peaks.append(state.weight.flatten(1).abs().amax(1))  # type: ignore[attr-defined]
        good = torch.isfinite(y.flatten(1)).all(1) & torch.isfinite(peaks[-1])
        broken = [n for n, g in zip(names, good.tolist(), strict=True) if not g]
        assert not broken, f"not finite within {start + x.shape[1]} tokens: {broken}"
    assert state is not None and state.first_nonfinite() is None
    return torch.stack(peaks)


def assert_bounded(name: str, peaks: Tensor) -> None:
    """What erases or forgets keeps its size. Linear attention adds up, at most in proportion to the tokens, and so do
    two full reflections along one key, which leave the memory as it is but for the difference of their values."""
    calls = len(peaks)
    allowed = 1.01 * calls if name.startswith(("linear attention", "gated deltaproduct")) else 3
    growth = peaks[-1] / peaks[: max(calls // 10, 2)].amax(0).clamp_min(1.0)
    report = {n: round(g, 2) for n, g in zip(hostile(0, 1), growth.tolist(), strict=True)}
    assert bool((growth <= allowed).all()), f"the fast weights grow: {report}"


@pytest.mark.parametrize("name", LAYERS)
def test_twelve_thousand_tokens(name: str) -> None:
    assert_bounded(name, stream(make_layer(name), SHORT, 2000))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_million_tokens(name: str) -> None:
    assert_bounded(name, stream(make_layer(name), LONG))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", ["gated deltanet", "gated deltaproduct", "comba", "kimi delta", "mamba2"])
def test_retentions_at_their_ends(name: str, extreme: str) -> None:
    """Values and gradients."""
    layer = make_layer(name)
    with torch.no_grad():
        for key, value in EXTREMES[extreme].items():
            layer.get_parameter(key).fill_(value)
    stream(layer, 400, 200)
    assert_gradients_are_finite(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_gradients_are_finite(name: str) -> None:
    assert_gradients_are_finite(make_layer(name))


def assert_gradients_are_finite(layer: SequenceLayer) -> None:
    x = torch.stack(list(hostile(0, 160).values())).requires_grad_()
    y, _ = layer(x)
    y.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key


@pytest.mark.parametrize("name", LAYERS)
def test_enormous_inputs_do_not_overflow(name: str) -> None:
    """1e30 in, finite out, in value and gradient: entries count as 1e6 at most."""
    layer = make_layer(name)
    x = (1e30 * torch.randn(2, 40, HIDDEN)).requires_grad_()
    y, state = layer(x)
    assert bool(torch.isfinite(y).all()) and state.first_nonfinite() is None
    y.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters() if p.grad is not None)


def test_a_query_that_matches_nothing_reads_zero() -> None:
    """elu(x) + 1 of a very negative key is 0 in float32: numerator and denominator are both 0."""
    layer = linear(**ROWS["linear attention"])
    with torch.no_grad():
        layer.in_proj.weight[: 2 * HIDDEN].fill_(-1.0)
    x = torch.full((1, 5, HIDDEN), 1e4).requires_grad_()
    y, state = layer(x)
    y.sum().backward()
    assert not bool(y.any()) and not bool(state.weight.any())
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_retention_after_a_token_that_wipes_the_memory_is_exact() -> None:
    """A log retention of -1e6 in a chunk must not cost the ones after it their digits."""
    steps = torch.rand(1, 1, 60, dtype=torch.float64)
    steps[..., 5] = 1e6
    x = torch.randn(1, 1, 60, 4, dtype=torch.float64)

    def read(dtype: torch.dtype) -> Tensor:
        log_a = data_log_retention(steps.to(dtype), torch.full((1,), -3.0, dtype=dtype))
        k = x.to(dtype)
        return chunk_scan(k, -k, k, weight=k.new_zeros(1, 1, 4, 4), chunk_size=64, log_retention=log_a)[0].double()

    torch.testing.assert_close(read(torch.float32), read(torch.float64), rtol=1e-4, atol=1e-4)
