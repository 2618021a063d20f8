"""Banks: memories that share their keys, rates and chunk, run as one set of batched matrix products.

A bank holds M deep memories of one architecture and G gate memories. A deep memory of depth 1 is a matrix, y = W x; of
depth L it is an MLP with residual, M(x) = x + W_L act(... act(W_1 x)) (NL Eq. 89 for L = 2; Titans for general depth).
A gate memory is a matrix with one output, since a gate is a number. All memories read the same key, so their first
weights are stacked along the output dimension: `[N, H, M * hidden + G, K]`; further weights are `[N, H, M, out, in]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestling.memory.activation import ACTIVATIONS, activate
from nestling.memory.initial import InitialWeights
from nestling.memory.lesson import (
    Lesson,
    Rates,
    Trace,
    above_base,
    generating,
    lengthened,
    online_gradient,
    shared_target,
)
from nestling.memory.objective import output_gradient
from nestling.memory.rule import Rule
from nestling.memory.state import State, rows_of
from nestling.ops import native
from nestling.ops.chunk_step import chunk_step
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
        anchored: bool = False,
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.deep, self.gates, self.gate_scale = deep, gates, gate_scale
        self.anchored, self.identity = anchored, identity
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
        """First weights N(0, 1/K); last weights of an MLP at half that, so that the residual leads at the start.

        With `identity`, matrices are the identity and the last weights of MLPs are zero.
        """
        for i, weight in enumerate(self.initial):
            last = i == self.depth - 1 and self.depth > 1
            std = 0.0 if last and self.identity else 0.5 if last else 1.0
            nn.init.normal_(weight, std=std / math.sqrt(weight.shape[-1]))
        with torch.no_grad():
            self.initial[0][:, len(self.deep) * self.hidden :] /= self.gate_scale
            if self.identity and self.depth == 1:
                eye = torch.eye(self.width, dtype=self.initial[0].dtype, device=self.initial[0].device)
                self.initial[0][:, : len(self.deep) * self.hidden] = eye.repeat(len(self.deep), 1)

    def forward(self, batch_size: int, momentum: bool, dtype: torch.dtype) -> BankState:
        """The fast weights before the first token, one copy a row: the meta-learned ones, or no difference to them.

        Gradients reach the parameters through them, or through `base`.
        """
        weights = self._initial(dtype)
        if self.anchored:
            rows = [w.new_zeros(batch_size, *w.shape) for w in weights]
        else:
            rows = [rows_of(w, batch_size) for w in weights]
        surprise = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in rows] if momentum else None
        return BankState(start=rows, running=list(rows), surprise=surprise)

    def base(self, dtype: torch.dtype) -> list[Tensor] | None:
        """W_0 of every layer, `[H, ...]`; None where the state holds whole weights."""
        return self._initial(dtype) if self.anchored else None

    def whole(self, weights: list[Tensor], base: list[Tensor] | None, gain: Tensor | None) -> list[Tensor]:
        """W_0 + F from F, or the weights themselves where the state holds whole ones.

        Args:
            weights: of the state.
            base: as `base` gives it.
            gain: `[H]`; the memories but M_memory, which is a bank's first if it is there, are W_0 + gain F.
        """
        if base is None:
            return weights
        if gain is None:
            return [b + w for b, w in zip(base, weights, strict=True)]
        found = generating(weights, base, gain)
        if self.deep[:1] != ("memory",):
            return found
        for layer, (b, w) in enumerate(zip(base, weights, strict=True)):
            own = 1 if layer else self.hidden
            found[layer] = torch.cat([b[:, :own] + w[:, :, :own], found[layer][:, :, own:]], dim=2)
        return found

    def _initial(self, dtype: torch.dtype) -> list[Tensor]:
        """The meta-learned weights, one tensor a layer, `[H, ...]`.

        The first weights of MLPs and gates are scaled by sqrt(K): their inputs have length 1, and hidden activations
        and logits should start at unit variance while the parameters keep the size of other linear layers'.
        """
        first, *deeper = self.initial(dtype)
        scale = torch.full((first.shape[1], 1), math.sqrt(self.width), dtype=dtype, device=first.device)
        if self.depth == 1:
            scale[: len(self.deep) * self.hidden] = 1.0
        scale[len(self.deep) * self.hidden :] *= self.gate_scale
        return [first * scale, *deeper]

    def read(self, weights: list[Tensor], inputs: dict[str, Tensor], unit: bool = False) -> dict[str, Tensor]:
        """Outputs of memories at given whole weights: deep `[N, H, L, V]`, gates `[N, H, L]`.

        Args:
            weights: one tensor a layer.
            inputs: `[N, H, L, K]` by the name of the memory that reads it: all of the bank's deep memories, or all but
                the first; and "gates" for all gates, if there are any.
            unit: deep outputs have length 1.
        """
        deep = tuple(n for n in self.deep if n in inputs)
        skip = len(self.deep) - len(deep)
        given = [inputs[n] for n in (*deep, *(("gates",) if self.gates else ()))]

        def plain(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._read(skip, tensors[: len(given)], tensors[len(given) :])

        if self.depth <= native.MAX_LAYERS and native.fits(given[0], weights[0]):
            output, gates = native.native_read(plain, self._shape(first=skip), given, weights)
        else:
            output, gates = plain(*given, *weights)
        values = dict(zip(deep, (safe_normalize(output) if unit else output).unbind(2), strict=True))
        return values if gates is None else values | dict(zip(self.gates, gates.unbind(-1), strict=True))

    def _read(self, skip: int, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """`read` out of torch's operations: deep outputs `[N, H, M - skip, L, V]`, gates `[N, H, L, G]` or None."""
        count, (first, *deeper) = len(self.deep) - skip, weights
        stacked, gates = first[..., skip * self.hidden :, :].split([count * self.hidden, len(self.gates)], dim=-2)
        made = inputs[-1] @ gates.mT if self.gates else None
        if not count:
            return inputs[-1].new_empty(*inputs[-1].shape[:2], 0, *inputs[-1].shape[2:]), made
        x = torch.stack(tuple(inputs[:count]), dim=2)
        z = x @ stacked.unflatten(-2, (count, self.hidden)).mT
        for weight in deeper:
            z = ACTIVATIONS[self.activation](z) @ weight[:, :, skip:].mT
        return z + x if self.depth > 1 else z, made

    def first_deep(self, weights: list[Tensor]) -> list[Tensor]:
        """The layers of the first deep memory alone, `[N, H, out, in]` each."""
        first, *deeper = weights
        return [first[:, :, : self.hidden], *(w[:, :, 0] for w in deeper)]

    def _shape(self, rule: Rule | None = None, self_targets: bool = True, first: int = 0) -> native.BankShape:
        dot, clip = rule is not None and rule.objective == "dot", 1.0 if rule is None else rule.clip
        return native.BankShape(
            len(self.deep), len(self.gates), self.hidden, self.activation, self_targets, dot, clip, first
        )

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
        """What a chunk teaches the memories at its first weights.

        Args:
            rule: the learning rule.
            weights: whole weights at the chunk's start.
            key, value: `[N, H, L, K]`.
            self_targets: every memory's target is its own M_m(v_t) (NL Eq. 84), else v_t (Titans).
            base: W_0 of every layer where the state is the difference to it.
            teachers: the weights that make the targets, where they are others.
            length: `[H]`, by which the first memory's targets are multiplied; None is 1.
        """
        simple = rule.objective in ("l2", "dot") and teachers is None and length is None
        compiled = 1 < self.depth <= native.MAX_LAYERS and simple
        if not compiled or (rule.online and self_targets) or not native.fits(key, weights[0]):
            teachers = (teachers or weights) if self_targets else None
            return above_base(self._lesson(rule, weights, key, value, teachers, rule.online, length), rule, base)

        def plain(key: Tensor, value: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            made = self._lesson(rule, list(weights), key, value, list(weights) if self_targets else None, online=False)
            return (*made.inputs[1:], *made.recalled, *made.gradients)

        shape = self._shape(rule, self_targets)
        inputs, recalled, gradients = native.native_inner(plain, shape, key, value, weights)
        if rule.online:
            gradients[-1] = online_gradient(rule, key, value.unsqueeze(2)).expand_as(recalled[-1])
        return above_base(Lesson([key, *inputs], recalled, gradients), rule, base)

    def _lesson(
        self,
        rule: Rule,
        weights: list[Tensor],
        key: Tensor,
        value: Tensor,
        teachers: list[Tensor] | None,
        online: bool,
        length: Tensor | None = None,
    ) -> Lesson:
        """`lesson` out of torch's operations; without `online` all gradients are those of the chunk's first weights.

        `teachers` make the targets; None takes the values.
        """
        at_key = self.trace(weights, key)
        if teachers is None:
            target, gate_target = shared_target(value, len(self.deep), len(self.gates), self.depth)
        else:
            at_value = self.trace(teachers, value)
            target, gate_target = at_value.output, at_value.gates
        if length is not None:
            target = lengthened(target, length, self.width)
        gradients = self.gradients(rule, weights, at_key, target, gate_target)
        if online:
            gradients[-1] = online_gradient(rule, key if self.depth > 1 else None, target).expand_as(at_key.output)
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
        """Write one chunk, and read the first deep memory at q, every token at its own fast weights.

        A read of an MLP is a cascade of closed forms: the activations of layer i's answers query layer i + 1.

        Args:
            rule: the learning rule.
            state: before the chunk.
            lesson: of the chunk.
            rates: of the chunk.
            fresh: running and start weights are the same, and whole, so that `lesson` holds the products with both.
            q: queries `[N, H, L, K]`, or None.
            base: W_0 of every layer where the state is the difference to it.
            mix: changes every layer's answers on their way to the next layer.

        Returns:
            y `[N, H, L, V]` (None without q), and the state after the chunk, its chunk start unchanged.
        """
        running, surprises, z = [], [], q
        for layer in range(self.depth):
            if z is not None and layer > 0:
                z = ACTIVATIONS[self.activation](z)
            answer, after, surprise = self._write(rule, state, lesson, rates, fresh, layer, z)
            if z is not None and answer is not None:
                if base is not None:
                    first = base[layer][:, 0] if layer else base[0][:, : answer.shape[-1]]
                    answer = answer + z @ first.mT
                answer = answer if mix is None else mix(layer, z, answer)
            z = answer
            running.append(after)
            if surprise is not None:
                surprises.append(surprise)
        if self.depth > 1 and z is not None and q is not None:
            z = z + q
        return z, BankState(state.start, running, surprises or None)

    def _write(
        self, rule: Rule, state: BankState, lesson: Lesson, rates: Rates, fresh: bool, layer: int, q: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Answers of one layer's first memory, its weights and its surprise after a chunk."""

        def step(part: slice, rates: Rates, q: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
            """The memories in `part`; layer 0 holds them one after the other as rows."""
            lr, erase = rates.inner_lr[layer], None if rates.erase is None else rates.erase[layer]
            online = rule.online and layer == self.depth - 1
            x, g, recalled = lesson.inputs[layer], lesson.gradients[layer], lesson.recalled[layer]
            surprise = None if state.surprise is None else state.surprise[layer]
            if layer:
                x, g, recalled, weight = (t[:, :, part] for t in (x, g, recalled, state.running[layer]))
                surprise = None if surprise is None else surprise[:, :, part]
            else:
                rows = slice(part.start * self.hidden, None if part.stop is None else part.stop * self.hidden)
                g, recalled, weight = g[..., rows], recalled[..., rows], state.running[0][..., rows, :]
                surprise = None if surprise is None else surprise[..., rows, :]
            return chunk_step(
                x,
                g,
                lr,
                erase,
                rates.decay,
                weight,
                surprise,
                recalled=recalled if fresh and (online or erase is not None) else None,
                q=q,
                answers=self.hidden if layer < self.depth - 1 else self.width,
                # Keys have length 1; hidden activations have any length.
                normalise=layer > 0,
                read_before=rule.read_before,
                online=online,
            )

        if rates.others is None or len(self.deep) + (0 if layer else len(self.gates)) == 1:
            return step(slice(0, None), rates, q)
        answer, first, first_s = step(slice(0, 1), rates, q)
        _, rest, rest_s = step(slice(1, None), rates.shared(), None)
        dim = 2 if layer else -2
        surprise = None if first_s is None or rest_s is None else torch.cat([first_s, rest_s], dim)
        return answer, torch.cat([first, rest], dim), surprise
