"""The continuum memory token by token (NL Eq. 70-74), to be read beside the paper; the yardstick of the fast layer.

Every token and every level is a loop step, and every inner gradient comes from `torch.autograd.grad` of the local loss,
differentiable itself so that outer gradients pass through the writes. Only parameters are taken from the layer, none of
its functions.

For a level of period C with fast weight W, tokens counted from t = 1, r the level's rate and u_t = RMSNorm(x_t):

    h_t = silu(W_gate u_t) * (W_up u_t),    y_t = W_i h_t                 W_i: the weight after the last full period
    g_t = d/dW 1/2 |W key_t - target_t|^2  at W = W_i
    l_t = r / C / max(1, |key_t|^2)
    W'_t = W'_{t-1} (I - l_t key_t key_t^T) - l_t g_t                      without the erase: W'_{t-1} - l_t g_t
    W_{i+1} = W'_t                         if t is a multiple of C        (Eq. 71)

and, nested, if t is a multiple of the period above: W_0 <- W_0 + s (W'_t - W_0), W_{i+1} = W'_t = W_0 (Eq. 72).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.continuum import ContinuumLevel, ContinuumMemory


@dataclass
class Level:
    """One level of every row; fast weights `[N, hidden, intermediate]`, last hidden activation `[N, intermediate]`."""

    start: Tensor
    running: Tensor
    initial: Tensor
    last: Tensor


def reference(layer: ContinuumMemory, x: Tensor) -> tuple[Tensor, list[Level]]:
    """The layer's output for rows `[N, T, hidden]` that start fresh, and all levels after the last token."""
    parts = [part for part in layer.levels if isinstance(part, ContinuumLevel)]
    levels = []
    for part in parts:
        weight = part.down.repeat(len(x), 1, 1)
        levels.append(Level(weight, weight, weight, x.new_zeros(len(x), part.down.shape[1])))
    outputs = []
    for t in range(x.shape[1]):
        stream = total = x[:, t]
        for i, (part, level) in enumerate(zip(parts, levels, strict=True)):
            y = step(part, level, stream, t + 1)
            if layer.weights is None:
                stream = total = stream + y
            else:
                total = total + layer.weights[i] * y
        outputs.append(total)
    return torch.stack(outputs, 1), levels


def step(part: ContinuumLevel, level: Level, x: Tensor, count: int) -> Tensor:
    """Token number `count` (from 1) at one level: its output `[N, hidden]`; the level learns from it."""
    c = part.config
    u = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * part.norm.weight
    h = F.silu(u @ part.gate.weight.T) * (u @ part.up.weight.T)
    y = apply(level.start, h)
    if part.period is None:
        return y
    assert part.rate is not None
    key = level.last if c.target == "next" else h
    target = u if part.value is None else u @ part.value.weight.T
    loss = (apply(level.start, key) - target).square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, level.start, create_graph=True)
    rate = torch.sigmoid(part.rate) / part.period / torch.clamp(key.square().sum(-1), min=1)
    rate = rate[:, None, None]
    written = level.running - rate * gradient
    if c.erase:
        written = written - rate * apply(level.running, key)[:, :, None] * key[:, None, :]
    level.running, level.last = written, h
    if count % part.period == 0:
        level.start = level.running
    if part.context is not None and count % part.context == 0:
        assert part.transfer is not None
        share = torch.sigmoid(part.transfer)
        level.initial = level.start = level.running = level.initial + share * (level.running - level.initial)
    return y


def apply(weight: Tensor, x: Tensor) -> Tensor:
    """W x for a weight per row."""
    return (weight @ x[..., None])[..., 0]
