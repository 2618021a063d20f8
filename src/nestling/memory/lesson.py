"""What a chunk teaches a bank of memories, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.memory.rule import Rule
from nestling.ops.chunk_step import ChunkDecay


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
    """Per-token rates of a chunk, `[N, H, L]` for every layer: e_t (None without erase) and l_t; what decays.

    `others` `[H]` is the share of e_t and l_t that all memories but the first take, which then fade by
    1 - share (e_t + l_t) / 2 more; None is all.
    """

    erase: list[Tensor] | None
    inner_lr: list[Tensor]
    decay: ChunkDecay
    others: Tensor | None = None

    def shared(self) -> Rates:
        """The rates of the memories but the first."""
        if self.others is None:
            return self
        share = self.others[:, None]
        erase = None if self.erase is None else [e * share for e in self.erase]
        lr = [rate * share for rate in self.inner_lr]
        written = lr[-1] if erase is None else lr[-1] + erase[-1]
        # What they hold is a mean over the last writes: it fades as fast as it is written.
        fading = torch.log1p(-0.5 * written)
        return Rates(erase, lr, replace(self.decay, log_retention=self.decay.log_retention + fading))


def generating(weights: list[Tensor], base: list[Tensor], gain: Tensor) -> list[Tensor]:
    """W_0 + gain F of every memory: the weights that make keys, values, queries, rates and targets.

    `weights` F `[N, H, ...]`, `base` W_0 `[H, ...]`, `gain` `[H]`.
    """
    return [b + gain.reshape(-1, *[1] * (b.dim() - 1)) * w for b, w in zip(base, weights, strict=True)]


def shared_target(v: Tensor, deep: int, gates: int, depth: int) -> tuple[Tensor, Tensor | None]:
    """v_t as every memory's target (Titans), in the layout of `Trace.output`; a gate's target is the mean of v_t."""
    of_gates = v.mean(-1, keepdim=True).expand(*v.shape[:-1], gates)
    if depth > 1:
        return v.unsqueeze(2).expand(-1, -1, deep, -1, -1), of_gates if gates else None
    return torch.cat([v.repeat(1, 1, 1, deep), of_gates], dim=-1), None


def lengthened(target: Tensor, length: Tensor, width: int) -> Tensor:
    """Targets in the layout of `Trace.output`, the first memory's times `length` `[H]`."""
    if target.dim() > 4:
        return torch.cat([length[:, None, None, None] * target[:, :, :1], target[:, :, 1:]], 2)
    return torch.cat([length[:, None, None] * target[..., :width], target[..., width:]], -1)


def above_base(lesson: Lesson, rule: Rule, base: list[Tensor] | None) -> Lesson:
    """The lesson of weights W_0 + F, whose online write takes away F x, and not the whole W x."""
    if base is not None and rule.online:
        lesson.gradients[-1] = lesson.gradients[-1] + lesson.inputs[-1] @ base[-1].mT
    return lesson


def online_gradient(rule: Rule, key: Tensor | None, target: Tensor) -> Tensor:
    """What the gradient of an output weight is without W x, which the write adds token by token (`chunk_step`).

    `key` `[N, H, L, K]` is the residual of an MLP; `target` has the layout of the output.
    """
    wanted = target.clamp(-rule.clip, rule.clip)
    return -wanted if key is None else key.unsqueeze(2) - wanted
