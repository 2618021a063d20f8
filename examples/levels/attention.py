"""Softmax attention as the non-parametric solution of a regression (NL Eq. 62, sliding window Eq. 63).

    python -m examples.levels.attention

Given a query q, the memory is one value M that minimises sum_i s(k_i, q) |v_i - M|^2 over the tokens in view. No
weights are learned for that: the minimiser is known, the mean of the values weighted by s (Nadaraya-Watson). It is
found anew for every query, so its frequency is infinite. The projections learn in the stream, through all solutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from nestling.layers.attention import AttentionConfig, SoftmaxAttention
from nestling.levels import NestedSystem, Problem, Transfer
from nestling.ops.rotary import rotate, rotation

Query = tuple[Tensor, Tensor, Tensor]


def similarity(query: Tensor, keys: Tensor) -> Tensor:
    """s(k_i, q) = exp(k_i . q / sqrt(D)) for queries `[N, H, D]` and keys `[N, S, H, D]`."""
    return ((keys * query[:, None]).sum(-1) / query.shape[-1] ** 0.5).exp()


def error(item: Query, solved: Any) -> Tensor:
    """The objective of Eq. 62 at the memory of the moment."""
    query, keys, values = item
    return (similarity(query, keys)[..., None] * (values - solved["attention"][:, None]).square()).sum()


def minimiser(item: Query, _: Any) -> Tensor:
    """Where its gradient vanishes."""
    query, keys, values = item
    weight = similarity(query, keys)[..., None]
    return (weight * values).sum(1) / weight.sum(1)


def make_system(layer: SoftmaxAttention) -> NestedSystem:
    """Attention over the projections of a layer of this package, which learn to name the token before."""
    c = layer.config

    def queries(batch: Tensor) -> Iterator[Query]:
        q, k, v = layer.project(batch)
        turn = rotation(c.head_dim, c.rope_theta, torch.zeros(len(batch), dtype=torch.long), batch.shape[1], q.device)
        q, k = rotate(q, *turn), rotate(k, *turn)
        for t in range(batch.shape[1]):
            seen = slice(0 if c.window is None else max(0, t + 1 - c.window), t + 1)
            yield q[:, t], k[:, seen], v[:, seen]

    attention = Problem(
        name="attention", objective=error, solution=minimiser, context=queries, history=True, goal="Σ s(k, q) |v − M|²"
    )
    projections = Problem(
        name="projections",
        parameters=layer,
        objective=lambda x, solved: F.mse_loss(answer(layer, solved), F.pad(x, (0, 0, 1, 0))[:, :-1]),
        optimizer=partial(Adam, lr=1e-2),
    )
    transfer = Transfer("attention", "projections", "non-parametric", "what it recalls")
    return NestedSystem.define("attention", [attention, projections], [transfer])


def answer(layer: SoftmaxAttention, solved: Any) -> Tensor:
    """The layer's output from the solutions of all queries."""
    return layer.output(torch.stack(solved["attention"], 1).flatten(-2))


def main(steps: int = 100) -> tuple[float, float]:
    """Error of the first and of the last step."""
    torch.manual_seed(0)
    system = make_system(SoftmaxAttention(AttentionConfig(8, 2)))
    errors = [system.step(torch.randn(16, 10, 8))["projections"] for _ in range(steps)]
    print(f"{system}naming the token before: error {errors[0]:.2f}, after {steps} steps {errors[-1]:.2f}")
    return errors[0], errors[-1]


if __name__ == "__main__":
    main()
