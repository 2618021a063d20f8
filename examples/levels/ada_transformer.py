"""Transformer and AdaTransformer (NL Figure 3, Eq. 21): the same block, but for the level of one matrix.

    python -m examples.levels.ada_transformer

Both compute y = (q + Attn(k, v, q)) W. In the Transformer W belongs to the slow level. In the AdaTransformer it is the
memory of a linear attention: in every sequence it starts from the learned W and descends -<W k_t, v_t> token by token,
W_t = W_{t-1} + v_t k_t^T. The task: after pairs (x, A x), with another A in every sequence, answer for one more x.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from nestling.levels import NestedSystem, Problem, Transfer, descent

WIDTH, SIZE, PAIRS = 24, 3, 10


def draw(count: int = 64) -> tuple[Tensor, Tensor]:
    """Tokens `[count, PAIRS + 1, 2 SIZE]`, the last (x, 0), and the answer to the last, `[count, SIZE]`."""
    x = torch.randn(count, PAIRS + 1, SIZE)
    y = x @ torch.randn(count, SIZE, SIZE) / SIZE**0.5
    return torch.cat([x, F.pad(y[:, :-1], (0, 0, 0, 1))], -1), y[:, -1]


class Block(nn.Module):
    """Projections, causal attention, and W, the matrix whose level differs."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(2 * SIZE, WIDTH, bias=False) for _ in "qkv")
        self.memory = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.out = nn.Linear(WIDTH, SIZE)

    def attend(self, x: Tensor) -> Tensor:
        """q + Attn(k, v, q) of the last token."""
        q = self.query(x)
        return (q + F.scaled_dot_product_attention(q, self.key(x), self.value(x), is_causal=True))[:, -1:]


def make_system(block: Block, adaptive: bool) -> NestedSystem:
    """One level, or with `adaptive` two."""

    def error(batch: Any, solved: Any) -> Tensor:
        weight = solved["W"]["W"] if adaptive else block.memory
        return (block.out(block.attend(batch[0]) @ weight.mT).squeeze(1) - batch[1]).square().mean()

    slow = Problem(name="block", parameters=block, objective=error, optimizer=partial(Adam, lr=5e-3))
    if not adaptive:
        return NestedSystem.define("Transformer", [slow])
    fast = Problem(
        name="W",
        start=lambda batch, _: {"W": block.memory.expand(len(batch[0]), -1, -1)},
        objective=lambda x, solved: -(solved["W"]["W"] * block.value(x)[:, :, None] * block.key(x)[:, None]).sum(),
        context=lambda batch: batch[0].unbind(1),
        rule=descent(1.0 / PAIRS),
        goal="−⟨W k, v⟩",
        flow="tokens",
    )
    return NestedSystem.define("AdaTransformer", [fast, slow], [Transfer("block", "W", "initialisation", "first W")])


def main(steps: int = 300) -> dict[str, float]:
    """Mean error of the last 50 steps of both; predicting 0 has error 1."""
    errors = {}
    for adaptive in (False, True):
        torch.manual_seed(0)
        system = make_system(Block(), adaptive)
        errors[system.name] = sum([system.step(draw())["block"] for _ in range(steps)][-50:]) / 50
    print(system, "; ".join(f"{name}: error {value:.3f}" for name, value in errors.items()))
    return errors


if __name__ == "__main__":
    main()
