"""Small problems for optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Network(nn.Module):
    """Linear layers, a convolution, an embedding, a gain, a number, an empty parameter and one that is never used."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.first = nn.Linear(6, 8)
        self.convolution = nn.Conv1d(2, 3, 3)
        self.second = nn.Linear(18, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1 and p.numel():
                    p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
                elif name.endswith("bias"):
                    p.zero_()

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """`[B]` tokens and `[B, 6]` inputs to `[B, 4]`."""
        h = torch.tanh(self.first(self.table(tokens) + x))
        h = torch.tanh(self.convolution(h.unflatten(1, (2, 4))))
        h = torch.cat([h.flatten(1), x, x.square()], 1)
        return self.second(h) * self.gain * self.scale + self.empty.sum()


def batch(seed: int, size: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, inputs and targets of a fixed function."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (size,), generator=generator)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] + tokens / 5, x[:, 4].abs()], 1)
    return tokens, x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    tokens, x, y = data
    return F.mse_loss(model(tokens, x), y)


class Quadratic(nn.Module):
    """1/2 sum of c (w - goal)^2 with curvatures from 0.1 to 2 for a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(5))

    def forward(self) -> Tensor:
        """The loss."""
        parts = []
        for p in (self.matrix, self.vector):
            curvature = torch.linspace(0.1, 2.0, p.numel()).view(p.shape)
            parts.append(0.5 * (curvature * (p - 1.0).square()).sum())
        return sum(parts, torch.zeros(()))


class Rosenbrock(nn.Module):
    """(1 - a)^2 + 5 (b - a^2)^2 for the pairs in the rows of a matrix: a curved valley with its end at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.tensor([[-1.2, 1.0], [0.3, -0.5], [-0.5, 0.4]]))

    def forward(self) -> Tensor:
        """The loss."""
        a, b = self.pairs.unbind(1)
        return ((1 - a).square() + 5 * (b - a.square()).square()).sum()
