"""TTT layers token by token, to be read beside the paper (arXiv:2407.04620); the yardstick of the fast layer.

The inner model is written as the paper writes it, f(x) = x + LN(f_res(x)) with weights and biases apart, and the inner
gradient is `torch.autograd.grad` of |f(k) - v|^2 / 2, differentiable itself so that outer gradients pass through the
writes. Only parameters are taken from the layer, none of its functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.layers.ttt import TTTLayer

Weights = list[tuple[Tensor, Tensor]]
"""W `[N, H, out, in]` and b `[N, H, out]` of every layer of f_res."""


def inner_model(layer: TTTLayer, weights: Weights, x: Tensor) -> Tensor:
    """f(x) = x + LN(f_res(x)) for x `[N, H, D]`."""
    z = x
    for i, (weight, bias) in enumerate(weights):
        z = (weight @ (F.gelu(z) if i else z)[..., None])[..., 0] + bias
    normed = F.layer_norm(z, z.shape[-1:], eps=layer.config.norm_eps)
    return x + layer.inner.norm_weight * normed + layer.inner.norm_bias


def inner_gradient(layer: TTTLayer, weights: Weights, k: Tensor, v: Tensor) -> list[Tensor]:
    """Gradient of the reconstruction loss |f(k) - v|^2 / 2 (Eq. 4) at every W and b, in this order."""
    # Views, so that a parameter and its expansion are not taken for the same tensor.
    flat = [t.view_as(t) for pair in weights for t in pair]
    loss = (inner_model(layer, list(zip(flat[::2], flat[1::2], strict=True)), k) - v).square().sum() / 2
    return list(torch.autograd.grad(loss, flat, create_graph=True))


def views(layer: TTTLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[N, T, H, D]`; q and k turned by their position within the mini-batch."""
    c = layer.config
    streams = (x @ layer.in_proj.weight.mT).split(c.hidden_size, -1)
    q, k, v = streams if layer.conv_q is None else (streams[0], streams[0], streams[1])
    if layer.conv_q is not None and layer.conv_k is not None:
        q, k = convolve(q, layer.conv_q), convolve(k, layer.conv_k)
    q, k, v = (t.clamp(-1000, 1000).unflatten(-1, (c.num_heads, -1)) for t in (q, k, v))
    return turn(q, c.chunk_size, c.rope_theta), turn(k, c.chunk_size, c.rope_theta), v


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution, tap by tap."""
    width = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for back in range(min(width, t + 1)):
            y[:, t] = y[:, t] + weight[:, width - 1 - back] * x[:, t - back]
    return y


def turn(x: Tensor, chunk: int, theta: float) -> Tensor:
    """Channels i and i + D / 2 as a complex number, multiplied by exp(i position theta^(-2 i / D))."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half], x[..., half:])
    frequency = torch.tensor([theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    for t in range(x.shape[1]):
        angle = (t % chunk) * frequency
        turned = numbers[:, t] * torch.polar(torch.ones_like(angle), angle)
        x = torch.cat([x[:, :t], torch.cat([turned.real, turned.imag], -1)[:, None], x[:, t + 1 :]], 1)
    return x


def unpack(stacked: list[Tensor]) -> Weights:
    """The layer keeps a bias as the last column of its weight."""
    return [(w[..., :-1], w[..., -1]) for w in stacked]


def token_scale(layer: TTTLayer, index: int) -> Tensor | float:
    """c_i of step="mean", for the (index + 1)-th token of a mini-batch; 1 for the paper's sum."""
    return 1.0 if layer.token_scale is None else layer.token_scale[index].clamp_min(0)


def reference(layer: TTTLayer, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output; fast weights at the start of the open mini-batch; and W_0 - sum_s eta_s G_s in it."""
    c = layer.config
    start = unpack([w.expand(len(x), *w.shape) for w in layer.inner.initial])
    sums = [torch.zeros_like(t) for pair in start for t in pair]
    q, k, v = views(layer, x)
    rate = torch.sigmoid(x @ layer.rate_proj.weight.mT + layer.rate_proj.bias)
    outputs = []
    for t in range(x.shape[1]):
        # Over D: the loss of the authors' code is a mean over channels.
        eta = c.base_lr * rate[:, t] / (c.hidden_size // c.num_heads)
        found = inner_gradient(layer, start, k[:, t], v[:, t])
        sums = [s + eta.reshape(*eta.shape, *[1] * (g.dim() - 2)) * g for s, g in zip(sums, found, strict=True)]
        index = t % c.chunk_size
        own = stepped(start, sums, token_scale(layer, index))
        outputs.append(inner_model(layer, own, q[:, t]))
        if index == c.chunk_size - 1:
            start, sums = own, [torch.zeros_like(s) for s in sums]
    return finish(layer, x, torch.stack(outputs, 1)), pack(start), pack(stepped(start, sums, 1.0))


def stepped(start: Weights, sums: list[Tensor], scale: Tensor | float) -> Weights:
    """W_0 - c sum_s eta_s G_s."""
    moved = [t - scale * s for t, s in zip((t for pair in start for t in pair), sums, strict=True)]
    return list(zip(moved[::2], moved[1::2], strict=True))


def pack(weights: Weights) -> list[Tensor]:
    """The layer's layout of fast weights."""
    return [torch.cat([weight, bias[..., None]], -1) for weight, bias in weights]


def finish(layer: TTTLayer, x: Tensor, o: Tensor) -> Tensor:
    """Norm over all heads, gate and output projection of o `[N, T, H, D]`."""
    o = o.flatten(-2)
    o = F.layer_norm(o, o.shape[-1:], layer.out_norm.weight, layer.out_norm.bias, layer.config.norm_eps)
    if layer.gate_proj is not None:
        o = o * F.gelu(x @ layer.gate_proj.weight.mT)
    return o @ layer.out_proj.weight.mT
