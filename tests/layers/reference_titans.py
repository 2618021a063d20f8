"""Titans, token by token: the equations of the paper, inner gradients from `torch.autograd.grad`, attention by loops.

Nothing of the layers is used but their parameters, and how a bank stores its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.attention import SoftmaxAttention
from nestling.layers.long_term_memory import LongTermMemory
from nestling.layers.neural_memory import NeuralMemory
from nestling.layers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from tests.layers.reference_self_modifying import Memory, bank_memories, inner_gradients, normalize, online_gradient


class SlowMemory:
    """A `LongTermMemory` that reads and writes one token at a time (Titans Eq. 8-15)."""

    def __init__(self, layer: LongTermMemory, rows: int) -> None:
        self.layer, self.config = layer, layer.config
        state = layer.bank(rows, True, torch.float64)
        self.memory: Memory = bank_memories(layer.bank, state, self.config.chunk_size)["memory"]
        self.streams: list[Tensor] = []
        self.query_streams: list[Tensor] = []
        self.logits: dict[str, Tensor] = {}
        self.window: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count = 0

    def heads(self, x: Tensor) -> Tensor:
        """`[N, H * D]` to `[N, H, D]`."""
        return x.unflatten(-1, (self.config.num_heads, -1))

    def convolved(self, streams: list[Tensor], filters: Tensor) -> Tensor:
        """silu of the causal convolution at the last token."""
        taps = filters.shape[1]
        recent = streams[-taps:]
        return F.silu(sum((filters[:, taps - len(recent) + i] * s for i, s in enumerate(recent)), torch.zeros(())))

    def answer(self, weights: list[Tensor], q: Tensor) -> Tensor:
        """norm(M(q)), `[N, hidden]`."""
        o = self.memory(weights, q)
        o = o * (o.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt() * self.layer.norm
        return o.flatten(-2)

    def query(self, x: Tensor) -> Tensor:
        """q_t of a token that is not written."""
        width = self.config.hidden_size
        self.query_streams.append(x @ self.layer.in_proj.weight[:width].mT)
        return normalize(self.heads(self.convolved(self.query_streams, self.layer.conv[:width])))

    def rates(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """1 - alpha_t, e_t and theta_t of every layer, eta_t, all `[N, H]`."""
        c, layer = self.config, self.layer
        if c.rates == "token" or self.count % c.chunk_size == 0:
            every = (x @ layer.rate_proj.weight.mT).unflatten(-1, (len(c.gates), c.num_heads))
            self.logits = {n: every[:, i] + layer.rate_bias[i] for i, n in enumerate(c.gates)}
        size = torch.sigmoid(self.logits["theta"])
        keep = torch.sigmoid(self.logits["alpha"]) ** (1 / 16) if c.use_retention else torch.ones_like(size)
        eta = torch.sigmoid(self.logits["eta"]) if "eta" in self.logits else torch.zeros_like(size)
        beta = torch.zeros_like(size) if layer.beta is None else torch.sigmoid(layer.beta).expand_as(size)
        shares = list(torch.sigmoid(layer.share))
        erase = torch.zeros_like(size)
        if c.gradient == "online" and c.objective == "l2":
            rate = keep * c.max_erase * size
            if c.erase:
                erase = rate = rate / (1 + shares[-1])
            else:
                shares[-1] = torch.ones_like(shares[-1])
        elif c.erase:
            erase = keep * c.max_erase * size
            rate = keep * torch.minimum(c.max_erase * size, 2 - c.max_erase * size)
        else:
            reach = torch.ones_like(keep) if c.objective == "dot" else (1 - keep).clamp_min(1 / c.chunk_size)
            rate = size * reach
        if layer.beta is not None:
            eta = keep * beta
            erase = erase * (1 - beta**2) / (1 + beta - beta**2)
            rate = rate * (1 - beta) ** 2 / (1 + beta) / (1 - eta)
        erases = [erase] * c.depth
        if layer.hidden_erase is not None:
            erases = [*(erase * h for h in torch.sigmoid(layer.hidden_erase)), erase]
        return keep, erases, [s * rate * (1 - eta) for s in shares], eta

    def write(self, x: Tensor) -> Tensor:
        """Write the token `[N, hidden]`, and answer its query."""
        c, memory = self.config, self.memory
        self.streams.append(x @ self.layer.in_proj.weight.mT)
        q, k, v = map(self.heads, self.convolved(self.streams, self.layer.conv).chunk(3, -1))
        q, k = normalize(q), normalize(k)
        v = v / v.square().mean(-1, keepdim=True).sqrt().clamp_min(1.0)
        keep, erases, thetas, eta = self.rates(x)
        importance = torch.sigmoid(self.logits["gamma"]) if c.objective_window > 1 else torch.ones_like(eta)
        self.window = [*self.window, (k, v, importance)][-c.objective_window :]
        for step in range(c.inner_steps):
            if step:
                memory.start, keep = list(memory.running), torch.ones_like(keep)
            steps, inputs = self.steps(k, v)
            before = list(memory.running)
            for i, (gradient, u) in enumerate(zip(steps, inputs, strict=True)):
                theta, erase = (r[..., None, None] for r in (thetas[i], erases[i]))
                surprise = eta[..., None, None] * memory.surprise[i] - (-theta if c.ascend else theta) * gradient
                erased = erase / power_of(i, u) * (before[i] @ u[..., None]) @ u[..., None, :]
                memory.surprise[i] = surprise
                memory.running[i] = keep[..., None, None] * before[i] - erased + surprise
        at = memory.start if c.read == "chunk" else before if c.read_before else memory.running
        answer = self.answer(at, q)
        self.count += 1
        if self.count % c.chunk_size == 0:
            memory.start = list(memory.running)
        return answer

    def steps(self, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Every layer's gradient over max(1, |u|^2), the window's mean (NL Eq. 68), and the token's own inputs."""
        c, memory = self.config, self.memory
        total = sum((m for _, _, m in self.window), torch.zeros(()))
        mean: list[Tensor] = []
        for key, value, importance in self.window:
            gradients, inputs = inner_gradients(c, memory, memory.start, key, value)
            if c.gradient == "online":
                gradients[-1] = online_gradient(c, memory.running, inputs, k, v)
            share = (importance / total)[..., None, None]
            scaled = [share * g / power_of(i, u) for i, (g, u) in enumerate(zip(gradients, inputs, strict=True))]
            mean = [a + b for a, b in zip(mean, scaled, strict=True)] if mean else scaled
        return mean, inputs

    def begin_document(self) -> None:
        """What was written so far is a chunk of its own."""
        self.window = []
        self.memory.start = list(self.memory.running)
        self.count = 0


def power_of(layer: int, u: Tensor) -> Tensor:
    """max(1, |u|^2) of a layer's input `[N, H, D]`, as a factor of its weight; 1 for the first (keys of length 1)."""
    return (u[..., :1] * 0 + 1 if layer == 0 else u.square().sum(-1, keepdim=True).clamp_min(1.0))[..., None]


def slow_neural_memory(layer: NeuralMemory, x: Tensor, slow: SlowMemory) -> Tensor:
    """Outputs for `[N, T, hidden]`."""
    if layer.persistent is not None:
        for p in layer.persistent:
            slow.write(p.expand_as(x[:, 0]))
        slow.begin_document()
    outputs = []
    for token in x.unbind(1):
        y = slow.write(token)
        if layer.gate_proj is not None:
            y = y * F.silu(layer.gate_proj(token))
        outputs.append(y @ layer.out_proj.weight.mT)
    return torch.stack(outputs, 1)


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary positions as products of complex numbers."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(frequency), position * frequency)
    return torch.cat([turned.real, turned.imag], -1)


def rms(x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
    """RMSNorm with its learnable vector."""
    assert norm.eps is not None
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def look(attention: SoftmaxAttention, x: Tensor, position: int, seen: list[tuple[Tensor, int | None]]) -> Tensor:
    """Attention of one token to `(token, position)` pairs, `[N, hidden]`; no position is no rotation."""
    c = attention.config
    q = (x @ attention.query.weight.mT).unflatten(-1, (c.num_heads, -1))
    scores, values = [], []
    for token, place in seen:
        k = (token @ attention.key.weight.mT).unflatten(-1, (c.num_heads, -1))
        pair = (q, k) if place is None else (turn(q, position, c.rope_theta), turn(k, place, c.rope_theta))
        scores.append((pair[0] * pair[1]).sum(-1) / c.head_dim**0.5)
        values.append((token @ attention.value.weight.mT).unflatten(-1, (c.num_heads, -1)).expand_as(q))
    share = torch.stack(scores, -1).softmax(-1)
    return (share[..., None] * torch.stack(values, -2)).sum(-2).flatten(-2)


def slow_context(layer: MemoryAsContext, x: Tensor, slow: SlowMemory) -> Tensor:
    """Titans Eq. 21-25: retrieve from the memory before the segment, attend, write the attention's answer, read it."""
    c, fixed = layer.config, layer.persistent.shape[0]
    before, h, s = slow.memory.running, [], []
    outputs = []
    for t, token in enumerate(x.unbind(1)):
        i = t % c.segment_size
        if i == 0:
            before, h, s = list(slow.memory.running), [], []
        h.append(slow.answer(before, slow.query(token)))
        s.append(token)
        seen = [(p.expand_as(token), j) for j, p in enumerate(layer.persistent)]
        seen += [(m, fixed + j) for j, m in enumerate(h)]
        seen += [(u, fixed + c.segment_size + j) for j, u in enumerate(s)]
        y = rms(look(layer.attention, token, fixed + c.segment_size + i, seen), layer.norm)
        m = slow.write(y)
        outputs.append((y * F.silu(m)) @ layer.attention.output.weight.mT)
    return torch.stack(outputs, 1)


def slow_gate(layer: MemoryAsGate, x: Tensor, slow: SlowMemory) -> Tensor:
    """Titans Eq. 26-28."""
    for p in layer.persistent:
        slow.write(p.expand_as(x[:, 0]))
    slow.begin_document()
    tokens, outputs = x.unbind(1), []
    for t, token in enumerate(tokens):
        seen: list[tuple[Tensor, int | None]] = [(p.expand_as(token), None) for p in layer.persistent]
        seen += [(tokens[j], j) for j in range(max(0, t - layer.config.window + 1), t + 1)]
        y = rms(look(layer.attention, token, t, seen), layer.norm)
        outputs.append((y * F.silu(slow.write(token))) @ layer.attention.output.weight.mT)
    return torch.stack(outputs, 1)


def slow_layer(layer: MemoryAsLayer, x: Tensor, slow: SlowMemory) -> Tensor:
    """Titans Eq. 29-31."""
    prefix = slow_neural_memory(layer.memory, layer.persistent.expand(len(x), -1, -1), slow)
    slow.begin_document()
    heard = rms(slow_neural_memory(layer.memory, x, slow), layer.norm).unbind(1)
    outputs = []
    for t, y in enumerate(heard):
        seen: list[tuple[Tensor, int | None]] = [(p, None) for p in rms(prefix, layer.norm).unbind(1)]
        seen += [(heard[j], j) for j in range(max(0, t - layer.config.window + 1), t + 1)]
        outputs.append(look(layer.attention, y, t, seen) @ layer.attention.output.weight.mT)
    return torch.stack(outputs, 1)
