"""Linear memories and Mamba-2 token by token, to be read beside their papers; the yardstick of the fast layers.

Every token is a loop step and every write is written as the papers write it, with matrices and no rule of ours. Only
parameters are taken from the layers, none of their functions. For inputs within the layers' bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.linear import LinearMemory
from nestling.layers.mamba2 import Mamba2

ROWS: dict[str, dict[str, Any]] = {
    "linear attention": {
        "feature_map": "elu",
        "normalise_qk": False,
        "denominator": True,
        "retention": "none",
        "erase": False,
        "conv_size": 1,
        "output_gate": "none",
        "output_norm": "none",
    },
    "linear attention pp": {
        "feature_map": "elu",
        "normalise_qk": False,
        "denominator": True,
        "retention": "none",
        "erase": False,
        "conv_size": 1,
        "output_gate": "none",
        "output_norm": "none",
        "initial": True,
    },
    "retnet": {
        "value_expansion": 2,
        "feature_map": "identity",
        "normalise_qk": False,
        "positions": "rope",
        "retention": "fixed",
        "erase": False,
        "conv_size": 1,
        "output_gate": "silu",
        "output_norm": "group",
    },
    "deltanet": {"retention": "none", "allow_neg_eigval": True, "output_gate": "none"},
    "gated deltanet": {"key_dim": 3, "value_expansion": 2},
    "gated deltaproduct": {"key_dim": 3, "value_expansion": 2, "writes_per_token": 2, "allow_neg_eigval": True},
    "comba": {
        "key_dim": 3,
        "value_expansion": 2,
        "state_feedback": True,
        "output_feedback": 0.5,
        "output_gate": "sigmoid",
    },
    "kimi delta": {"retention": "channel", "output_gate": "sigmoid", "gate_rank": 3},
}
"""The rows of the presets, at the width of the tests."""


@dataclass
class Tokens:
    """What the memory of every head sees: `[N, T, H, D]`, rates `[N, T, H]`, a `[N, T, H, K]` if it goes by channel.

    With several writes a token, k, v and strength have as many in their order. `share` is Comba's b by head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    strength: Tensor
    gate: Tensor
    share: Tensor | None


def reference_linear(layer: LinearMemory, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output for rows `[N, T, hidden]` that start fresh, and the fast weights `[N, H, V, K]` at the end."""
    c, tokens = layer.config, tokens_of(layer, x)
    eye = torch.eye(c.key_width, dtype=x.dtype)
    state = x.new_zeros(len(x), c.num_heads, c.value_width, c.key_width)
    total = x.new_zeros(len(x), c.num_heads, c.key_width)
    if layer.initial is not None:
        state = state + layer.initial
    if layer.initial_sum is not None:
        total = total + (1 + layer.initial_sum.exp()).log()
    outputs = []
    for t in range(x.shape[1]):
        q = tokens.q[:, t]
        for write in range(c.writes_per_token):
            at = t * c.writes_per_token + write
            k, v, strength = tokens.k[:, at], tokens.v[:, at], tokens.strength[:, at, :, None, None]
            a = tokens.a[:, t] if write == 0 else torch.ones_like(tokens.a[:, t])
            a = a if c.retention == "channel" else a[..., None].expand_as(k)
            square, written = k[..., :, None] * k[..., None, :], v[..., :, None] * k[..., None, :]
            if tokens.share is not None:
                factor = torch.diag_embed(a) - tokens.share[:, None, None] * strength * square
                state = state @ factor + strength * written
            elif c.erase:
                state = state @ torch.diag_embed(a) @ (eye - strength * square) + strength * written
            else:
                state = state @ torch.diag_embed(a) + written
            total = a * total + k
        o = (state @ q[..., None])[..., 0]
        if c.denominator:
            o = o / ((total * q).sum(-1, keepdim=True) + c.norm_eps)
        outputs.append(o)
    y = finish(layer, torch.stack(outputs, 1), tokens.gate)
    return y, torch.cat([state, total[..., None, :]], -2) if c.denominator else state


def tokens_of(layer: LinearMemory, x: Tensor) -> Tokens:
    """Projections, convolution, feature map, length and position."""
    c = layer.config
    heads, keys, values = c.num_heads, c.key_width, c.value_width
    writes = c.writes_per_token
    sizes = [heads * keys, writes * heads * keys, writes * heads * values]
    rates = {"data": heads, "channel": heads * keys}.get(c.retention, 0)
    sizes += [(c.gate_rank or heads * values) if c.output_gate != "none" else 0]
    sizes += [writes * heads if c.erase else 0, (c.gate_rank or rates) if c.retention == "channel" else rates]
    q, k, v, gate, beta, step = (x @ layer.in_proj.weight.mT).split(sizes, -1)
    gate = gate if layer.gate_up is None else gate @ layer.gate_up.weight.mT + layer.gate_up.bias
    step = step if layer.retention_up is None else step @ layer.retention_up.weight.mT
    if layer.conv is not None:
        q, k, v = convolve(torch.cat([q, k, v], -1), layer.conv).split(sizes[:3], -1)
    if c.feature_map == "silu":
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    if c.feature_map == "elu":
        q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    q = q.unflatten(-1, (heads, -1))
    k, v = (t.unflatten(-1, (writes, heads, -1)).flatten(1, 2) for t in (k, v))
    beta = beta.unflatten(-1, (writes, -1)).flatten(1, 2)
    if c.normalise_qk:
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-12).sqrt() for t in (q, k))
    if c.positions == "rope":
        q = torch.stack([turn(q[:, t], t, c.rope_theta) for t in range(q.shape[1])], 1)
        k = torch.stack([turn(k[:, t], t // writes, c.rope_theta) for t in range(k.shape[1])], 1)
    if layer.key_share is not None:
        q = q - layer.key_share[:, None] * k[:, writes - 1 :: writes]
    strength = torch.sigmoid(beta) * (2 if c.allow_neg_eigval else 1)
    share = None if layer.erase_share is None else torch.sigmoid(layer.erase_share)
    return Tokens(q, k, v, retention(layer, step), strength, gate, share)


def finish(layer: LinearMemory, o: Tensor, gate: Tensor) -> Tensor:
    """The output norm of every head of o `[N, T, H, V]`, the gate and the last projection."""
    c = layer.config
    if layer.norm_weight is not None:
        if c.output_norm == "group":
            o = o - o.mean(-1, keepdim=True)
        o = layer.norm_weight * o / (o.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        o = o if layer.norm_bias is None else o + layer.norm_bias
    y = o.flatten(-2)
    if c.output_gate == "silu":
        y = y * gate * torch.sigmoid(gate)
    if c.output_gate == "sigmoid":
        y = y * torch.sigmoid(gate)
    return layer.out_proj(y)


def retention(layer: LinearMemory, step: Tensor) -> Tensor:
    """a_t `[N, T, H]`, or `[N, T, H, K]` by channel."""
    heads = layer.config.num_heads
    if layer.config.retention == "fixed":
        return torch.tensor([1 - 2.0 ** (-5 - h) for h in range(heads)], dtype=step.dtype).expand(*step.shape[:2], -1)
    if layer.config.retention == "none":
        return step.new_ones(*step.shape[:2], heads)
    assert layer.A_log is not None and layer.dt_bias is not None
    if layer.config.retention == "channel":
        step = step.unflatten(-1, (heads, -1))
        return torch.exp(-layer.A_log.exp()[:, None] * F.softplus(step + layer.dt_bias))
    return torch.exp(-layer.A_log.exp() * F.softplus(step + layer.dt_bias))


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary position of one token: channel pair (i, i + K / 2) is a complex number, multiplied by e^(i angle)."""
    pairs = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(pairs, dtype=x.dtype) / pairs)
    turned = torch.complex(x[..., :pairs], x[..., pairs:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def convolve(x: Tensor, filters: Tensor) -> Tensor:
    """The causal depthwise convolution of `[N, T, D]` with `[D, width]`."""
    width = filters.shape[1]
    return F.conv1d(F.pad(x.mT, (width - 1, 0)), filters[:, None], groups=x.shape[-1]).mT


def reference_mamba2(layer: Mamba2, x: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output for rows that start fresh, and its state `[N, H, P, S]` after the last token."""
    c = layer.config
    inner, groups, size = c.inner_size, c.num_groups, c.state_size
    projected = x @ layer.in_proj.weight.mT
    z, xbc, dt = projected.split([inner, inner + 2 * groups * size, c.num_heads], -1)
    xbc = F.silu(convolve(xbc, layer.conv) + layer.conv_bias)
    u, b, read = xbc.split([inner, groups * size, groups * size], -1)
    dt = F.softplus(dt + layer.dt_bias)
    state = x.new_zeros(len(x), c.num_heads, c.head_dim, size)
    outputs = []
    for t in range(x.shape[1]):
        u_t = u[:, t].unflatten(-1, (c.num_heads, -1))
        b_t, c_t = (w[:, t].unflatten(-1, (groups, -1)).repeat_interleave(c.num_heads // groups, 1) for w in (b, read))
        step = dt[:, t, :, None, None]
        a = torch.exp(-step * layer.A_log.exp()[:, None, None])
        state = a * state + step * u_t[..., :, None] * b_t[..., None, :]
        outputs.append(((state @ c_t[..., None])[..., 0] + layer.D[:, None] * u_t).flatten(-2))
    y = (torch.stack(outputs, 1) * F.silu(z)).unflatten(-1, (groups, -1))
    y = y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
    return layer.out_proj(y.flatten(-2) * layer.norm_weight), state
