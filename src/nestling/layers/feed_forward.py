"""The SwiGLU feed-forward network (Shazeer 2020, arXiv:2002.05202), the channel mixer of Transformer++."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class FeedForwardConfig:
    """Settings of `FeedForward`.

    Attributes:
        hidden_size: width of the input and the output.
        intermediate_size: width of the gated hidden layer; 8/3 of `hidden_size` gives the parameters of a plain MLP
            of width 4.

    Raises:
        ValueError: a size below 1.
    """

    hidden_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


class FeedForward(nn.Module):
    """`y = W_down (silu(W_gate x) * W_up x)`, for every token by itself: no state, no mask."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Apply the network to the last dimension."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class LeveledFeedForwardConfig:
    """Settings of `LeveledFeedForward`.

    Attributes:
        hidden_size: width of the input and the output.
        levels: names of the levels that hold hidden neurons.
        neurons: hidden neurons of each of them.

    Raises:
        ValueError: a size below 1, no level, a name that occurs twice or cannot be a parameter's, or not one number of
            neurons per level.
    """

    hidden_size: int
    levels: tuple[str, ...]
    neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1; got {self.hidden_size}")
        for name in self.levels:
            check_level_name(name)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels are one or more names, each given once; got {list(self.levels)}")
        if len(self.neurons) != len(self.levels) or any(n < 1 for n in self.neurons):
            raise ValueError(f"neurons are one number from 1 for each of {list(self.levels)}; got {list(self.neurons)}")


def check_level_name(name: str) -> None:
    """Refuse a name that cannot stand in the names of parameters.

    Raises:
        ValueError: not letters, digits and underscores after a letter, or a name that is taken: an attribute
            of every module, or `rest`, which is what belongs to no level.
    """
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"a level's name is letters, digits and underscores, as in fast or level_2; got {name!r}")
    if name == "rest" or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"a level cannot be called {name!r}, which means something else already; choose another name")


class LeveledFeedForward(nn.Module):
    """A SwiGLU network whose hidden neurons belong to one or several levels: `y = sum over levels of FeedForward(x)`.

    The sum over hidden neurons that a feed-forward network is, parted into the levels' sums: the head-wise continuum
    memory system with weights one (NL Eq. 74), whose levels start as parts of one network (NL section 7.3). The levels
    differ in when their weights are updated, which is up to who trains them; the layer itself keeps no state.
    """

    def __init__(self, config: LeveledFeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        sizes = zip(config.levels, config.neurons, strict=True)
        self.levels = nn.ModuleDict({n: FeedForward(FeedForwardConfig(config.hidden_size, k)) for n, k in sizes})

    def forward(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... hidden"]:
        """Apply the network to the last dimension."""
        parts = [cast(Tensor, level(x)) for level in self.levels.values()]
        return reduce(torch.add, parts)
