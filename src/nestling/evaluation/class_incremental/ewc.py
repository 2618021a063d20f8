"""Elastic weight consolidation: parameters that mattered to earlier tasks are held back (Kirkpatrick et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from nestling.errors import NonFiniteGradientError


class ElasticWeightConsolidation:
    """The quadratic penalty of EWC, and its gradient.

    After task i with solution theta_i and diagonal Fisher information F_i, learning goes on with the loss plus

        strength / 2 * sum_i sum_j F_ij (theta_j - theta_ij)^2                        (Kirkpatrick et al. 2017, Eq. 3)

    F_i is the mean over examples of the squared gradient of one example's log-likelihood at its given label (the
    empirical Fisher). Only the sums of F_i and of F_i theta_i are kept, which give the same gradient: the memory does
    not grow with the tasks. With `retention` it is the online variant (Schwarz et al. 2018): F <- retention * F + F_i,
    and the centre is always the last solution.

    Args:
        parameters: by name; what is penalised.
        strength: lambda, 0 or more.
        retention: None for one penalty a task; 0 to 1 for the online variant.

    Raises:
        ValueError: no parameters, a strength or retention out of range.
    """

    def __init__(self, parameters: Mapping[str, Tensor], strength: float, retention: float | None = None) -> None:
        if not parameters:
            raise ValueError("parameters is empty: EWC needs something to hold")
        if strength < 0 or (retention is not None and not 0 <= retention <= 1):
            raise ValueError(f"strength is 0 or more and retention 0 to 1 or None, not {strength} and {retention}")
        self.parameters, self.strength, self.retention = dict(parameters), strength, retention
        self.fisher: dict[str, Tensor] = {}
        self.weighted: dict[str, Tensor] = {}

    def consolidate(self, losses: Iterable[Tensor]) -> None:
        """End a task: add its Fisher information at the present parameters.

        Args:
            losses: the negative log-likelihood in nats of one example each, made one at a time (a generator).

        Raises:
            ValueError: no losses.
            NonFiniteGradientError: a gradient is not finite; nothing has changed.
        """
        found = diagonal_fisher(self.parameters, losses)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                old = self.fisher.get(name)
                if old is not None and self.retention is None:
                    self.weighted[name].add_(found[name] * parameter)
                    old.add_(found[name])
                else:
                    self.fisher[name] = (
                        found[name] if old is None else old.mul_(self.retention or 0.0).add_(found[name])
                    )
                    self.weighted[name] = self.fisher[name] * parameter

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient, strength * (sum F theta - sum F_i theta_i), to `grad` of every parameter."""
        for name, fisher in self.fisher.items():
            parameter = self.parameters[name]
            pull = fisher.mul(parameter).sub_(self.weighted[name]).mul_(self.strength)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)


def diagonal_fisher(parameters: Mapping[str, Tensor], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean of the squared gradients of the losses, by name, in the parameters' shapes.

    Args:
        parameters: by name.
        losses: one example's negative log-likelihood each.

    Raises:
        ValueError: no losses.
        NonFiniteGradientError: a gradient is not finite.
    """
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, square), gradient in zip(total.items(), gradients, strict=True):
            if gradient is not None:
                square.addcmul_(gradient, gradient)
                if not torch.isfinite(gradient).all():
                    raise NonFiniteGradientError(
                        f"the gradient of {name} is not finite; the example or model is broken"
                    )
        count += 1
    if not count:
        raise ValueError("losses is empty: the Fisher information is a mean over at least one example")
    return {name: square.div_(count) for name, square in total.items()}
