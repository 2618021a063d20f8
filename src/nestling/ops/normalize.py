"""Normalisation that is safe at zero."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.ops import native

_BOUND = 1e17  # its square times a thousand entries is still finite in float32


def safe_normalize(x: Float[Tensor, "*batch D"], eps: float = 1e-6) -> Float[Tensor, "*batch D"]:
    """x / sqrt(|x|^2 + eps^2) over the last dimension: a zero vector gives zero, with finite gradients.

    `torch.nn.functional.normalize` divides by max(|x|, eps), and the gradient of the norm at zero is not finite there
    once differentiated twice. A vector far above `eps` (1e-6) has length 1 to float32 precision. Entries beyond 1e17
    count as 1e17, so that |x|^2 cannot overflow in float32.
    """
    if native.fits(x):
        return native.native_normalize(_plain, x, eps, _BOUND)
    return _plain(x, eps, _BOUND)


def _plain(x: Tensor, eps: float, bound: float) -> Tensor:
    x = x.clamp(-bound, bound)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps * eps)
