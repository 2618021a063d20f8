from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from nestling.layers import attention
from nestling.layers.attention import AttentionConfig, AttentionState, SoftmaxAttention
from nestling.layers.feed_forward import FeedForward, FeedForwardConfig

CONFIGS = {
    "plain": AttentionConfig(16, 4),
    "grouped": AttentionConfig(16, 4, num_kv_heads=2),
    "window": AttentionConfig(16, 2, window=5),
    "window one": AttentionConfig(16, 2, window=1),
    "grouped window": AttentionConfig(16, 4, num_kv_heads=1, window=7, rope_theta=100.0),
    "wide biases": AttentionConfig(16, 2, num_kv_heads=1, head_width=12, bias=True, output_bias=True),
    "norms frequencies": AttentionConfig(16, 4, head_width=4, qk_norm_eps=1e-2, rope_frequencies=(0.5, -0.03)),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SoftmaxAttention:
    # Several blocks of a windowed attention even at the short lengths of these tests.
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 3)
    layer = SoftmaxAttention(request.param).double()
    for norm in (layer.query_norm, layer.key_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.weight)
    return layer


def reference(layer: SoftmaxAttention, x: Tensor) -> Tensor:
    """The equation, one query and one head at a time, rotations as complex factors."""
    c = layer.config
    width, kv_heads = c.head_dim, c.num_kv_heads or c.num_heads
    frequency = c.rope_theta ** (-torch.arange(0, width, 2).double() / width)
    if c.rope_frequencies is not None:
        frequency = torch.tensor(c.rope_frequencies).double()

    def heads(linear: nn.Linear, count: int, turned: bool, norm: nn.RMSNorm | None = None) -> Tensor:
        z = x @ linear.weight.mT + (0 if linear.bias is None else linear.bias)
        z = z.unflatten(-1, (count, width))
        if not turned:
            return z
        if norm is not None:
            z = norm.weight * z / (z.square().mean(-1, keepdim=True) + c.qk_norm_eps).sqrt()
        angle = torch.arange(len(x)).double()[:, None, None] * frequency
        z = torch.complex(z[..., : width // 2], z[..., width // 2 :]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag), -1)

    q = heads(layer.query, c.num_heads, True, layer.query_norm)
    k, v = heads(layer.key, kv_heads, True, layer.key_norm), heads(layer.value, kv_heads, False)
    y = torch.zeros(len(x), c.num_heads, width, dtype=x.dtype)
    for t in range(len(x)):
        first = 0 if c.window is None else max(0, t + 1 - c.window)
        for h in range(c.num_heads):
            g = h * kv_heads // c.num_heads
            score = k[first : t + 1, g] @ q[t, h] / math.sqrt(width)
            y[t, h] = score.softmax(0) @ v[first : t + 1, g]
    return y.flatten(1) @ layer.output.weight.mT + (0 if layer.output.bias is None else layer.output.bias)


def in_pieces(layer: SoftmaxAttention, x: Tensor, sizes: list[int]) -> tuple[Tensor, AttentionState]:
    state, outputs = None, []
    for part in x.split(sizes, 1):
        y, state = layer(part, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def assert_same_state(a: AttentionState, b: AttentionState) -> None:
    for (name, left), (_, right) in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(left, right, msg=lambda m, name=name: f"{name}: {m}")


def test_equals_the_equation(layer: SoftmaxAttention) -> None:
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], torch.stack([reference(layer, row) for row in x]))


@pytest.mark.parametrize("sizes", [[1] * 23, [7, 9, 7], [1, 20, 2], [12, 1, 1, 9], [22, 1]], ids=str)
def test_one_call_equals_any_split(layer: SoftmaxAttention, sizes: list[int]) -> None:
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    whole, state = layer(x)
    parts, part_state = in_pieces(layer, x, sizes)
    torch.testing.assert_close(parts, whole)
    assert_same_state(part_state, state)


def test_gradients_pass_through_the_state(layer: SoftmaxAttention) -> None:
    x = torch.randn(2, 14, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 14, 16, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    whole = torch.autograd.grad((layer(x)[0] * weight).sum(), leaves)
    parts = torch.autograd.grad((in_pieces(layer, x, [5, 1, 8])[0] * weight).sum(), leaves)
    for a, b in zip(whole, parts, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_equals_unpadded(layer: SoftmaxAttention, side: str) -> None:
    lengths, time = [11, 4, 7], 12
    mask = torch.zeros(3, time, dtype=torch.long)
    for row, n in enumerate(lengths):
        slots = {"left": range(time - n, time), "right": range(n), "holes": torch.randperm(time)[:n].tolist()}[side]
        mask[row, list(slots)] = 1
    x = torch.randn(3, time, 16, dtype=torch.float64, requires_grad=True)
    y, state = layer(x, mask=mask)
    assert bool((y[mask == 0] == 0).all())
    y2, state2 = layer(x.flip(1), state, mask=mask.flip(1))
    for row in range(3):
        real = mask[row].bool()
        alone, own = layer(x[row, real][None])
        torch.testing.assert_close(y[row, real], alone[0])
        again, own = layer(x.flip(1)[row, real.flip(0)][None], own)
        torch.testing.assert_close(y2[row, real.flip(0)], again[0])
        held = own.k.shape[1]
        assert int(state2.position[row]) == 2 * lengths[row]
        torch.testing.assert_close(state2.k[row, -held:], own.k[0])
        torch.testing.assert_close(state2.v[row, -held:], own.v[0])
        assert bool((state2.k[row, : state2.k.shape[1] - held] == 0).all())


def test_masked_tokens_influence_nothing(layer: SoftmaxAttention) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0, 1, 1]])
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    y, state = layer(x, mask=mask)
    (gradient,) = torch.autograd.grad(y.square().sum() + state.k.square().sum() + state.v.square().sum(), x)
    assert bool((gradient[mask == 0] == 0).all())
    assert bool((gradient[mask == 1] != 0).any(-1).all())


def test_rows_of_different_length_continue_like_single_rows(layer: SoftmaxAttention) -> None:
    first, second = torch.randn(3, 9, 16, dtype=torch.float64), torch.randn(3, 6, 16, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [2], [5]])
    _, state = layer(first, mask=mask)
    y, after = layer(second, state)
    shorter, _ = layer(second[1:2], state.select([1]))
    torch.testing.assert_close(shorter, y[1:2])
    stepped, steps = [], state
    for t in range(6):
        out, steps = layer(second[:, t : t + 1], steps)
        stepped.append(out)
    torch.testing.assert_close(torch.cat(stepped, 1), y)
    assert_same_state(steps, after)
    for row in range(3):
        alone, _ = layer(torch.cat((first[row][mask[row]], second[row]))[None])
        torch.testing.assert_close(y[row], alone[0, -6:])


def test_packed_documents_equal_separate_ones(layer: SoftmaxAttention) -> None:
    bounds = [0, 6, 7, 7, 16, 20]
    x = torch.randn(1, 20, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    packed, state = layer(x, cu_seqlens=torch.tensor(bounds))
    pairs = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    separate = torch.cat([layer(x[:, a:b])[0] for a, b in pairs], 1)
    torch.testing.assert_close(packed, separate)
    assert state.position.tolist() == [6, 1, 0, 9, 4]
    weight = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad((packed * weight).sum(), leaves),
        torch.autograd.grad((separate * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_causal_and_rows_apart(layer: SoftmaxAttention) -> None:
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    for t in (0, 4, 11):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        assert bool((gradient[1] == 0).all())
        assert bool((gradient[0, t + 1 :] == 0).all())
        first = 0 if layer.config.window is None else max(0, t + 1 - layer.config.window)
        assert bool((gradient[0, :first] == 0).all())
        assert bool((gradient[0, first : t + 1] != 0).any(-1).all())


def test_gradcheck(layer: SoftmaxAttention) -> None:
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    past = layer(torch.randn(1, 3, 16, dtype=torch.float64))[1].detach()
    assert torch.autograd.gradcheck(lambda x: layer(x, past)[0], (x,))


def test_blocks_of_a_long_windowed_input() -> None:
    layer = SoftmaxAttention(AttentionConfig(8, 1, window=20)).double()
    x = torch.randn(1, 3 * attention.SMALLEST_BLOCK + 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0][0], reference(layer, x[0]))


def test_window_bounds_the_state() -> None:
    layer = SoftmaxAttention(AttentionConfig(8, 2, window=6))
    state = layer(torch.randn(3, 50, 8))[1]
    assert state.k.shape == (3, 6, 2, 4)
    assert state.k.untyped_storage().nbytes() == state.k.numel() * 4
    assert layer(torch.randn(3, 9, 8), state)[1].nbytes == state.nbytes


def test_positions_stay_exact_after_a_million_tokens() -> None:
    layer = SoftmaxAttention(AttentionConfig(16, 2, window=8))
    x = torch.randn(1, 30, 16)
    far = layer.init_state(1)
    far.position += 1_000_000
    torch.testing.assert_close(layer(x, far)[0], layer(x)[0], rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_state_in_the_parameters_dtype() -> None:
    layer, x = SoftmaxAttention(AttentionConfig(16, 2)), torch.randn(2, 10, 16)
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer(x[:, :6])
        y, state = layer(x[:, 6:], state)
    assert y.dtype == torch.bfloat16
    assert state.k.dtype == state.v.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact[:, 6:], rtol=0.05, atol=0.02)


def test_a_used_state_is_unchanged() -> None:
    layer = SoftmaxAttention(AttentionConfig(16, 2, window=4))
    _, state = layer(torch.randn(2, 5, 16))
    before = state.clone()
    layer(torch.randn(2, 5, 16), state)
    assert_same_state(before, state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 12, "num_heads": 4}, "even multiple of num_heads 4"),
        ({"hidden_size": 12, "num_heads": 4, "head_width": 3}, "head_width must be even"),
        ({"hidden_size": 12, "num_heads": 2, "qk_norm_eps": 0.0}, "qk_norm_eps must be positive"),
        ({"hidden_size": 12, "num_heads": 2, "rope_frequencies": (1.0,)}, "one entry per channel pair, 3; got 1"),
        ({"hidden_size": 4, "num_heads": 1, "rope_frequencies": (1.0, math.nan)}, "holds NaN or infinity"),
        ({"hidden_size": 16, "num_heads": 0}, "num_heads 0"),
        ({"hidden_size": 16, "num_heads": 4, "num_kv_heads": 3}, "must divide num_heads 4"),
        ({"hidden_size": 16, "num_heads": 4, "window": 0}, "at least 1 token"),
        ({"hidden_size": 16, "num_heads": 4, "rope_theta": 0.0}, "rope_theta must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**settings)  # type: ignore[arg-type]


def test_a_state_of_another_kind_or_size_is_refused() -> None:
    layer = SoftmaxAttention(AttentionConfig(16, 2))
    with pytest.raises(ValueError, match="3 rows and the input 2"):
        layer(torch.randn(2, 4, 16), layer.init_state(3))


def test_feed_forward_is_swiglu() -> None:
    layer = FeedForward(FeedForwardConfig(6, 10)).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up, down = (m.weight for m in (layer.gate, layer.up, layer.down))
    hidden = (x @ gate.mT) * torch.sigmoid(x @ gate.mT) * (x @ up.mT)
    torch.testing.assert_close(layer(x), hidden @ down.mT)
    with pytest.raises(ValueError, match="intermediate_size must be at least 1"):
        FeedForwardConfig(6, 0)
