"""Memory Caching token by token, to be read beside the paper (arXiv:2602.24281); the yardstick of the fast layer.

The inner layers are written by their own references. A token's average memory ("soup") is made as the paper says it, by
averaging weights, which the layer never does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.linear import LinearMemory
from nestling.layers.memory_caching import MemoryCaching
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.self_modifying import SelfModifyingTitans
from tests.layers import reference_self_modifying
from tests.layers.reference_linear import finish, tokens_of
from tests.layers.reference_self_modifying import normalize
from tests.layers.reference_titans import SlowMemory


class Slow(Protocol):
    """A layer's memory, one token at a time."""

    def write(self, t: int) -> Tensor:
        """Write token t; its query `[N, H, K]`."""
        ...

    def weights(self) -> list[Tensor]:
        """Of the memory after the last token, `[N, H, out, in]` for every layer."""
        ...

    def read_by_token(self) -> list[Tensor]:
        """The weights that the last token itself reads."""
        ...

    def read(self, weights: list[Tensor], q: Tensor) -> Tensor:
        """M(q), `[N, H, V]`."""
        ...

    def restart(self) -> None:
        """Back to the first state."""
        ...

    def output(self, answers: Tensor) -> Tensor:
        """What follows the answers `[N, T, H, V]`."""
        ...


class SlowLinear:
    """A `LinearMemory`; with a denominator, the weights' last row is the sum of the keys."""

    def __init__(self, layer: LinearMemory, x: Tensor) -> None:
        c = layer.config
        self.layer, self.tokens = layer, tokens_of(layer, x)
        self.first = x.new_zeros(len(x), c.num_heads, c.value_width + c.denominator, c.key_width)
        self.weight = self.first

    def write(self, t: int) -> Tensor:
        tokens, c = self.tokens, self.layer.config
        k, v = tokens.k[:, t], tokens.v[:, t]
        if c.denominator:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        a, strength = tokens.a[:, t, :, None, None], tokens.strength[:, t, :, None, None]
        write = v[..., :, None] * k[..., None, :]
        if c.erase:
            eye = torch.eye(c.key_width, dtype=k.dtype)
            self.weight = a * self.weight @ (eye - strength * k[..., :, None] * k[..., None, :]) + strength * write
        else:
            self.weight = a * self.weight + write
        return tokens.q[:, t]

    def weights(self) -> list[Tensor]:
        return [self.weight]

    def read_by_token(self) -> list[Tensor]:
        return self.weights()

    def read(self, weights: list[Tensor], q: Tensor) -> Tensor:
        return (weights[0] @ q[..., None])[..., 0]

    def restart(self) -> None:
        self.weight = self.first

    def output(self, answers: Tensor) -> Tensor:
        c = self.layer.config
        if c.denominator:
            answers = answers[..., :-1] / (answers[..., -1:] + c.norm_eps)
        return finish(self.layer, answers, self.tokens.gate)


class SlowNeural:
    """A `NeuralMemory`."""

    def __init__(self, layer: NeuralMemory, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.slow = SlowMemory(layer.memory, len(x))
        self.before = self.weights()

    def write(self, t: int) -> Tensor:
        slow = self.slow
        self.before = self.weights()
        slow.write(self.x[:, t])
        queries = slow.convolved(slow.streams, slow.layer.conv)[:, : slow.config.hidden_size]
        return normalize(slow.heads(queries))

    def weights(self) -> list[Tensor]:
        return list(self.slow.memory.running)

    def read_by_token(self) -> list[Tensor]:
        return self.before if self.layer.config.read_before else self.weights()

    def read(self, weights: list[Tensor], q: Tensor) -> Tensor:
        return self.slow.memory(weights, q)

    def restart(self) -> None:
        streams = self.slow.streams
        self.slow = SlowMemory(self.layer.memory, len(self.x))
        self.slow.streams = streams

    def output(self, answers: Tensor) -> Tensor:
        c = self.layer.config
        y = answers * (answers.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * self.layer.memory.norm
        y = y.flatten(-2)
        if self.layer.gate_proj is not None:
            y = y * F.silu(self.x @ self.layer.gate_proj.weight.mT)
        return y @ self.layer.out_proj.weight.mT


class SlowSelfModifying:
    """A `SelfModifyingTitans`, which reads its segment (or all of the text) again for every token.

    A restart is told for layers without a convolution, which sees tokens before it.
    """

    def __init__(self, layer: SelfModifyingTitans, x: Tensor) -> None:
        self.layer, self.x, self.start, self.end = layer, x, 0, 0
        self.queries = reference_self_modifying.project(layer, x)[0]["q"]

    def write(self, t: int) -> Tensor:
        self.end = t + 1
        self.memory = reference_self_modifying.reference(self.layer, self.x[:, self.start : self.end])[1]["memory"]
        return self.queries[:, t]

    def weights(self) -> list[Tensor]:
        return list(self.memory.running)

    def read_by_token(self) -> list[Tensor]:
        return self.weights()

    def read(self, weights: list[Tensor], q: Tensor) -> Tensor:
        return self.memory(weights, q)

    def restart(self) -> None:
        assert self.layer.config.conv_size == 1
        self.start = self.end

    def output(self, answers: Tensor) -> Tensor:
        return reference_self_modifying.finish(self.layer, self.x, answers)


def reference(layer: MemoryCaching, x: Tensor) -> Tensor:
    """The layer's output for rows `[N, T, hidden]` that start fresh."""
    c = layer.config
    slow: Slow
    if isinstance(layer.inner, LinearMemory):
        slow = SlowLinear(layer.inner, x)
    elif isinstance(layer.inner, NeuralMemory):
        slow = SlowNeural(layer.inner, x)
    else:
        assert isinstance(layer.inner, SelfModifyingTitans)
        slow = SlowSelfModifying(layer.inner, x)
    kept: list[list[Tensor]] = []
    answers = []
    for t in range(x.shape[1]):
        q = slow.write(t)
        memories = [*kept, slow.read_by_token()]
        shares = shares_of(layer, x, t)
        if c.variant == "soup":
            mean = [
                sum((s[..., None, None] * w for s, w in zip(shares, weights, strict=True)), torch.zeros(()))
                for weights in zip(*memories, strict=True)
            ]
            answers.append(slow.read(mean, q))
        else:
            heard = [s[..., None] * slow.read(m, q) for s, m in zip(shares, memories, strict=True)]
            answers.append(sum(heard, torch.zeros(())))
        if (t + 1) % c.segment_size == 0:
            kept.append(slow.weights())
            if c.restart:
                slow.restart()
    return slow.output(torch.stack(answers, 1))


def shares_of(layer: MemoryCaching, x: Tensor, t: int) -> list[Tensor]:
    """How much token t hears of every kept memory and of the running one, each `[N, H]`."""
    c = layer.config
    segment, heads = t // c.segment_size, c.num_heads
    if layer.router is None:
        return [x.new_ones(len(x), heads)] * (segment + 1)
    routed = (x @ layer.router.weight.mT).unflatten(-1, (2, heads, -1))
    u, seen = routed[:, t, 0], routed[:, :, 1]
    bounds = [i * c.segment_size for i in range(segment + 1)] + [t + 1]
    scores = [(u * seen[:, a:b].mean(1)).sum(-1) for a, b in pairwise(bounds)]
    powers = [s.exp() for s in scores]
    if c.variant == "sparse":
        for i in range(segment):
            higher = sum(((other > scores[i]).long() for other in scores[:segment]), torch.zeros((), dtype=torch.long))
            powers[i] = torch.where(higher < c.top_k, powers[i], torch.zeros_like(powers[i]))
    total = sum(powers, torch.zeros(()))
    return [p / total for p in powers]
