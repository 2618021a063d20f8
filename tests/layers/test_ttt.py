"""TTT-Linear and TTT-MLP: equal to the token-by-token reference, and settings that must equal one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.layers.ttt import BOUND, TTTConfig, TTTLayer
from tests.layers.battery import close, gradients, noise, weigh
from tests.layers.reference_ttt import finish, inner_gradient, inner_model, reference, unpack, views
from tests.oracles import fla_naive

CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear mean": {"step": "mean"},
    "linear transformer backbone": {"conv_size": 1, "output_gate": False},
    "linear one head": {"num_heads": 1, "step": "mean", "inner_lr": 3.0},
    "mlp": {"inner": "mlp"},
    "mlp mean": {"inner": "mlp", "step": "mean", "expansion": 3},
    "mlp transformer backbone": {"inner": "mlp", "conv_size": 1, "output_gate": False, "inner_lr": 1.0},
}


def make_layer(**settings: Any) -> TTTLayer:
    """A float64 layer whose parameters are all away from their first values, so that no gradient is zero by luck."""
    torch.manual_seed(0)
    layer = TTTLayer(TTTConfig(**{"hidden_size": 8, "num_heads": 2} | settings)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_token_by_token_reference(name: str, chunk: int) -> None:
    layer = make_layer(**CASES[name], chunk_size=chunk)
    for time in (1, 15, 17, 33) if chunk == 16 else (1, 17):
        x = noise(2, time, 8).requires_grad_()
        y, state = layer(x)
        expected, start, running = reference(layer, x)
        found, wanted = [y, *state.memory.start, *state.memory.running], [expected, *start, *running]
        close(found, wanted)
        scalars = [torch.stack([weigh(t, seed=3 + i) for i, t in enumerate(ts)]).sum() for ts in (found, wanted)]
        close(gradients(scalars[0], [x], layer), gradients(scalars[1], [x], layer))


@pytest.mark.parametrize("name", CASES)
def test_everything_that_is_learned_receives_a_gradient(name: str) -> None:
    layer = make_layer(**CASES[name], chunk_size=4)
    weigh(layer(noise(2, 11, 8))[0]).backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key


@pytest.mark.parametrize("name", ["linear", "linear mean", "mlp", "mlp mean"])
def test_gradcheck(name: str) -> None:
    """Finite differences through output and state, two mini-batches and a part."""
    layer = make_layer(**CASES[name], chunk_size=2, hidden_size=4, num_heads=1)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return (y, *state.memory.start, *state.memory.running)

    inputs = [noise(1, 5, 4), *(v.detach().clone() for v in values)]
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_the_inner_gradient_is_that_of_the_loss(inner: str) -> None:
    """The analytic gradient of one token = autograd's, for every weight and bias apart."""
    layer = make_layer(inner=inner)
    weights = [w.expand(1, *w.shape) for w in layer.inner.initial]
    k, v = noise(1, 2, 4), noise(1, 2, 4, seed=1)
    key = torch.cat([k, torch.ones_like(k[..., :1])], -1)[:, :, None]
    inputs, found = layer.inner.lesson(weights, key, layer.inner.aim((v - k)[:, :, None]))
    wanted = inner_gradient(layer, unpack(weights), k, v)
    outer = [g.mT @ x for x, g in zip(inputs, found, strict=True)]
    close([t for w in outer for t in (w[..., :-1], w[..., -1])], wanted)


@pytest.mark.parametrize("step", ["sum", "mean"])
@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_chunk_1_is_online_gradient_descent(inner: str, step: str) -> None:
    """W_t = W_{t-1} - eta_t grad l(W_{t-1}; x_t), written as such (Eq. 2); with c_1 = 1 both steps are this."""
    layer = make_layer(inner=inner, step=step, chunk_size=1, conv_size=1)
    if layer.token_scale is not None:
        torch.nn.init.ones_(layer.token_scale)
    x = noise(2, 9, 8)
    q, k, v = views(layer, x)
    eta = layer.config.base_lr * torch.sigmoid(layer.rate_proj(x)) / 4
    weights = unpack([w.expand(2, *w.shape) for w in layer.inner.initial])
    outputs = []
    for t in range(9):
        step_sizes = eta[:, t, :, None]
        flat = inner_gradient(layer, weights, k[:, t], v[:, t])
        weights = [
            (w - step_sizes[..., None] * gw, b - step_sizes * gb)
            for (w, b), gw, gb in zip(weights, flat[::2], flat[1::2], strict=True)
        ]
        outputs.append(inner_model(layer, weights, q[:, t]))
    close([layer(x)[0]], [finish(layer, x, torch.stack(outputs, 1))])


@pytest.mark.parametrize("name", CASES)
def test_without_learning_rate_it_is_the_initial_inner_model(name: str) -> None:
    layer = make_layer(**CASES[name] | {"inner_lr": 0.0})
    x = noise(2, 20, 8)
    q, _, _ = views(layer, x)
    initial = unpack([w.expand(2, *w.shape) for w in layer.inner.initial])
    y, state = layer(x)
    outputs = [inner_model(layer, initial, q[:, t]) for t in range(20)]
    close([y, *state.memory.running], [finish(layer, x, torch.stack(outputs, 1)), *layer.init_state(2).memory.start])


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_mean_and_sum_agree_when_every_token_weighs_one(inner: str) -> None:
    """c_i = 1 for all i is the sum."""
    mean, total = (make_layer(inner=inner, step=step, chunk_size=4) for step in ("mean", "sum"))
    torch.nn.init.ones_(mean.token_scale)
    total.load_state_dict({n: p for n, p in mean.state_dict().items() if n != "token_scale"})
    x = noise(2, 11, 8)
    close([mean(x)[0]], [total(x)[0]])


def test_positions_count_within_a_mini_batch() -> None:
    """The second mini-batch sees the same angles: with the same tokens and no learning, the same output."""
    layer = make_layer(chunk_size=4, conv_size=1, inner_lr=0.0)
    x = noise(1, 4, 8)
    y = layer(torch.cat([x, x], 1))[0]
    close([y[:, 4:]], [y[:, :4]])
    shifted = layer(torch.cat([x[:, 1:], x[:, :1]], 1))[0]
    assert not torch.allclose(shifted[:, 0], y[:, 1])


def test_entries_beyond_the_bound_count_as_the_bound() -> None:
    layer = make_layer(chunk_size=4)
    x = noise(2, 9, 8)
    x[:, 3:5] *= 2 * BOUND  # beyond the bound of q, k and v, below that of a layer's input
    y, state = layer(x)
    expected, start, running = reference(layer, x)
    # The gate alone sees the full size.
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip([*state.memory.start, *state.memory.running], [*start, *running], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", ["sum", "mean"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_equals_flash_linear_attentions_naive_ttt_linear(chunk: int, step: str) -> None:
    """Where its conventions allow. A rate there belongs to the token that reads (as c_i does), not to the one that
    writes, so the rates of all tokens are equal here; it adds LN(z) to z where the paper adds it to q; and it computes
    in float32.
    """
    naive = fla_naive("ttt")
    layer = make_layer(step=step, chunk_size=chunk, conv_size=1, output_gate=False)
    # A buffer, so that it is not among the gradients: it tells tokens apart.
    weight = torch.zeros_like(layer.rate_proj.weight)
    del layer.rate_proj.weight
    layer.rate_proj.register_buffer("weight", weight)
    heads, width, time = 2, 4, 2 * chunk
    x = noise(2, time, 8).requires_grad_()
    q, k, v = views(layer, x)
    eta = (torch.sigmoid(layer.rate_proj.bias)[:, None] / width).expand(2, time, heads, 1)
    if layer.token_scale is not None:
        eta = eta * layer.token_scale.clamp_min(0).repeat(2)[None, :, None, None]
    weight, bias = unpack([w.expand(2, *w.shape).float() for w in layer.inner.initial])[0]
    o, h, hb = naive.chunk_ttt_linear_ref(
        *(q, k, v, layer.inner.norm_weight, layer.inner.norm_bias, eta),
        scale=1.0,
        mini_batch_size=chunk,
        initial_state=weight.mT,
        initial_state_bias=bias[..., None, :],
        output_final_state=True,
    )
    y, state = layer(x)
    found, wanted = state.memory.running[0], torch.cat([h, hb], -2).mT.double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(gradients(weigh(t), [x], layer) for t in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # Its z + LN(z) and our q + LN(z): z comes from a layer whose LayerNorm and output do nothing.
    z = answers_before_the_norm(layer, x)
    normed = o.double() - z
    torch.testing.assert_close(y, finish(layer, x, q + normed), rtol=1e-3, atol=1e-4)


def answers_before_the_norm(layer: TTTLayer, x: Tensor) -> Tensor:
    """z = f_res(q; W_t) of every token `[N, T, H, D]`."""
    kept: list[Tensor] = []
    original = layer.inner.answer

    def listen(q: Tensor, z: Tensor) -> Tensor:
        kept.append(z.transpose(1, 2))
        return original(q, z)

    layer.inner.answer = listen  # type: ignore[method-assign]
    layer(x)
    layer.inner.answer = original  # type: ignore[method-assign]
    return kept[0]


def test_autocast_keeps_the_memory_in_float32() -> None:
    torch.manual_seed(0)
    for inner in ("linear", "mlp"):
        layer = TTTLayer(TTTConfig(hidden_size=16, num_heads=2, inner=inner))
        x = torch.randn(2, 20, 16)
        y, state = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            z, after = layer(x)
        assert all(t.dtype == torch.float32 for _, t in after.tensors() if t.is_floating_point())
        torch.testing.assert_close(z.float(), y, rtol=0.1, atol=0.1)
        for a, b in zip(after.memory.running, state.memory.running, strict=True):
            torch.testing.assert_close(a, b, rtol=0.2, atol=0.2)


def test_a_foreign_state_is_refused() -> None:
    state = SoftmaxAttention(AttentionConfig(8, 2)).double().init_state(1)
    with pytest.raises(TypeError, match="TTTState"):
        make_layer()(noise(1, 3, 8), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 6}, "even multiple of num_heads"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"expansion": 0}, "expansion must be at least 1"),
        ({"inner": "conv"}, "inner is 'linear' or 'mlp'"),
        ({"step": "median"}, "step is 'sum' or 'mean'"),
        ({"inner_lr": -1.0}, "inner_lr must not be negative"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTTConfig(**{"hidden_size": 8, "num_heads": 2} | settings)
