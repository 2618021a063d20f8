"""Banks: memories that share their keys, rates and chunk, run as one set of batched matrix products.

A bank holds M deep memories of one architecture and G gate memories. A deep memory of depth 1 is a matrix, y = W x; of
depth L it is an MLP with residual, M(x) = x + W_L act(... act(W_1 x)) (NL Eq. 89 for L = 2; Titans for general depth).
A gate memory is a matrix with one output, since a gate is a number. All memories read the same key, so their first
weights are stacked along the output dimension: `[N, H, M * hidden + G, K]`; further weights are `[N, H, M, out, in]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.objective import output_gradient
from nestling.memory.rule import Rule
from nestling.memory.state import State
from nestling.ops import native
from nestling.ops.chunk_step import ChunkDecay, chunk_step
from nestling.ops.normalize import safe_normalize

Mix = Callable[[int, Tensor, Tensor], Tensor]
"""Makes of a layer's number, its input `[N, H, L, in]` and its answer `[N, H, L, out]` what the next layer sees."""


@dataclass
class BankState(State):
    """Fast weights of a bank, one tensor a layer.

    Attributes:
        start: weights at the start of the current chunk; keys, targets and gradients come from them.
        running: weights after the last token.
        surprise: momentum S, or None.
    """

    start: list[Tensor]
    running: list[Tensor]
    surprise: list[Tensor] | None


@dataclass
class Trace:
    """A forward pass: layer inputs and products W x (layer 0 first), slopes act'(z) before layers 1.., and the output.

    `output` is `[N, H, L, M * V + G]` for depth 1; else `[N, H, M, L, V]`, with the gates `[N, H, L, G]` apart.
    """

    inputs: list[Tensor]
    recalled: list[Tensor]
    slopes: list[Tensor]
    output: Tensor
    gates: Tensor | None


@dataclass(frozen=True)
class Lesson:
    """What a chunk teaches: every layer's inputs x, products W x with the chunk's first weights, and gradients g."""

    inputs: list[Tensor]
    recalled: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Rates:
    """Per-token rates of a chunk, `[N, H, L]` for every layer: e_t (None without erase) and l_t; what decays."""

    erase: list[Tensor] | None
    inner_lr: list[Tensor]
    decay: ChunkDecay


class InitialWeights(nn.ParameterList):
    """Meta-learned first values of fast weights, one tensor a layer; a call gives them in a type.

    A call, as every module is used: hooks on it may have to fetch the values from elsewhere.
    """

    __call__ = nn.Module.__call__

    def forward(self, dtype: torch.dtype) -> list[Tensor]:
        """The values; gradients reach the parameters through them."""
        # One by one. A slice of the list would be new parameters, which cuts functional_call off from the gradient.
        return [weight.to(dtype) for weight in self]


class MemoryBank(nn.Module):
    """The meta-learned initial fast weights of a bank, which a call gives, and the bank's read, gradient and write.

    Args:
        deep: names of the deep memories, in stacking order.
        gates: names of the gate memories.
        num_heads: H.
        width: K = V, the head dimension.
        depth: layers of a deep memory.
        expansion: hidden width over `width`.
        activation: "silu", "gelu" or "relu".
        gate_scale: factor on the gates' initial fast weights, whose parameters start smaller by it. It leaves the first
            logits as they are and makes the optimizer's steps on them so much longer.
    """

    def __init__(
        self,
        deep: tuple[str, ...],
        gates: tuple[str, ...],
        num_heads: int,
        width: int,
        depth: int,
        expansion: int,
        activation: str,
        gate_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.deep, self.gates, self.gate_scale = deep, gates, gate_scale
        self.width, self.depth, self.activation = width, depth, activation
        self.hidden = width if depth == 1 else width * expansion
        count = len(deep)
        rows = count * self.hidden + len(gates)
        shapes: list[tuple[int, ...]] = [(num_heads, rows, width)]
        for layer in range(1, depth):
            out = width if layer == depth - 1 else self.hidden
            shapes.append((num_heads, count, out, self.hidden))
        self.initial = InitialWeights([nn.Parameter(torch.empty(s)) for s in shapes])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First weights N(0, 1/K); last weights of an MLP at half that, so that the residual leads at the start."""
        for i, weight in enumerate(self.initial):
            last = i == self.depth - 1 and self.depth > 1
            nn.init.normal_(weight, std=(0.5 if last else 1.0) / math.sqrt(weight.shape[-1]))
        with torch.no_grad():
            self.initial[0][:, len(self.deep) * self.hidden :] /= self.gate_scale

    def forward(self, batch_size: int, momentum: bool, dtype: torch.dtype) -> BankState:
        """The meta-learned fast weights, one copy a row; gradients reach the parameters through it.

        The first weights of MLPs and gates are scaled by sqrt(K): their inputs have length 1, and hidden activations
        and logits should start at unit variance while the parameters keep the size of other linear layers'.
        """
        first, *deeper = self.initial(dtype)
        scale = torch.full((first.shape[1], 1), math.sqrt(self.width), dtype=dtype, device=first.device)
        if self.depth == 1:
            scale[: len(self.deep) * self.hidden] = 1.0
        scale[len(self.deep) * self.hidden :] *= self.gate_scale
        weights = [first * scale, *deeper]
        rows = [w.expand(batch_size, *w.shape) for w in weights]
        surprise = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in rows] if momentum else None
        return BankState(start=rows, running=list(rows), surprise=surprise)

    def read(self, weights: list[Tensor], x: Tensor, names: tuple[str, ...], unit: bool = False) -> dict[str, Tensor]:
        """Outputs of the named memories at given weights: deep `[N, H, L, V]`, gates `[N, H, L]`.

        `names` is all of the bank's, or all but the first deep memory. With `unit`, deep outputs have length 1.
        """
        skip = len(self.deep) - sum(n in names for n in self.deep)
        deep = self.deep[skip:]

        def plain(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor | None]:
            first, *deeper = weights
            trace = self.trace([first[..., skip * self.hidden :, :], *(w[:, :, skip:] for w in deeper)], x)
            return trace.output, trace.gates

        if 1 < self.depth <= native.MAX_LAYERS and native.fits(x, weights[0]):
            output, gates = native.native_read(plain, self._shape(first=skip), x, weights)
        else:
            output, gates = plain(x, *weights)
        if self.depth == 1:
            parts = list(output.split([self.width] * len(deep) + [1] * len(self.gates), dim=-1))
            if unit:
                parts[: len(deep)] = [safe_normalize(p) for p in parts[: len(deep)]]
        else:
            output = safe_normalize(output) if unit else output
            parts = [*output.unbind(2), *(() if gates is None else gates.split(1, dim=-1))]
        values = dict(zip(deep + self.gates, parts, strict=True))
        return {n: t.squeeze(-1) if n in self.gates else t for n, t in values.items()}

    def first_deep(self, weights: list[Tensor]) -> list[Tensor]:
        """The layers of the first deep memory alone, `[N, H, out, in]` each."""
        first, *deeper = weights
        return [first[:, :, : self.hidden], *(w[:, :, 0] for w in deeper)]

    def _shape(self, rule: Rule | None = None, self_targets: bool = True, first: int = 0) -> native.BankShape:
        dot, clip = rule is not None and rule.objective == "dot", 1.0 if rule is None else rule.clip
        return native.BankShape(
            len(self.deep), len(self.gates), self.hidden, self.activation, self_targets, dot, clip, first
        )

    def lesson(self, rule: Rule, weights: list[Tensor], key: Tensor, value: Tensor, self_targets: bool) -> Lesson:
        """What a chunk teaches the memories at its first weights.

        Args:
            rule: the learning rule.
            weights: fast weights at the chunk's start.
            key: `[N, H, L, K]`.
            value: `[N, H, L, K]`.
            self_targets: every memory's target is its own M_m(v_t) (NL Eq. 84), else v_t (Titans).
        """
        compiled = 1 < self.depth <= native.MAX_LAYERS and rule.objective in ("l2", "dot")
        if not compiled or (rule.online and self_targets) or not native.fits(key, weights[0]):
            return self._lesson(rule, weights, key, value, self_targets, rule.online)

        def plain(key: Tensor, value: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            made = self._lesson(rule, list(weights), key, value, self_targets, online=False)
            return (*made.inputs[1:], *made.recalled, *made.gradients)

        shape = self._shape(rule, self_targets)
        inputs, recalled, gradients = native.native_inner(plain, shape, key, value, weights)
        if rule.online:
            gradients[-1] = _online_gradient(rule, key, value.unsqueeze(2))
        return Lesson([key, *inputs], recalled, gradients)

    def _lesson(
        self, rule: Rule, weights: list[Tensor], key: Tensor, value: Tensor, self_targets: bool, online: bool
    ) -> Lesson:
        """`lesson` out of torch's operations; without `online` all gradients are those of the chunk's first weights."""
        at_key = self.trace(weights, key)
        if self_targets:
            at_value = self.trace(weights, value)
            target, gate_target = at_value.output, at_value.gates
        else:
            target, gate_target = self.shared_target(value)
        gradients = self.gradients(rule, weights, at_key, target, gate_target)
        if online:
            gradients[-1] = _online_gradient(rule, key if self.depth > 1 else None, target)
        return Lesson(at_key.inputs, at_key.recalled, gradients)

    def trace(self, weights: list[Tensor], x: Tensor) -> Trace:
        """All memories at `x` `[N, H, L, K]`."""
        z = x @ weights[0].mT
        if self.depth == 1:
            return Trace([x], [z], [], z, None)
        inputs, recalled, slopes, gates = [x], [z], [], None
        if self.gates:
            z, gates = z.split([z.shape[-1] - len(self.gates), len(self.gates)], dim=-1)
        z = z.unflatten(-1, (-1, self.hidden)).transpose(2, 3)
        for weight in weights[1:]:
            h, slope = activate(self.activation, z)
            z = h @ weight.mT
            inputs.append(h)
            recalled.append(z)
            slopes.append(slope)
        return Trace(inputs, recalled, slopes, z + x.unsqueeze(2), gates)

    def gradients(
        self, rule: Rule, weights: list[Tensor], at_key: Trace, target: Tensor, gate_target: Tensor | None
    ) -> list[Tensor]:
        """Gradients at every layer's output at the given weights, layer 0 first, in the layout of that layer's output.

        `target` has the layout of `at_key.output`, `gate_target` of `at_key.gates`.
        """
        g = output_gradient(rule, at_key.output, target)
        if self.depth == 1:
            return [g]
        found = [g]
        for weight, slope in zip(reversed(weights[1:]), reversed(at_key.slopes), strict=True):
            g = ((g @ weight) * slope).clamp(-rule.clip, rule.clip)
            found.append(g)
        first = found.pop().transpose(2, 3).flatten(-2)
        if gate_target is not None:
            assert at_key.gates is not None
            first = torch.cat([first, output_gradient(rule, at_key.gates, gate_target)], dim=-1)
        found.reverse()
        return [first, *found]

    def shared_target(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """v_t as every memory's target (Titans), in the output's layout; a gate's target is the mean of v_t."""
        gate = v.mean(-1, keepdim=True).expand(*v.shape[:-1], len(self.gates))
        if self.depth > 1:
            return v.unsqueeze(2), gate if self.gates else None
        return torch.cat([v.repeat(1, 1, 1, len(self.deep)), gate], dim=-1), None

    def update(
        self,
        rule: Rule,
        state: BankState,
        lesson: Lesson,
        rates: Rates,
        fresh: bool,
        q: Tensor | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor | None, BankState]:
        """Write one chunk, and read the first deep memory at q, every token at its own fast weights.

        A read of an MLP is a cascade of closed forms: the activations of layer i's answers query layer i + 1.

        Args:
            rule: the learning rule.
            state: before the chunk.
            lesson: of the chunk.
            rates: of the chunk.
            fresh: running and start weights are the same, so that `lesson` holds the products with both.
            q: queries `[N, H, L, K]`, or None.
            mix: changes every layer's answers on their way to the next layer.

        Returns:
            y `[N, H, L, V]` (None without q), and the state after the chunk, its chunk start unchanged.
        """
        running, surprises, z = [], [], q
        for layer, (x, g) in enumerate(zip(lesson.inputs, lesson.gradients, strict=True)):
            lr, erase = rates.inner_lr[layer], None if rates.erase is None else rates.erase[layer]
            online = rule.online and layer == self.depth - 1
            if z is not None and layer > 0:
                z = ACTIVATIONS[self.activation](z)
            weight, asked = state.running[layer], z
            surprise = None if state.surprise is None else state.surprise[layer]
            recalled = lesson.recalled[layer] if fresh and (online or erase is not None) else None
            z, after, surprise = chunk_step(
                x,
                g,
                lr,
                erase,
                rates.decay,
                weight,
                surprise,
                recalled=recalled,
                q=z,
                answers=self.hidden if layer < self.depth - 1 else self.width,
                # Keys have length 1; hidden activations have any length.
                normalise=layer > 0,
                read_before=rule.read_before,
                online=online,
            )
            if mix is not None and asked is not None and z is not None:
                z = mix(layer, asked, z)
            running.append(after)
            if surprise is not None:
                surprises.append(surprise)
        if self.depth > 1 and z is not None and q is not None:
            z = z + q
        return z, BankState(state.start, running, surprises or None)


def _online_gradient(rule: Rule, key: Tensor | None, target: Tensor) -> Tensor:
    """What the gradient of an output weight is without W x, which the write adds token by token (`chunk_step`).

    `key` `[N, H, L, K]` is the residual of an MLP; `target` has the layout of the output.
    """
    wanted = target.clamp(-rule.clip, rule.clip)
    return -wanted if key is None else key.unsqueeze(2) - wanted


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def activate(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z)."""
    if name == "silu":
        gate = torch.sigmoid(z)
        h = z * gate
        return h, gate + h * (1 - gate)
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return z * cdf, cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return torch.relu(z), (z > 0).to(z.dtype)
