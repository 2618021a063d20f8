"""RWKV-7's time mixing: equal to the token-by-token reference and, with its memory, to flash-linear-attention's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.mamba2 import Mamba2, Mamba2Config
from nestling.layers.rwkv7 import RWKV7, RWKV7Config, RWKV7State
from tests.layers.battery import close, gradients, noise, weigh
from tests.layers.reference_rwkv7 import finish, reference_rwkv7, streams_of
from tests.oracles import fla_naive, float32_is_float64

HIDDEN = 8


def make_layer(**settings: Any) -> RWKV7:
    """A float64 layer whose parameters are all away from their first values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_heads": 2, "decay_rank": 3, "gate_rank": 5, "chunk_size": 4}
    layer = RWKV7(RWKV7Config(**sizes | settings)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def run(layer: RWKV7, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and final fast weights."""
    y, state = layer(x)
    assert isinstance(state, RWKV7State)
    return y, state.weight


def assert_equal(layer: RWKV7, x: Tensor, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Outputs, final state, and the gradients of the input and every parameter."""
    close(found, wanted)
    grads, expected = (gradients(weigh(y) + weigh(w, 6), [x], layer) for y, w in (found, wanted))
    close(grads, expected)
    assert all(bool(g.any()) for g in grads), "something receives no gradient"


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 64}, {"num_heads": 1, "chunk_size": 1}, {"num_heads": 4}])
def test_equals_the_token_by_token_reference(settings: dict[str, Any]) -> None:
    layer = make_layer(**settings)
    x = noise(2, 11, HIDDEN).requires_grad_()
    assert_equal(layer, x, run(layer, x), reference_rwkv7(layer, x))


@pytest.mark.parametrize("time", [2, 65])
def test_the_memory_is_flash_linear_attentions(time: int) -> None:
    """Their diagonal-plus-low-rank recurrence with alpha = -kappa and beta = a kappa, between our projections."""
    layer = make_layer(chunk_size=16)
    x = noise(2, time, HIDDEN).requires_grad_()
    with float32_is_float64():
        s = streams_of(layer, x)
        r, k, v, kappa, rate, log_w = (t.transpose(1, 2) for t in (s.r, s.k, s.v, s.kappa, s.rate, s.w.log()))
        theirs = fla_naive("generalized_delta_rule/dplr").dplr_recurrence
        o, state = theirs(layer.config.head_dim**0.5 * r, k, v, -kappa, rate * kappa, log_w)
        assert_equal(layer, x, run(layer, x), (finish(layer, o.transpose(1, 2), s), state.mT))


def test_gradcheck() -> None:
    layer = make_layer(hidden_size=4, chunk_size=2)
    names = [n for n, _ in layer.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, state.weight

    leaves = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(output, (noise(1, 3, 4).requires_grad_(), *leaves), fast_mode=True)


def test_ranks_go_with_the_width() -> None:
    assert RWKV7Config(1024, 16).ranks == (64, 160)
    assert RWKV7Config(2048, 32).ranks == (128, 224)
    assert RWKV7Config(2048, 32, decay_rank=96, gate_rank=256).ranks == (96, 256)


def test_channels_begin_with_different_memories() -> None:
    """The first retentions reach from 0.55, which forgets at once, to 0.998."""
    layer = RWKV7(RWKV7Config(128, 2))
    first = torch.exp(-torch.exp(torch.tensor(-0.5)) * torch.sigmoid(layer.decay_bias))
    assert 0.545 < float(first.min()) < 0.6 and 0.99 < float(first.max()) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, not 0.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**settings)


def test_another_layers_state_is_refused() -> None:
    state = Mamba2(Mamba2Config(HIDDEN, 2, state_size=4)).init_state(2)
    with pytest.raises(TypeError, match="continues from an RWKV7State, not from Mamba2State"):
        make_layer()(noise(2, 3, HIDDEN), state)


def test_autocast_keeps_the_memory_in_float32() -> None:
    layer = make_layer().float()
    x = noise(2, 40, HIDDEN).float()
    wanted, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert all(t.dtype == torch.float32 for _, t in state.tensors())
    assert y.dtype == torch.bfloat16
    assert float((y - wanted).norm() / wanted.norm()) < 0.1
