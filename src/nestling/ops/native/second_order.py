"""Gradients that can be differentiated again: the compiled backward pass cannot, so torch repeats the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def through_torch(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Any], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `function` at `inputs`, None where an input needs none, with a graph of their own.

    Args:
        function: the same computation out of torch's operations.
        inputs: its arguments; those that are no tensors have no gradient.
        upstream: gradients of its results, None where there is none.
    """
    # Names of their own: the gradient of an input must not hold what comes through another input made from it.
    inputs = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
    results = function(*inputs)
    pairs = [(y, d) for y, d in zip(results, upstream, strict=True) if y is not None and d is not None]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], wanted, [d for _, d in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs]
