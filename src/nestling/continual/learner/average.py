"""A slow copy of what is learned: the running mean of the weights, which can teach the fast ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from nestling.continual.component import LearnerComponent
from nestling.continual.learner.weights import exchanged
from nestling.continual.stream.chunks import Piece

if TYPE_CHECKING:
    from nestling.continual.learner.learner import Learner


class RunningMean(LearnerComponent):
    """W_s <- W_s + r (W - W_s) after the n-th chunk, with r = max(chunk / horizon, 1 / (n + 1)).

    One step of gradient descent at rate r on 1/2 |W_s - W|^2: a level below the fast ones whose context flow is their
    trajectory, and the outer loop of Reptile (arXiv:1803.02999), here without setting W back to W_s. Up to the horizon
    it is the plain mean of the first and all later weights, then an exponential one (Polyak and Juditsky 1992). Of
    low-rank levels it is the mean of the factors.

    Costs one more copy of what is learned, and one pass over it for each chunk.

    Args:
        settings: the horizon in tokens, a chunk or more.
        learner: whose weights.
    """

    def __init__(self, settings: int, learner: Learner) -> None:
        super().__init__(settings, learner)
        chunk = learner.stream.chunk
        if settings < chunk:
            raise ValueError(f"average is {chunk} tokens or more, the fastest level's period, not {settings}")
        self.rate = chunk / settings
        self.read = False
        self.mean = [value.clone() for value in self._live]

    @torch.no_grad()
    def replaced(self) -> None:
        """Begin anew from the present weights."""
        torch._foreach_copy_(self.mean, self._live)

    @torch.no_grad()
    def learned(self, pieces: Sequence[Piece], losses: Float[Tensor, " targets"]) -> None:
        """Follow the weights."""
        torch._foreach_lerp_(self.mean, self._live, max(self.rate, 1 / (self.learner.counters.chunks + 1)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean where the learned weights are, on the model or apart, and these back afterwards, to the last bit."""
        with exchanged(self._live, self.mean):
            self.read = True
            try:
                yield
            finally:
                self.read = False

    def tensors(self) -> dict[str, Tensor]:
        """The mean by index, on the CPU."""
        return {str(i): value.detach().cpu().clone() for i, value in enumerate(self.mean)}

    def prepare(self, tensors: Mapping[str, Tensor], values: Any) -> Callable[[], None]:
        """A mean of the learner's parameters; it begins anew where a memory has none."""
        wanted = {str(i): tuple(value.shape) for i, value in enumerate(self.mean)}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found and (found != wanted or not all(t.is_floating_point() for t in tensors.values())):
            raise ValueError("the memory's running mean is not of the learner's parameters")

        @torch.no_grad()
        def take() -> None:
            self.replaced()
            for i, value in enumerate(self.mean if found else ()):
                value.copy_(tensors[str(i)])

        return take

    @property
    def _live(self) -> list[Tensor]:
        return [value for weights in self.learner.weights.values() for value in weights.values]
