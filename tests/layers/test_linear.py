"""Linear memories: equal to the token-by-token reference, and settings that must equal one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.linear import LinearMemory, LinearMemoryState
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config
from tests.layers.battery import close, gradients, noise, weigh
from tests.layers.reference_linear import ROWS, reference_linear

HIDDEN = 8
PLAIN: dict[str, Any] = {"conv_size": 1, "output_gate": "none", "output_norm": "none"}

CASES: dict[str, dict[str, Any]] = ROWS | {
    "gated deltanet, negative eigenvalues": ROWS["gated deltanet"] | {"allow_neg_eigval": True},
    "delta rule with rotary positions": {"positions": "rope", "retention": "fixed", "rope_theta": 100.0},
    "elu of length 1, sigmoid gate": {"feature_map": "elu", "output_gate": "sigmoid", "conv_size": 3},
    "retention from the data, no erase": {"erase": False, "normalise_qk": False, "output_norm": "group"},
    "denominator with retention": ROWS["linear attention"] | {"retention": "data", "value_expansion": 3, "key_dim": 1},
    "denominator, length 1, convolution, gate": ROWS["linear attention"]
    | {"normalise_qk": True, "conv_size": 4, "output_gate": "silu", "output_norm": "rms"},
    "three writes a token, by channel": ROWS["kimi delta"] | {"writes_per_token": 3, "gate_rank": None},
    "gated linear attention": {"retention": "channel", "erase": False, "normalise_qk": False},
    "feedback by channel": ROWS["kimi delta"] | {"state_feedback": True, "output_feedback": 0.3},
    "two writes without erase": ROWS["linear attention"] | {"writes_per_token": 2, "retention": "fixed"},
    "two writes, rotary, feedback": {"writes_per_token": 2, "positions": "rope", "output_feedback": 0.1},
    "one head, chunk 1": {"num_heads": 1, "chunk_size": 1},
    "one chunk": {"chunk_size": 64},
    "nothing around it": PLAIN | {"retention": "none"},
}


def make_layer(**settings: Any) -> LinearMemory:
    """A float64 layer whose parameters are all away from their first values."""
    torch.manual_seed(0)
    config = LinearMemoryConfig(**{"hidden_size": HIDDEN, "num_heads": 2, "chunk_size": 4} | settings)
    layer = LinearMemory(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def run(layer: LinearMemory, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and final fast weights."""
    y, state = layer(x)
    assert isinstance(state, LinearMemoryState)
    return y, state.weight


@pytest.mark.parametrize("name", CASES)
def test_equals_the_token_by_token_reference(name: str) -> None:
    layer = make_layer(**CASES[name])
    x = noise(2, 11, HIDDEN).requires_grad_()
    found, wanted = run(layer, x), reference_linear(layer, x)
    close(found, wanted)
    grads, expected = (gradients(weigh(y) + weigh(w, 6), [x], layer) for y, w in (found, wanted))
    close(grads, expected)
    assert all(bool(g.any()) for g in grads), "something receives no gradient"


@pytest.mark.parametrize("row", ROWS)
def test_gradcheck(row: str) -> None:
    layer = make_layer(**ROWS[row] | {"hidden_size": 4, "key_dim": 2, "chunk_size": 2})
    names = [n for n, _ in layer.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, state.weight

    leaves = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(output, (noise(1, 3, 4).requires_grad_(), *leaves), fast_mode=True)


@pytest.mark.parametrize("row", ROWS)
def test_chunk_size_changes_nothing(row: str) -> None:
    x = noise(2, 21, HIDDEN)
    for chunk_size in (1, 7, 64):
        close(run(make_layer(**ROWS[row], chunk_size=chunk_size), x), run(make_layer(**ROWS[row]), x))


def share_weights(source: LinearMemory, **settings: Any) -> LinearMemory:
    """A layer of other settings with the source's weights where it has use for them."""
    target = make_layer(**settings)
    with torch.no_grad():
        for own, theirs in zip(
            target.in_proj.weight.split(target.sizes), source.in_proj.weight.split(source.sizes), strict=True
        ):
            own.copy_(theirs[: len(own)])
        for name, parameter in target.named_parameters():
            if name != "in_proj.weight":
                parameter.copy_(source.get_parameter(name))
    return target


def test_gated_deltanet_that_forgets_nothing_is_deltanet() -> None:
    gated = make_layer(output_gate="none", retention="data")
    assert gated.A_log is not None
    x = noise(2, 13, HIDDEN)
    plain = share_weights(gated, **ROWS["deltanet"] | {"allow_neg_eigval": False})
    with torch.no_grad():
        gated.A_log.fill_(-60.0)
    close(run(gated, x), run(plain, x))


def test_kimi_delta_attention_whose_channels_forget_alike_is_gated_deltanet() -> None:
    layer = make_layer(retention="channel")
    with torch.no_grad():
        for heads in (layer.in_proj.weight[-8:].view(2, 4, -1), layer.dt_bias):
            assert heads is not None
            heads.copy_(heads[:, :1].clone().expand_as(heads))
    plain = make_layer()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            theirs = layer.get_parameter(name)
            rows = [*range(len(theirs) - 8), -8, -4] if name == "in_proj.weight" else slice(None)
            parameter.copy_(theirs[:, 0] if name == "dt_bias" else theirs[rows])
    x = noise(2, 13, HIDDEN)
    close(run(layer, x), run(plain, x))


def test_several_writes_a_token_reflect_twice() -> None:
    """Two full reflections along different keys turn what the memory holds; one can only mirror it."""
    layer = make_layer(**PLAIN | {"writes_per_token": 2, "num_heads": 1, "retention": "none", "allow_neg_eigval": True})
    with torch.no_grad():
        layer.in_proj.weight[-2:].fill_(1e9)
        layer.in_proj.weight[3 * HIDDEN : 5 * HIDDEN].zero_()
        x = noise(1, 1, HIDDEN).abs()
        state = LinearMemoryState(noise(1, 1, HIDDEN, HIDDEN, seed=3), None, None)
        after = layer(x, state)[1].weight[0, 0]
    turn = torch.linalg.lstsq(state.weight[0, 0], after).solution
    torch.testing.assert_close(turn @ turn.mT, torch.eye(HIDDEN).double(), rtol=1e-6, atol=1e-6)
    assert float(torch.linalg.det(turn)) == pytest.approx(1.0)


def test_gated_deltanet_that_forgets_everything_sees_one_token() -> None:
    """a_t = 0 leaves the value of the token itself, beta (k.q) v."""
    layer = make_layer(**PLAIN)
    assert layer.dt_bias is not None
    with torch.no_grad():
        layer.dt_bias.fill_(1e9)
    x = noise(2, 13, HIDDEN)
    alone = [layer(x[:, t : t + 1])[0] for t in range(13)]
    torch.testing.assert_close(layer(x)[0], torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


def test_retnet_without_forgetting_and_positions_is_linear_attention_without_denominator() -> None:
    rows = ROWS["retnet"] | PLAIN | {"value_expansion": 1}
    linear = ROWS["linear attention"] | {"denominator": False, "feature_map": "identity"}
    x = noise(2, 13, HIDDEN)
    close(run(make_layer(**rows | {"positions": "none", "retention": "none"}), x), run(make_layer(**linear), x))


def test_retnet_in_its_parallel_form() -> None:
    """(Q K^T * D) V with D[n, m] = gamma^(n - m), keys and queries turned, the heads normed (RetNet, Eq. 5 and 8)."""
    layer = make_layer(**ROWS["retnet"])
    x = noise(1, 12, HIDDEN)
    q, k, v, gate = (x @ layer.in_proj.weight.mT)[0].split([8, 8, 16, 16], -1)
    heads = []
    for h in range(2):
        columns, wide = slice(4 * h, 4 * h + 4), slice(8 * h, 8 * h + 8)
        at = torch.arange(12).double()
        distance = at[:, None] - at
        weights = torch.where(distance >= 0, (1 - 2.0 ** (-5 - h)) ** distance.clamp_min(0), 0)
        angles = 10000.0 ** (-torch.arange(2).double() / 2)
        one, two = (torch.complex(*s[:, columns].chunk(2, -1)) for s in (q, k))
        turned = torch.exp(1j * distance[:, :, None] * angles)
        scores = torch.einsum("nc,mc,nmc->nm", one, two.conj(), turned).real
        o = torch.nn.functional.layer_norm((scores * weights) @ v[:, wide], (8,), eps=1e-6)
        heads.append(o * layer.norm_weight[h] + layer.norm_bias[h])
    wanted = layer.out_proj(torch.cat(heads, -1) * torch.nn.functional.silu(gate))
    close([layer(x)[0][0]], [wanted])


def test_linear_attention_averages_the_values() -> None:
    """With equal keys every output is the mean of the values so far."""
    layer = make_layer(**ROWS["linear attention"])
    with torch.no_grad():
        layer.in_proj.weight[:16].zero_()
    x = noise(1, 12, HIDDEN)
    values = x @ layer.in_proj.weight[16:].mT
    mean = values.cumsum(1) / torch.arange(1, 13)[:, None]
    torch.testing.assert_close(layer(x)[0], layer.out_proj(mean), rtol=1e-6, atol=1e-6)


def test_the_delta_rule_recalls_what_it_wrote_last() -> None:
    """beta = 1: a key's second value replaces its first, which linear attention would add to."""
    layer = make_layer(**PLAIN | {"retention": "none", "num_heads": 1})
    with torch.no_grad():
        layer.in_proj.weight[-1].fill_(1e9)
        layer.out_proj.weight.copy_(torch.eye(HIDDEN))
        layer.in_proj.weight[:HIDDEN].copy_(layer.in_proj.weight[HIDDEN : 2 * HIDDEN])
    x = noise(1, 1, HIDDEN).abs()
    value = torch.nn.functional.silu(x @ layer.in_proj.weight[2 * HIDDEN : 3 * HIDDEN].mT)
    other = noise(1, 1, HIDDEN, seed=4).abs()
    y, _ = layer(torch.cat([x, other, x, x], 1))
    close([y[:, 3:]], [value])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, not 0"),
        ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3; set key_dim"),
        ({"feature_map": "relu"}, "feature_map is one of 'identity', 'elu', 'silu', not 'relu'"),
        ({"retention": "learned"}, "retention is one of 'none', 'fixed', 'data'"),
        ({"key_dim": 3, "positions": "rope"}, "key_dim 3 must be even"),
        ({"normalise_qk": False}, "erase=True needs normalise_qk=True"),
        ({"erase": False, "allow_neg_eigval": True}, "allow_neg_eigval=True .* needs erase=True"),
        ({"erase": False, "denominator": True}, "denominator=True .* only feature_map='elu'"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, not 0.0"),
        ({"writes_per_token": 0}, "writes_per_token must be at least 1, not 0"),
        ({"erase": False, "state_feedback": True}, "state_feedback=True scales the erase"),
        ({"allow_neg_eigval": True, "state_feedback": True}, "takes below -1; leave allow_neg_eigval off"),
        (ROWS["linear attention"] | {"output_feedback": 1.0}, "denominator=True needs every"),
        ({"gate_rank": 2, "output_gate": "none"}, "there is neither"),
        ({"kernel": "fla", "retention": "channel"}, "kernel='fla' has neither a retention by channel"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**settings)


def test_another_layers_state_is_refused() -> None:
    state = Mamba2(Mamba2Config(HIDDEN, 2, state_size=4)).init_state(2)
    with pytest.raises(TypeError, match="continues from a LinearMemoryState, not from Mamba2State"):
        make_layer()(noise(2, 3, HIDDEN), state)


@pytest.mark.parametrize("row", ROWS)
def test_autocast_keeps_the_memory_in_float32(row: str) -> None:
    """Rounding of bfloat16 projections apart, autocast changes nothing, and the state stays float32."""
    layer = make_layer(**ROWS[row]).float()
    x = noise(2, 40, HIDDEN).float()
    wanted, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert all(t.dtype in (torch.float32, torch.int64) for _, t in state.tensors())
    assert y.dtype == torch.bfloat16
    assert float((y - wanted).norm() / wanted.norm()) < 0.1


def test_rates_and_filters_are_free_of_weight_decay() -> None:
    layer = make_layer(output_norm="group", state_feedback=True, output_feedback=1.0)
    free = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert free == {"conv", "A_log", "dt_bias", "norm_weight", "norm_bias", "erase_share", "key_share"}
