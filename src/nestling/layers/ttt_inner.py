"""The inner model of a test-time training layer: f(x) = x + LN(f_res(x)) (TTT, section 2.7)."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.layers.chunks import Span, scan_chunks
from nestling.layers.heads import free_of_weight_decay
from nestling.layers.ttt_config import TTTConfig
from nestling.memory.bank import BankState
from nestling.memory.grid import Grid
from nestling.memory.initial import InitialWeights
from nestling.memory.state import rows_of
from nestling.ops.chunk_step import ChunkDecay, chunk_step

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
        self.initial = InitialWeights([nn.Parameter(torch.empty(shape)) for shape in shapes])
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

    def first_weights(self, batch_size: int, dtype: torch.dtype) -> BankState:
        """The meta-learned fast weights of every row; gradients reach the parameters through it."""
        rows = [rows_of(w, batch_size) for w in self.initial(dtype)]
        return BankState(start=rows, running=list(rows), surprise=None)

    def forward(
        self,
        q: Float[Tensor, "N H L D"],
        k: Float[Tensor, "N H L D"],
        v: Float[Tensor, "N H L D"],
        eta: Float[Tensor, "N H L"],
        memory: BankState,
        grid: Grid,
        scale: Float[Tensor, "C 1"] | None,
    ) -> tuple[Float[Tensor, "N H L D"], BankState]:
        """All mini-batches: f(q_t; W_t), and the fast weights after the last token.

        Args:
            q: views that are answered.
            k: views that are learned from.
            v: views that are to be reconstructed.
            eta: learning rates.
            memory: fast weights before the first token.
            grid: where the tokens stand in their mini-batches.
            scale: c_i of a mini-batch's tokens; None where all are 1.
        """
        size = self.config.chunk_size
        # Slots without a token get a learning rate of 0.
        tokens = {"query": with_one(q), "key": with_one(k), "aim": self.aim(v - k), "eta": eta}

        def run(span: Span, tokens: dict[str, Tensor], memory: BankState, grid: Grid) -> tuple[Tensor, BankState]:
            first, count = span[0] % size, span[1] - span[0]
            share = None if scale is None else scale[first : first + count]
            z, memory = self._mini_batch(memory, **tokens, scale=share)
            return z, self._cross(memory, grid, span[1], scale)

        z, memory = scan_chunks(tokens, grid, size, memory, run)
        return self.answer(q, z), memory

    def _mini_batch(
        self,
        memory: BankState,
        query: Float[Tensor, "N H C K"],
        key: Float[Tensor, "N H C K"],
        aim: Float[Tensor, "N H C D"],
        eta: Float[Tensor, "N H C"],
        scale: Float[Tensor, "C 1"] | None,
    ) -> tuple[Float[Tensor, "N H C D"], BankState]:
        """Write the tokens of (a part of) one mini-batch, and read f_res at q, every token at its own fast weights.

        With a scale c_i the weights of a token lie on the way from W_0 to the running sum R_t = W_0 - sum eta_s G_s, so
        its read does too: W_t q = (1 - c_i) W_0 q + c_i R_t q.
        """
        inputs, gradients = self.lesson(memory.start, key, aim)
        decay = ChunkDecay(torch.zeros_like(eta))
        running, z = [], query
        for layer, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
            if layer > 0:
                z = with_one(F.gelu(z))
            y, after, _ = chunk_step(x, g, eta, None, decay, memory.running[layer], q=z, answers=g.shape[-1])
            assert y is not None
            z = y if scale is None else torch.lerp(z @ memory.start[layer].mT, y, scale)
            running.append(after)
        return z, BankState(memory.start, running, None)

    def _cross(self, memory: BankState, grid: Grid, end: int, scale: Tensor | None) -> BankState:
        """At the end of a mini-batch its last weights become the next one's W_0, in rows that have reached it."""
        if end % self.config.chunk_size or scale is None:
            return grid.cross(memory, end, self.config.chunk_size)
        start, running = [], []
        for first, last in zip(memory.start, memory.running, strict=True):
            new = torch.lerp(first, last, scale[-1])
            start.append(grid.where_crossed(end, new, first))
            running.append(grid.where_crossed(end, new, last))
        return BankState(start, running, None)

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
