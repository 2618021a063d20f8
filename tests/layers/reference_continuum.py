"""The continuum memory token by token (NL Eq. 70-74), to be read beside the paper; the yardstick of the fast layer.

Every token and every level is a loop step, and every inner gradient comes from `torch.autograd.grad` of the local loss,
differentiable itself so that outer gradients pass through the writes. Only parameters are taken from the layer, none of
its functions.

For a level of period C with fast weight W, tokens counted from t = 1, r the level's rate and u_t = RMSNorm(x_t):

    h_t = silu(W_gate u_t) * (W_up u_t),    y_t = W_i h_t                 W_i: the weight after the last full period
    with `gain`: y_t = W_0 h_t + g * (W_i - W_0) h_t                      W_0: the parameter
    L_t(W) = 1/2 |W key_t - target_t|^2 / max(1, |key_t|^2)

    step "token":    g_t = dL_t/dW at W_i,  W'_t = W'_{t-1} (I - r/C key_t key_t^T / max(1, |key_t|^2)) - r/C g_t
                     (without the erase: W'_{t-1} - r/C g_t; with a gain it erases W'_{t-1} - W_0);  W* = W'_t at the
                     period's end
    step "spectral": W* = W_i - r / max(1, s) sum_t g_t,  s^4 the sum of the fourth powers of the eigenvalues of
                     sum_t key_t key_t^T / max(1, |key_t|^2)
    step "proximal": W* is where the derivative of sum_t L_t(W) + |W - W_i|^2 (1 - r) / (2 r) is zero

and if t is a multiple of C (Eq. 71), with momentum b and retention a (without them b = 0, a = 1)

    S <- b S + (1 - b) min(1, 2 (1 - b) / (1 + b)) (W* - W_i),    W_{i+1} = W_0 + a (W_i + S - W_0),    S <- a S

and, nested, where W_0 is the context's first weight, if t is a multiple of the period above:
W_0 <- W_0 + s (W_{i+1} - W_0), W_{i+1} = W_0, S = 0 (Eq. 72).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.continuum import ContinuumLevel, ContinuumMemory


@dataclass
class Level:
    """One level of every row; fast weights `[N, hidden, intermediate]`, last hidden activation `[N, intermediate]`.

    `lessons` holds keys and targets of the period's tokens.
    """

    start: Tensor
    running: Tensor
    initial: Tensor
    last: Tensor
    surprise: Tensor
    lessons: list[tuple[Tensor, Tensor]]


def reference(layer: ContinuumMemory, x: Tensor) -> tuple[Tensor, list[Level]]:
    """The layer's output for rows `[N, T, hidden]` that start fresh, and all levels after the last token."""
    parts = [part for part in layer.levels if isinstance(part, ContinuumLevel)]
    levels = []
    for part in parts:
        weight = part.down.repeat(len(x), 1, 1)
        last = x.new_zeros(len(x), part.down.shape[1])
        levels.append(Level(weight, weight, weight, last, torch.zeros_like(weight), []))
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
    if part.gain is not None:
        y = h @ part.down.T + part.gain * (y - h @ part.down.T)
    key = level.last if c.target == "next" else h
    target = u if part.value is None else u @ part.value.weight.T
    level.lessons.append((key, target))
    if part.rule.step == "token":
        level.running = token_step(part, level, key, target)
    level.last = h
    if count % part.period == 0:
        end_period(part, level)
    if part.context is not None and count % part.context == 0:
        assert part.transfer is not None
        share = torch.sigmoid(part.transfer)
        level.initial = level.start = level.running = level.initial + share * (level.start - level.initial)
        level.surprise = torch.zeros_like(level.surprise)
    return y


def loss(weight: Tensor, key: Tensor, target: Tensor) -> Tensor:
    """L_t, summed over rows."""
    return ((apply(weight, key) - target).square().sum(-1) / 2 / torch.clamp(key.square().sum(-1), min=1)).sum()


def token_step(part: ContinuumLevel, level: Level, key: Tensor, target: Tensor) -> Tensor:
    """W'_t."""
    assert part.rate is not None and part.period is not None
    (gradient,) = torch.autograd.grad(loss(level.start, key, target), level.start, create_graph=True)
    rate = torch.sigmoid(part.rate) / part.period
    if not part.config.erase:
        return level.running - rate * gradient
    power = torch.clamp(key.square().sum(-1), min=1)[:, None, None]
    held = level.running if part.gain is None else level.running - part.down
    return level.running - rate * gradient - rate / power * apply(held, key)[:, :, None] * key[:, None, :]


def whole_step(part: ContinuumLevel, level: Level) -> Tensor:
    """W* of a step over the whole period."""
    assert part.rate is not None
    rate = torch.sigmoid(part.rate)
    gram = sum((k[:, :, None] * k[:, None, :] / torch.clamp(k.square().sum(-1), min=1)[:, None, None]
               for k, _ in level.lessons), torch.zeros(()))  # fmt: skip
    if part.rule.step == "spectral":
        total = sum((loss(level.start, *lesson) for lesson in level.lessons), torch.zeros(()))
        (gradient,) = torch.autograd.grad(total, level.start, create_graph=True)
        size = torch.linalg.eigvalsh(gram).pow(4).sum(-1).pow(0.25)
        return level.start - (rate / torch.clamp(size, min=1))[:, None, None] * gradient
    # sum_t (W k - v) k^T / max(1, |k|^2) + (1 - r) / r (W - W_i) = 0
    cross = sum((v[:, :, None] * k[:, None, :] / torch.clamp(k.square().sum(-1), min=1)[:, None, None]
                for k, v in level.lessons), torch.zeros(()))  # fmt: skip
    near = (1 - rate) / rate
    return (cross + near * level.start) @ torch.linalg.inv(gram + near * torch.eye(gram.shape[-1], dtype=gram.dtype))


def end_period(part: ContinuumLevel, level: Level) -> None:
    """W_{i+1} and S."""
    goal = level.running if part.rule.step == "token" else whole_step(part, level)
    b = torch.zeros(()) if part.momentum is None else torch.sigmoid(part.momentum)
    a = torch.ones(()) if part.retention is None else torch.sigmoid(part.retention)
    most = torch.clamp(2 * (1 - b) / (1 + b), max=1)
    surprise = b * level.surprise + (1 - b) * most * (goal - level.start)
    level.start = level.running = level.initial + a * (level.start + surprise - level.initial)
    level.surprise, level.lessons = a * surprise, []


def apply(weight: Tensor, x: Tensor) -> Tensor:
    """W x for a weight per row."""
    return (weight @ x[..., None])[..., 0]
