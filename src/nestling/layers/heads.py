"""What layers with heads share: heads and their norm, first values, weight decay.

N rows, H heads, L tokens of a call, D width of a head.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nestling.ops.normalize import safe_normalize

NEW_FIELD = {"new": True}
"""Metadata of a config's field that joined after the first release. While it has its default it stays out of saved
configs, so that files and fingerprints of models that do not use it are what they were."""


@torch.no_grad()
def draw_filters(conv: nn.Parameter) -> None:
    """Short filters `[D, width]` near the identity: the last tap is the token itself."""
    nn.init.normal_(conv, std=0.1)
    conv[:, -1] += 1.0


def free_of_weight_decay(*parameters: nn.Parameter | None) -> None:
    """Mark rates, biases and filters, which shrinking to zero would change in meaning."""
    for parameter in parameters:
        if parameter is not None:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def fast_dtype(x: Tensor) -> torch.dtype:
    """The type of fast weights and tails beside an input: float64 in a float64 model, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Float[Tensor, "*batch D"], weight: Tensor, eps: float) -> Float[Tensor, "*batch D"]:
    """weight * x / sqrt(mean x^2 + eps) over the last dimension."""
    # As a unit vector, whose length cannot overflow: sqrt(D) x / sqrt(|x|^2 + D eps).
    size = math.sqrt(x.shape[-1])
    return safe_normalize(x, size * math.sqrt(eps)) * (weight * size).to(x.dtype)


def group_norm(x: Float[Tensor, "*batch D"], weight: Tensor, bias: Tensor, eps: float) -> Float[Tensor, "*batch D"]:
    """weight * (x - mean x) / sqrt(var x + eps) + bias over the last dimension."""
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps) + bias.to(x.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """`[N, L, H * D]` to `[N, H, L, D]`."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_normalised(o: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm of every head of `o` `[N, H, L, D]` with learnable `weight` `[D]`, merged to `[N, L, H * D]`."""
    return rms_norm(o.transpose(1, 2), weight, eps).to(dtype).flatten(-2)


def logit(share: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(share / (1 - share))
