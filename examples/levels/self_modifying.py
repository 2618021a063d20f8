"""Memories that make each other's keys, values and targets, token by token (NL Eq. 83 to 88).

    python -m examples.levels.self_modifying

At every token M_k and M_v say what key and value it has, and all three memories are written with that key, each with
the target that it makes of the value itself. None can be solved without the others, so they read one context together
(`beside`), and each sees the others as they were before the token. The task is that of the AdaTransformer: after pairs
(x, A x), with another A in every sequence, answer for one more x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from examples.levels.ada_transformer import SIZE, draw
from nestling.levels import Problem, descent
from nestling.levels.system import NestedSystem

WIDTH = 2 * SIZE
Item = tuple[Tensor, Tensor, Tensor]
"""A token `[..., K]`, its erase and its inner learning rate `[...]`."""


def recall(memory: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """W x."""
    return (memory["W"] @ x[..., None])[..., 0]


def unit(x: Tensor) -> Tensor:
    """x / |x|."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def make_memories(first: Mapping[str, Callable[[Any], Tensor]], context: Callable[[Any], Any]) -> list[Problem]:
    """M_memory, M_k and M_v, from first weights of a batch, over the items of its context."""

    def lesson(name: str) -> Callable[[Item, Any], Any]:
        def given(item: Item, now: Any) -> Any:
            x, erase, rate = item
            key, value = (unit(recall(now[n], x)) for n in ("k", "v"))
            return key, recall(now[name], value), erase, rate

        return given

    def objective(name: str) -> Callable[[Any, Any], Tensor]:
        def loss(lesson: Any, now: Any) -> Tensor:
            key, target, erase, rate = lesson
            said = recall(now[name], key)
            # The write, and delta gradient descent's erase (Eq. 56): what is said at the key is taken away.
            return 0.5 * (rate * (said - target).square().sum(-1) + erase * said.square().sum(-1)).sum()

        return loss

    return [
        Problem(
            name=name,
            start=lambda batch, _, name=name: {"W": first[name](batch)},
            given=lesson(name),
            objective=objective(name),
            rule=descent(1.0),
            goal="½|M(k) − M(v)|²",
            flow="tokens",
            history=name == "memory",
            **({"context": context} if name == "memory" else {"beside": "memory"}),
        )
        for name in ("memory", "k", "v")
    ]


def main(steps: int = 150) -> tuple[float, float]:
    """Mean error of the first and of the last 10 steps; predicting 0 has error 1."""
    torch.manual_seed(0)
    block = nn.ParameterDict(
        {n: torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH) for n in ("memory", "k", "v", "out")}
    )
    first = {n: lambda batch, n=n: block[n].expand(len(batch[0]), -1, -1) for n in ("memory", "k", "v")}
    half = torch.tensor(0.5)
    memories = make_memories(first, lambda batch: [(x, half, half) for x in batch[0][:, :-1].unbind(1)])

    def error(batch: Any, solved: Any) -> Tensor:
        said = recall(solved["memory"][-1], unit(batch[0][:, -1])) @ block["out"]
        return F.mse_loss(said[:, :SIZE], batch[1])

    slow = Problem(name="first weights", parameters=block, objective=error, optimizer=partial(Adam, lr=1e-2))
    system = NestedSystem.define("self-modifying memories", [*memories, slow])
    errors = [system.step(draw())["first weights"] for _ in range(steps)]
    print(f"{system}error at first {sum(errors[:10]) / 10:.3f}, now {sum(errors[-10:]) / 10:.3f}")
    return sum(errors[:10]) / 10, sum(errors[-10:]) / 10


if __name__ == "__main__":
    main()
