"""RWKV-7's time mixing token by token, to be read beside its paper; the yardstick of the fast layer.

Only parameters are taken from the layer, none of its functions. For inputs within the layer's bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.layers.rwkv7 import RWKV7


@dataclass
class Streams:
    """What the memory of every head sees and what stands around it, `[N, T, H, K]`; the gate `[N, T, hidden]`."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    kappa: Tensor
    rate: Tensor
    gate: Tensor


def streams_of(layer: RWKV7, x: Tensor) -> Streams:
    """Token shift, projections and rates."""
    earlier = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    x_r, x_w, x_k, x_v, x_a, x_g = ((1 - mix) * x + mix * earlier for mix in layer.mix)
    k = x_k @ layer.k_proj.weight.mT
    decay = torch.tanh(x_w @ layer.decay_down.weight.mT) @ layer.decay_up.weight.mT + layer.decay_bias
    rate = torch.sigmoid(x_a @ layer.rate_down.weight.mT @ layer.rate_up.weight.mT + layer.rate_bias)
    kappa = (k * layer.erase_scale).unflatten(-1, (layer.config.num_heads, -1))
    heads = {
        "r": x_r @ layer.r_proj.weight.mT,
        "w": torch.exp(-math.exp(-0.5) * torch.sigmoid(decay)),
        "k": k * (1 + (rate - 1) * layer.write_share),
        "v": x_v @ layer.v_proj.weight.mT,
        "rate": rate,
    }
    return Streams(
        **{name: t.unflatten(-1, (layer.config.num_heads, -1)) for name, t in heads.items()},
        kappa=kappa / (kappa.square().sum(-1, keepdim=True) + 1e-12).sqrt(),
        gate=torch.sigmoid(x_g @ layer.gate_down.weight.mT) @ layer.gate_up.weight.mT,
    )


def reference_rwkv7(layer: RWKV7, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output for rows `[N, T, hidden]` that start fresh, and the fast weights `[N, H, V, K]` at the end."""
    s = streams_of(layer, x)
    state = x.new_zeros(len(x), layer.config.num_heads, layer.config.head_dim, layer.config.head_dim)
    outputs = []
    for t in range(x.shape[1]):
        kappa = s.kappa[:, t]
        factor = torch.diag_embed(s.w[:, t]) - kappa[..., :, None] * (s.rate[:, t] * kappa)[..., None, :]
        state = state @ factor + s.v[:, t, :, :, None] * s.k[:, t, :, None, :]
        outputs.append((state @ s.r[:, t, :, :, None])[..., 0])
    return finish(layer, torch.stack(outputs, 1), s), state


def finish(layer: RWKV7, o: Tensor, s: Streams) -> Tensor:
    """GroupNorm of every head of o `[N, T, H, V]`, the token's own value, the gate and the last projection."""
    c = layer.config
    o = o - o.mean(-1, keepdim=True)
    o = o / (o.square().mean(-1, keepdim=True) + c.head_dim * c.norm_eps).sqrt() * layer.norm_weight + layer.norm_bias
    o = o + (s.r * s.k * layer.bonus).sum(-1, keepdim=True) * s.v
    return layer.out_proj(o.flatten(-2) * s.gate)
