"""What training on several processes asks of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn


class _TakePart(torch.autograd.Function):
    """The identity, of which the further arguments are part of the graph and get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients, *[None] * ctx.count)


def take_part(x: Tensor, module: nn.Module) -> Tensor:
    """`x`, with all trainable parameters of `module` in its graph, where several processes train together.

    A level whose period is longer than a row has no part in that row's loss. DistributedDataParallel waits for every
    parameter unless it searches for unused ones, which the Trainer of transformers turns off under gradient
    checkpointing. With this a parameter that has no part gets the gradient 0 there, and none where the search is on, as
    on a single process.
    """
    if not (torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized()):
        return x
    trained = [p for p in module.parameters() if p.requires_grad]
    return _TakePart.apply(x, *trained) if trained else x
