"""The inner model of a test-time training layer: f(x) = x + LN(f_res(x)) (TTT, section 2.7)."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.parts import free_of_weight_decay
from nestling.layers.ttt_config import TTTConfig
from nestling.memory.bank import BankState

FIRST_DEVIATION = 0.02
"""Standard deviation of the first fast weights and of the rates' projection, as in the authors' code."""


class InnerModel(nn.Module):
    """Initial fast weights, one tensor a layer and head, and the parameters of the LayerNorm.

    f_res is z = W k~ for "linear" and z = W_2 h~, h = gelu(W_1 k~) for "mlp", where x~ is x with an entry of 1 behind
    it: the last column of a fast weight is its bias, which learns and is read like the rest of it.
    """

    def __init__(self, config: TTTConfig) -> None:
        super().__init__()
        c = self.config = config
        widths = [c.head_dim, c.head_dim]
        if c.inner == "mlp":
            widths.insert(1, c.expansion * c.head_dim)
        shapes = [(c.num_heads, out, width + 1) for width, out in pairwise(widths)]
        self.initial = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])
        self.norm_weight = nn.Parameter(torch.empty(c.num_heads, c.head_dim))
        self.norm_bias = nn.Parameter(torch.empty(c.num_heads, c.head_dim))
        free_of_weight_decay(self.norm_weight, self.norm_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, 0.02^2) with biases 0, as in the authors' code; a plain LayerNorm."""
        for weight in self.initial:
            nn.init.normal_(weight, std=FIRST_DEVIATION)
            with torch.no_grad():
                weight[..., -1].zero_()
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def init_state(self, batch_size: int, dtype: torch.dtype) -> BankState:
        """The meta-learned fast weights of every row; gradients reach the parameters through it."""
        rows = [w.to(dtype).expand(batch_size, *w.shape) for w in self.initial]
        return BankState(start=rows, running=list(rows), surprise=None)

    def aim(self, target: Float[Tensor, "N H L D"]) -> Float[Tensor, "N H L D"]:
        """w (b - target), the part of the loss's gradient before LN that no fast weight changes (w, b of LN)."""
        weight, bias = self._norm(target.dtype)
        return weight * (bias - target)

    def lesson(
        self, weights: list[Tensor], key: Float[Tensor, "N H C K"], aim: Float[Tensor, "N H C D"]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs x~ of every layer and gradients of the inner loss at its output, both at `weights`.

        The loss of a token is 1/2 |LN(f_res(k)) - target|^2, which is 1/2 |f(k) - v|^2 for the target v - k
        (Eq. 4). The division by D that makes it a mean is part of the learning rate.

        Args:
            weights: fast weights at the mini-batch's start.
            key: k~, with K = D + 1.
            aim: `aim` of v - k.
        """
        inputs, hidden = [key], []
        z = key @ weights[0].mT
        for weight in weights[1:]:
            hidden.append(z)
            inputs.append(with_one(F.gelu(z)))
            z = inputs[-1] @ weight.mT
        g = self._output_gradient(z, aim)
        gradients = [g]
        for weight, z in zip(reversed(weights[1:]), reversed(hidden), strict=True):
            g = torch.ops.aten.gelu_backward(g @ weight[..., :-1], z)
            gradients.insert(0, g)
        return inputs, gradients

    def _output_gradient(self, z: Tensor, aim: Tensor) -> Tensor:
        """Gradient of 1/2 |LN(z) - target|^2 at z: with n = (z - mean) / std and e = w (w n + b - target),

        (e - mean(e) - n mean(e n)) / std.
        """
        weight, _ = self._norm(z.dtype)
        width = [z.shape[-1]]
        n, mean, rstd = torch.native_layer_norm(z, width, None, None, self.config.norm_eps)
        e = torch.addcmul(aim, weight * weight, n)
        # Differentiable, as the outer gradient needs it, and one operation in place of twelve.
        wanted = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(e, z, width, mean, rstd, None, None, wanted)[0]

    def answer(self, q: Float[Tensor, "N H L D"], z: Float[Tensor, "N H L D"]) -> Float[Tensor, "N H L D"]:
        """f(q) = q + LN(z) for z = f_res(q)."""
        weight, bias = self._norm(z.dtype)
        return q + torch.addcmul(bias, weight, F.layer_norm(z, z.shape[-1:], eps=self.config.norm_eps))

    def _norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.norm_weight.to(dtype)[:, None], self.norm_bias.to(dtype)[:, None]


def with_one(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D+1"]:
    """x~: the input of a fast weight whose last column is a bias."""
    return F.pad(x, (0, 1), value=1.0)
