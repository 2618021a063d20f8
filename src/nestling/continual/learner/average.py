"""A slow copy of what is learned: the running mean of the weights, which can teach the fast ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from nestling.continual.learner.weights import Weights, exchange

SAVED = "average."
"""What the mean's names begin with in a memory, whose differences are the fast weights'."""


class Average:
    """W_s <- W_s + r (W - W_s) after the n-th chunk, with r = max(chunk / horizon, 1 / (n + 1)).

    One step of gradient descent at rate r on 1/2 |W_s - W|^2: a level below the fast ones whose context flow is their
    trajectory, and the outer loop of Reptile (arXiv:1803.02999), here without setting W back to W_s. Up to the horizon
    it is the plain mean of the first and all later weights, then an exponential one (Polyak and Juditsky 1992). Of
    low-rank levels it is the mean of the factors.

    Costs one more copy of what is learned, and one pass over it for each chunk.

    Args:
        weights: of all levels.
        rate: chunk / horizon, in (0, 1].
    """

    def __init__(self, weights: Mapping[str, Weights], rate: float) -> None:
        self.weights, self.rate = weights, rate
        self.read = False
        self.values = [value.clone() for value in self._live]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin from the present weights."""
        torch._foreach_copy_(self.values, self._live)

    @torch.no_grad()
    def follow(self, chunks: int) -> None:
        """The weights have changed, for the `chunks`-th time."""
        torch._foreach_lerp_(self.values, self._live, max(self.rate, 1 / (chunks + 1)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean where the learned weights are, on the model or apart, and these back afterwards, to the last bit."""
        exchange(self._live, self.values)
        self.read = True
        try:
            yield
        finally:
            exchange(self._live, self.values)
            self.read = False

    def state(self) -> dict[str, Tensor]:
        """The mean by index, on the CPU, for a memory."""
        return {f"{SAVED}{i}": value.detach().cpu().clone() for i, value in enumerate(self.values)}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError where `load` could not take them."""
        wanted = {f"{SAVED}{i}": tuple(value.shape) for i, value in enumerate(self.values)}
        found = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith(SAVED)}
        kinds = {tensors[name].is_floating_point() for name in found}
        if found and (found != wanted or kinds != {True}):
            raise ValueError("the memory's running mean is not of the learner's parameters")

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The weights are those of a memory: take its mean, or begin from them where it has none."""
        self.restart()
        for i, value in enumerate(self.values):
            if (mean := tensors.get(f"{SAVED}{i}")) is not None:
                value.copy_(mean)

    @property
    def _live(self) -> list[Tensor]:
        return [value for weights in self.weights.values() for value in weights.values]
