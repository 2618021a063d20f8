"""The one rule, token by token, in the words of the equation. The yardstick of every test; never used for training.

For one weight matrix W of a memory, its inputs x_t and the gradients g_t of the inner objective at its output:

    S_t = b_t S_{t-1} - l_t g_t x_t^T                               surprise, with momentum (Titans Eq. 10)
    W_t = a_t W_{t-1} - e_t (W_{t-1} x_t) x_t^T + S_t               retention, delta erase, write (NL Eq. 88)
    y_t = W_t q_t  (read after write)  or  W_{t-1} q_t  (before)
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
