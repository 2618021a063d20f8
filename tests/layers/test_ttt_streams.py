"""TTT layers on long hostile streams: everything stays finite, and the fast weights stay bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestling.layers.ttt import TTTConfig, TTTLayer
from tests.layers.test_self_modifying_streams import CALL, HIDDEN, assert_bounded, hostile, stream

CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear mean": {"step": "mean"},
    "linear transformer backbone": {"conv_size": 1, "output_gate": False},
    "mlp": {"inner": "mlp"},
    "mlp mean": {"inner": "mlp", "step": "mean"},
}

EXTREMES = ("rates at their ends", "large norm", "small norm", "long keys", "large first weights")


def make_layer(**settings: Any) -> TTTLayer:
    """A float32 layer at its first parameters."""
    torch.manual_seed(0)
    return TTTLayer(TTTConfig(**{"hidden_size": HIDDEN, "num_heads": 2} | settings))


@torch.no_grad()
def exaggerate(layer: TTTLayer, extreme: str) -> None:
    """Parameters that training could reach."""
    layer.rate_proj.bias.fill_(20.0)
    if layer.token_scale is not None:
        layer.token_scale.fill_(1.0)
    if extreme == "large norm":
        layer.inner.norm_weight.fill_(5.0)
        layer.inner.norm_bias.normal_()
    if extreme == "small norm":
        layer.inner.norm_weight.fill_(0.1)
        layer.inner.norm_bias.normal_()
    if extreme == "long keys":
        layer.in_proj.weight.mul_(10.0)
    if extreme == "large first weights":
        for weight in layer.inner.initial:
            weight.mul_(100.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_ten_thousand_tokens(name: str) -> None:
    assert_bounded(stream(make_layer(**CONFIGS[name]), 10_000, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_million_tokens(name: str) -> None:
    assert_bounded(stream(make_layer(**CONFIGS[name]), 1_000_000, CALL))


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", ["linear", "mlp mean"])
def test_parameters_at_their_ends_are_stable(name: str, extreme: str) -> None:
    """No rate, norm or projection makes a memory diverge; the first step may be long, what follows is not longer."""
    layer = make_layer(**CONFIGS[name])
    exaggerate(layer, extreme)
    assert_bounded(stream(layer, 2000, 200))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [1.0, 1e20])
def test_float32_gradients_are_finite(name: str, size: float) -> None:
    """Also where no fast weight has a say: zeros in, and entries that are cut at the bound."""
    layer = make_layer(**CONFIGS[name] | {"output_gate": False})
    x = (size * torch.stack(list(hostile(0, 80).values()))).requires_grad_()
    y, state = layer(x)
    assert bool(torch.isfinite(y).all()) and state.first_nonfinite() is None
    (y.sum() + sum(t.square().sum() for t in state.memory.running)).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key
