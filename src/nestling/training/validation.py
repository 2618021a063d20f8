"""The loss on the held-out text, shared out over the processes of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from nestling.evaluation.language import LossReport, token_losses
from nestling.training.layout import Layout


def validation_loss(
    model: nn.Module,
    tokens: np.ndarray,
    sequence_length: int,
    layout: Layout,
    gather: Callable[[Tensor], Tensor],
    *,
    carry: bool = False,
    n_bytes: int | None = None,
) -> LossReport:
    """The loss that `evaluate_loss` gives, with `streams` windows side by side, of which every process reads its own.

    Args:
        model: the model itself, not what wraps it for training.
        tokens: `[n + 1]`, the same in every process.
        sequence_length: tokens after which the state is reset, or with `carry` those of a forward pass.
        layout: of the run.
        gather: of a tensor, the tensors of all processes joined along the first axis.
        carry: the text is cut into `streams` contiguous parts, each with a state of its own.
        n_bytes: UTF-8 bytes of the text.
    """
    n = len(tokens) - 1
    window = max(1, math.ceil(n / layout.streams)) if carry else sequence_length
    own = window * math.ceil(math.ceil(n / window) / layout.processes)
    start = min(n, own * layout.process)
    part = tokens[start : min(n, start + own) + 1]
    total, count = 0.0, len(part) - 1
    if count > 0:
        side_by_side = max(1, layout.streams // layout.processes)
        found, _ = token_losses(model, part, reset_every=window, segment=sequence_length, batch_size=side_by_side)
        total = float(found.double().sum())
    sums = gather(torch.tensor([[total, count]], dtype=torch.float64)).sum(0)
    return LossReport(float(sums[0]) / int(sums[1]), int(sums[1]), n_bytes)
