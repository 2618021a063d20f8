"""The one rule, token by token, in the words of the equation. The yardstick of every test; never used for training.

For one weight matrix W of a memory, its inputs x_t and the gradients g_t of the inner objective at its output:

    S_t = b_t S_{t-1} - l_t g_t x_t^T                               surprise, with momentum (Titans Eq. 10)
    W_t = a_t W_{t-1} - e_t (W_{t-1} x_t) x_t^T + S_t               retention, delta erase, write (NL Eq. 88)
    y_t = W_t q_t  (read after write)  or  W_{t-1} q_t  (before)

Where x and g come from the input alone, the retention may be a vector and the erase may have keys of its own
(`token_diagonal_rule`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def token_rule(
    x: Float[Tensor, "*batch T K"],
    g: Float[Tensor, "*batch T V"],
    q: Float[Tensor, "*batch T K"],
    *,
    weight: Float[Tensor, "*batch V K"],
    surprise: Float[Tensor, "*batch V K"] | None = None,
    retention: Float[Tensor, "*batch T"] | None = None,
    erase: Float[Tensor, "*batch T"] | None = None,
    inner_lr: Float[Tensor, "*batch T"] | None = None,
    momentum: Float[Tensor, "*batch T"] | None = None,
    online: bool = False,
    read_before: bool = False,
) -> tuple[Float[Tensor, "*batch T V"], Tensor, Tensor | None]:
    """The recurrence above for given x and g.

    Args:
        x: inputs of the weight (keys or hidden activations).
        g: gradients at the weight's output; with `online`, minus the targets, and the gradient is W_{t-1} x_t + g_t.
        q: queries.
        weight: W_0.
        surprise: S_0; None is zero.
        retention: a_t in (0, 1]; None is 1.
        erase: e_t >= 0; None is 0.
        inner_lr: l_t; None is 1.
        momentum: b_t in [0, 1); None is 0.
        online: take the L2 gradient at W_{t-1}, token by token, in place of a given one.
        read_before: y_t = W_{t-1} q_t in place of W_t q_t.

    Returns:
        y, W_T and S_T (None without momentum).
    """
    ones = torch.ones_like(x[..., 0])
    a, e = (ones if retention is None else retention), (0 * ones if erase is None else erase)
    rate = ones if inner_lr is None else inner_lr
    if momentum is not None and surprise is None:
        surprise = torch.zeros_like(weight)
    outputs = []
    for t in range(x.shape[-2]):
        x_t, q_t = x[..., t, :, None], q[..., t, :, None]
        before = weight
        recalled = weight @ x_t
        gradient = g[..., t, :, None] + (recalled if online else 0)
        step = -rate[..., t, None, None] * gradient @ x_t.mT
        if momentum is not None:
            assert surprise is not None
            step = surprise = momentum[..., t, None, None] * surprise + step
        weight = a[..., t, None, None] * weight - e[..., t, None, None] * recalled @ x_t.mT + step
        outputs.append(((before if read_before else weight) @ q_t)[..., 0])
    return torch.stack(outputs, dim=-2), weight, surprise


def token_diagonal_rule(
    k: Float[Tensor, "*batch T K"],
    v: Float[Tensor, "*batch T V"],
    q: Float[Tensor, "*batch T K"],
    *,
    weight: Float[Tensor, "*batch V K"],
    retention: Float[Tensor, "*batch T K"],
    recall_key: Float[Tensor, "*batch T K"] | None = None,
    erase_key: Float[Tensor, "*batch T K"] | None = None,
    erase: Float[Tensor, "*batch T"] | None = None,
    inner_lr: Float[Tensor, "*batch T"] | None = None,
) -> tuple[Float[Tensor, "*batch T V"], Tensor]:
    """The rule with a retention for every channel of the key, and keys of its own for what is erased:

        W_t = W_{t-1} (diag(a_t) - e_t b_t c_t^T) + l_t v_t k_t^T,    y_t = W_t q_t

    Args:
        k: keys of the write.
        v: values.
        q: queries.
        weight: W_0.
        retention: a_t in (0, 1].
        recall_key: b_t, at which the memory is asked for what is to be erased; None erases nothing.
        erase_key: c_t, along which that is taken away; None is k_t.
        erase: e_t; None is 1.
        inner_lr: l_t; None is 1.

    Returns:
        y and W_T.
    """
    outputs = []
    for t in range(k.shape[-2]):
        kept = weight * retention[..., t, None, :]
        if recall_key is not None:
            recalled = weight @ recall_key[..., t, :, None]
            recalled = recalled if erase is None else erase[..., t, None, None] * recalled
            kept = kept - recalled @ (k if erase_key is None else erase_key)[..., t, None, :]
        written = v[..., t, :, None] @ k[..., t, None, :]
        weight = kept + (written if inner_lr is None else inner_lr[..., t, None, None] * written)
        outputs.append((weight @ q[..., t, :, None])[..., 0])
    return torch.stack(outputs, dim=-2), weight


def window_rule(
    x: Float[Tensor, "*batch S K"],
    g: Float[Tensor, "*batch S V"],
    q: Float[Tensor, "*batch T K"],
    *,
    weight: Float[Tensor, "*batch V K"],
    importance: Float[Tensor, "*batch S"],
    window: int,
    inner_lr: Float[Tensor, "*batch T"],
    surprise: Float[Tensor, "*batch V K"] | None = None,
    retention: Float[Tensor, "*batch T"] | None = None,
    momentum: Float[Tensor, "*batch T"] | None = None,
    read_before: bool = False,
) -> tuple[Float[Tensor, "*batch T V"], Tensor, Tensor | None]:
    """The Omega rule (NL Eq. 68) for given x and g: a token's step is the mean over a window of past tokens.

        S_t = b_t S_{t-1} - l_t sum_i m_i g_i x_i^T / sum_i m_i over t - c < i <= t,   W_t = a_t W_{t-1} + S_t

    Args:
        x: inputs of the weight, of the S - T tokens before the first and of the T tokens.
        g: gradients at the weight's output.
        q: queries of the T tokens.
        weight: W_0.
        importance: m_i > 0.
        window: c.
        inner_lr: l_t.
        surprise: S_0; None is zero.
        retention: a_t; None is 1.
        momentum: b_t; None is 0.
        read_before: y_t = W_{t-1} q_t in place of W_t q_t.

    Returns:
        y, W_T and S_T (None without momentum).
    """
    outputs = []
    if momentum is not None and surprise is None:
        surprise = torch.zeros_like(weight)
    before = x.shape[-2] - q.shape[-2]
    for t in range(q.shape[-2]):
        step, total = torch.zeros_like(weight), torch.zeros_like(importance[..., 0])
        for i in range(max(0, before + t - window + 1), before + t + 1):
            step = step + importance[..., i, None, None] * g[..., i, :, None] @ x[..., i, None, :]
            total = total + importance[..., i]
        step = -(inner_lr[..., t] / total)[..., None, None] * step
        if momentum is not None:
            assert surprise is not None
            step = surprise = momentum[..., t, None, None] * surprise + step
        old = weight
        weight = (1 if retention is None else retention[..., t, None, None]) * weight + step
        outputs.append(((old if read_before else weight) @ q[..., t, :, None])[..., 0])
    return torch.stack(outputs, dim=-2), weight, surprise
