"""A deep memory whose weights stay on a simplex: retention by a Kullback-Leibler divergence (Miras Eq. 21, 27; Memora).

    W_t = c softmax(a_t log W_{t-1} - l_t grad_W l),     every row of W for itself

The state is the logits Z = log W up to a constant a row, which the softmax does not see: Z_t = a_t Z_{t-1} - l_t g_t
x_t^T is the one rule, momentum included, and a chunk's write has its closed form. The read has none: softmax(Z_t) q_t
needs every entry of Z_t of every token, so it costs V K exponentials a token where the linear read costs V + K products
with every token of the chunk. It runs in blocks of tokens, which the backward pass computes again.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.memory.activation import ACTIVATIONS, activate
from nestling.memory.bank import BankState, MemoryBank, Mix
from nestling.memory.lesson import Lesson, Rates
from nestling.memory.objective import output_gradient
from nestling.memory.rule import Rule
from nestling.ops.chunk_rule import Decay, Writes, chunk_advance, decay_products
from nestling.ops.chunk_step import ChunkDecay

READ_BLOCK = 8
"""Tokens whose weights exist at the same time. An entry costs READ_BLOCK products for its logit and one exponential."""
EPS = 1e-6


class SimplexBank(MemoryBank):
    """One memory a head of two layers, M(x) = x + norm(W_2 act(W_1 x)), with non-negative weights.

    Every row of W_1 sums to its length K, every row of W_2 to 1. So unit keys give hidden activations of unit size, and
    the norm (LayerNorm without parameters), which Miras has and which takes the common part of non-negative weights
    away, makes the size of W_2 one of its gradient alone: with 1 a step l moves the output by about l times the error.
    """

    def __init__(self, names: tuple[str, ...], num_heads: int, width: int, expansion: int, activation: str) -> None:
        super().__init__(names, (), num_heads, width, 2, expansion, activation)

    def reset_parameters(self) -> None:
        """Logits of unit variance, as parameters of the size of other linear layers' times sqrt(inputs)."""
        for weight in self.initial:
            nn.init.normal_(weight, std=1.0 / math.sqrt(weight.shape[-1]))

    def _initial(self, dtype: torch.dtype) -> list[Tensor]:
        """The meta-learned logits, `[H, ...]`."""
        return [w * math.sqrt(w.shape[-1]) for w in self.initial(dtype)]

    def read(self, weights: list[Tensor], inputs: dict[str, Tensor], unit: bool = False) -> dict[str, Tensor]:
        """Outputs at given logits; see `MemoryBank.read`."""
        name = self.deep[0]
        x = inputs[name]
        w1, w2 = _on_simplex(weights)
        h = ACTIVATIONS[self.activation](x @ w1.mT)
        return {name: x + _normalise(h @ w2.mT)[0]}

    def lesson(
        self,
        rule: Rule,
        weights: list[Tensor],
        key: Tensor,
        value: Tensor,
        self_targets: bool,
        base: list[Tensor] | None = None,
        teachers: list[Tensor] | None = None,
        length: Tensor | None = None,
    ) -> Lesson:
        """See `MemoryBank.lesson`; the gradients are those with respect to W, as mirror descent takes them."""
        w1, w2 = _on_simplex(weights)
        z1 = key @ w1.mT
        h, slope = activate(self.activation, z1)
        z2 = h @ w2.mT
        normed, scale = _normalise(z2)
        g = output_gradient(rule, key + normed, value)
        g = scale * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
        first = ((g @ w2) * slope).clamp(-rule.clip, rule.clip)
        return Lesson([key, h.unsqueeze(2)], [z1, z2.unsqueeze(2)], [first, g.unsqueeze(2)])

    def update(
        self,
        rule: Rule,
        state: BankState,
        lesson: Lesson,
        rates: Rates,
        fresh: bool,
        q: Tensor | None = None,
        base: list[Tensor] | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor | None, BankState]:
        """See `MemoryBank.update`; an average of logarithms is none of the weights, so there is no `mix`."""
        assert mix is None and base is None
        (x1, x2), (g1, g2) = lesson.inputs, lesson.gradients
        x2, g2 = x2.squeeze(2), g2.squeeze(2)
        lr1, lr2 = (lr[..., None] for lr in rates.inner_lr)
        steps = lr1 * g1, lr2 * g2 / x2.square().sum(-1, keepdim=True).clamp_min(1.0)
        logits = [state.running[0], state.running[1].squeeze(2)]
        surprise = [] if state.surprise is None else [state.surprise[0], state.surprise[1].squeeze(2)]
        answers = []
        time = x1.shape[2]
        for at in range(0, time, READ_BLOCK):
            part = slice(at, at + READ_BLOCK)
            tokens = [x1[:, :, part], steps[0][:, :, part], x2[:, :, part], steps[1][:, :, part]]
            query = None if q is None else q[:, :, part]
            given = (_part(rates.decay, part), tokens, query, logits, surprise)
            if torch.is_grad_enabled():
                y, logits, surprise = checkpoint(self._block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                y, logits, surprise = self._block(*given)
            answers.append(y)
        pushed = [surprise[0], surprise[1].unsqueeze(2)] if surprise else None
        after = BankState(state.start, [logits[0], logits[1].unsqueeze(2)], pushed)
        return None if q is None else torch.cat(answers, 2), after

    def _block(
        self, decay: ChunkDecay, tokens: list[Tensor], q: Tensor | None, logits: list[Tensor], surprise: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """A few tokens: answers `[N, H, L, V]` (None without q), logits and surprises after them."""
        products = decay_products(decay.log_retention, decay.log_momentum, decay.valid)
        y, running, pushed = q, [], []
        for layer, (weight, (x, step)) in enumerate(zip(logits, (tokens[:2], tokens[2:]), strict=True)):
            writes, old = Writes(x, step, None), surprise[layer] if surprise else None
            if y is not None:
                own = token_weights(writes, products, weight, old).softmax(-1)
                y = _sums(layer, weight) * (own @ y[..., None]).squeeze(-1)
                y = ACTIVATIONS[self.activation](y) if layer == 0 else _normalise(y)[0]
            after, moved = chunk_advance(writes, products, weight, old)
            running.append(after)
            if moved is not None:
                pushed.append(moved)
        return None if y is None or q is None else q + y, running, pushed


def token_weights(
    writes: Writes, decay: Decay, weight: Float[Tensor, "*batch V K"], surprise: Float[Tensor, "*batch V K"] | None
) -> Float[Tensor, "*batch C V K"]:
    """W_t of every token of a chunk without erase, in full."""
    inner, kept = decay.inner, decay.start[..., None, None] * weight.unsqueeze(-3)
    if decay.inner_momentum is not None:
        assert decay.start_momentum is not None and surprise is not None
        inner, kept = decay.inner_momentum, kept + decay.start_momentum[..., None, None] * surprise.unsqueeze(-3)
    # [C, V, C] with the steps that have reached W_t, times [C, K].
    reached = inner.unsqueeze(-2) * writes.step.mT.unsqueeze(-3)
    return kept - reached @ writes.x.unsqueeze(-3)


def _on_simplex(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    first, second = weights
    return _sums(0, first) * first.softmax(-1), second.squeeze(2).softmax(-1)


def _sums(layer: int, weight: Tensor) -> float:
    """c, the sum of a row."""
    return float(weight.shape[-1]) if layer == 0 else 1.0


def _normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z - mean) / deviation over the last dimension, and 1 / deviation."""
    centred = z - z.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return centred * scale, scale


def _part(decay: ChunkDecay, part: slice) -> ChunkDecay:
    rates = (decay.log_retention, decay.log_momentum, decay.valid)
    return ChunkDecay(*(None if r is None else r[..., part] for r in rates))  # type: ignore[arg-type]
