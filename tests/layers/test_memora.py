"""Memora token by token: the update of the weights themselves (Miras Eq. 27), not of their logarithms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.memory.objective import inner_loss
from nestling.memory.simplex import READ_BLOCK
from tests.layers.battery import gradients, noise, weigh
from tests.layers.reference_titans import SlowMemory, power_of, slow_neural_memory
from tests.layers.test_neural_memory import make_layer

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": True},
    "no retention": {"use_retention": False},
    "chunk rates": {"rates": "chunk"},
    "chunk 1": {"chunk_size": 1},
    "one chunk of two blocks": {"chunk_size": 64},
    "chunk read": {"read": "chunk"},
    "clipped": {"clip": 0.2},
    "dot": {"objective": "dot"},
    "huber": {"objective": "huber", "delta": 0.4},
    "ascending": {"ascend": True},
    "two steps": {"inner_steps": 2, "chunk_size": 1},
}
TIME = READ_BLOCK + 3


class SlowMemora(SlowMemory):
    """A `SlowMemory` whose weights are W itself, updated by the softmax of Eq. 27."""

    def weights(self, logits: list[Tensor]) -> list[Tensor]:
        """W_1 and W_2; their rows sum to K and to 1."""
        return [logits[0].shape[-1] * logits[0].softmax(-1), logits[1].softmax(-1)]

    def look(self, weights: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W_1 x, its activation and M(x)."""
        z = (weights[0] @ x[..., None])[..., 0]
        h = self.memory.activation(z)
        o = (weights[1] @ h[..., None])[..., 0]
        return z, h, x + F.layer_norm(o, o.shape[-1:], eps=1e-6)

    def answer(self, weights: list[Tensor], q: Tensor) -> Tensor:
        o = self.look(self.weights(weights), q)[2]
        return (o * (o.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt() * self.layer.norm).flatten(-2)

    def steps(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        c = self.config
        weights = self.weights(self.memory.start)
        z, h, y = self.look(weights, k)
        hooks = [t.register_hook(lambda g: g.clamp(-c.clip, c.clip)) for t in (z, y)]
        found = torch.autograd.grad(inner_loss(c, y, v).sum(), weights, create_graph=True)
        for hook in hooks:
            hook.remove()
        return [g / power_of(i, u) for i, (g, u) in enumerate(zip(found, (k, h), strict=True))], [k, h]


def memora(**settings: Any) -> NeuralMemory:
    return make_layer(**{"divergence": "kl", "momentum": False, "expansion": 2, "activation": "gelu"} | settings)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_equations_token_by_token(name: str) -> None:
    layer = memora(**CASES[name])
    x = noise(2, TIME, 8).requires_grad_()
    slow = SlowMemora(layer.memory, 2)
    expected = slow_neural_memory(layer, x, slow)
    y, state = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    found = [*state.bank.start, *state.bank.running, *(state.bank.surprise or ())]
    found = [t.squeeze(2) if i % 2 else t for i, t in enumerate(found)]
    wanted = [*slow.memory.start, *slow.memory.running, *slow.memory.surprise][: len(found)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    scalars = [
        weigh(out) + sum((weigh(t) for t in rest), torch.zeros(())) for out, rest in ((y, found), (expected, wanted))
    ]
    for a, b in zip(*(gradients(s, [x], layer) for s in scalars), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_rule_on_logarithms_is_the_papers_on_weights() -> None:
    """One token: W <- c softmax(a log W - l grad), with log W and not the state's Z, which differ by a number a row."""
    layer = memora(chunk_size=1, conv_size=1, rates="chunk")
    slow = SlowMemora(layer.memory, 1)
    _, state = layer(noise(1, 5, 8))
    slow_neural_memory(layer, noise(1, 5, 8), slow)
    x = noise(1, 1, 8, seed=3)
    _, after = layer(x, state)
    weights = slow.weights(slow.memory.running)
    slow.streams.append(x[:, 0] @ layer.memory.in_proj.weight.mT)
    _, k, v = map(slow.heads, slow.convolved(slow.streams, layer.memory.conv).chunk(3, -1))
    v = v / v.square().mean(-1, keepdim=True).sqrt().clamp_min(1.0)
    steps, _ = slow.steps(F.normalize(k, dim=-1), v)
    keep, _, rates, _ = slow.rates(x[:, 0])
    found = slow.weights([after.bank.running[0], after.bank.running[1].squeeze(2)])
    for weight, step, rate, got in zip(weights, steps, rates, found, strict=True):
        moved = (keep[..., None, None] * weight.log() - rate[..., None, None] * step).softmax(-1)
        torch.testing.assert_close(got, weight.sum(-1, keepdim=True) * moved, rtol=1e-9, atol=1e-11)


def test_rows_stay_on_their_simplices_and_forget_towards_uniform_weights() -> None:
    layer = memora()
    with torch.no_grad():
        layer.memory.rate_bias[layer.config.gates.index("alpha")] = -8.0
        layer.memory.share.fill_(-30.0)
    _, state = layer(noise(1, 400, 8))
    for i, logits in enumerate(state.bank.running):
        weights = SlowMemora(layer.memory, 1).weights(state.bank.running)[i]
        assert bool((weights > 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], 4.0 if i == 0 else 1.0))
        torch.testing.assert_close(logits, torch.zeros_like(logits), rtol=0, atol=1e-3)


def test_gradients_do_not_depend_on_the_memory_of_the_backward_pass() -> None:
    """Without gradients nothing is computed twice, and the answers are the same to the bit."""
    layer, x = memora(chunk_size=20), noise(2, 30, 8)
    y, _ = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], y)


@pytest.mark.parametrize(
    "settings", [{"depth": 1}, {"erase": True}, {"gradient": "online"}, {"read_before": True}, {"objective_window": 2}]
)
def test_what_has_no_meaning_on_a_simplex_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="divergence='kl' needs depth 2, chunk gradients"):
        NeuralMemoryConfig(**{"hidden_size": 8, "num_heads": 2, "divergence": "kl", "momentum": False} | settings)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="divergence is 'l2' or 'kl', not 'js'"):
        NeuralMemoryConfig(hidden_size=8, num_heads=2, divergence="js")  # type: ignore[arg-type]
