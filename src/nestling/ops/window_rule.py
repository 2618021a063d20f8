"""The Omega rule in closed form: a token's inner objective covers a window of past tokens.

    S_t = b_t S_{t-1} - sum_{t-c < i <= t} G[t,i] g_i x_i^T,     W_t = a_t W_{t-1} + S_t

(NL Eq. 68; Atlas, arXiv:2505.23735). All g_i of a chunk are taken at the same weights, so an outer product is one
matrix that enters at up to c tokens: with the products A and B of `ops.chunk_rule` it enters W_t with D[t,i] =
(A B G)[t,i], and everything else stays as it is there. The window reaches P = c - 1 tokens back over the chunk's start,
whose gradients are taken again at the chunk's weights: x and g hold P + C tokens, G and D are C x (P + C).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nestling.ops.chunk_rule import Decay, Writes, chunk_advance, chunk_read


def window_shares(
    log_importance: Float[Tensor, "*batch S"], window: int, valid: Bool[Tensor, "*#batch S"] | None = None
) -> Float[Tensor, "*batch C S"]:
    """What every token of the window counts for in a token's objective; a row's shares add up to 1.

    Args:
        log_importance: logarithms of the tokens' importances, those of the `window - 1` tokens before the chunk first.
        window: c, tokens in an objective, the token itself included.
        valid: which tokens are there; those that are not count for nothing, and have rows of zeros.
    """
    before, slots = window - 1, log_importance.shape[-1]
    token = torch.arange(before, slots, device=log_importance.device)[:, None]
    behind = token - torch.arange(slots, device=log_importance.device)
    seen = (behind >= 0) & (behind < window)
    if valid is not None:
        seen = seen & valid[..., None, :] & valid[..., before:, None]
    # The lowest number and not minus infinity: rows of tokens that are not there would have no number at all.
    low = torch.finfo(log_importance.dtype).min
    return log_importance[..., None, :].masked_fill(~seen, low).softmax(-1) * seen


def window_products(decay: Decay, band: Float[Tensor, "*batch C S"]) -> Decay:
    """`decay` for steps that enter at several tokens: D = A G, or A B G with momentum.

    Args:
        decay: products of the chunk.
        band: G, row t holds what every step counts for at token t; rows of tokens that are not there are zero.
    """
    if decay.inner_momentum is None:
        return replace(decay, inner=decay.inner @ band)
    assert decay.last_momentum is not None
    last = (decay.last_momentum[..., None, :] @ band).squeeze(-2)
    steps = decay.inner_momentum @ band
    # A itself is for what is erased, and a window erases nothing.
    return replace(decay, inner=steps, inner_momentum=steps, last_momentum=last)


def window_step(
    x: Float[Tensor, "*batch S K"],
    g: Float[Tensor, "*batch S V"],
    band: Float[Tensor, "*batch C S"],
    decay: Decay,
    weight: Float[Tensor, "*batch V K"],
    surprise: Float[Tensor, "*batch V K"] | None = None,
    *,
    q: Float[Tensor, "*batch C K"] | None = None,
    normalise: bool = False,
    read_before: bool = False,
) -> tuple[Float[Tensor, "*batch C V"] | None, Tensor, Tensor | None]:
    """Write a chunk and read every token's own weights at q, as `ops.chunk_step.chunk_step` does without a window.

    Args:
        x: inputs of the weight, those of the tokens before the chunk first.
        g: gradients at its output, all at the same weights.
        band: G, rates included.
        decay: `decay_products` of the chunk.
        weight: running fast weights before the chunk.
        surprise: momentum before the chunk; given exactly when `decay` has momentum.
        q: queries, or None for no read.
        normalise: divide every step by max(1, |x|^2).
        read_before: every token reads the weights before its own write.

    Returns:
        The answers (None without q), and weight and surprise after the chunk.
    """
    if normalise:
        g = g * x.square().sum(-1, keepdim=True).clamp_min(1.0).reciprocal()
    writes, products = Writes(x, g, None), window_products(decay, band)
    y = None if q is None else chunk_read(q, writes, products, weight, surprise, read_before)
    return y, *chunk_advance(writes, products, weight, surprise)
