"""The optimizers that the battery runs: one line each, with its equation from `reference.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestling.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    FeatureMomentum,
    GeneralizedGradientDescent,
    GeneralizedMomentum,
    OjaGradientDescent,
    PreconditionedMomentum,
    matrix_groups,
)
from nestling.optim.full_matrix import AdaGradMatrix
from nestling.optim.learned_features import LearnedFeatures
from nestling.optim.learned_preconditioner import LearnedMap, Whitening
from nestling.optim.preconditioners import AdaGradDiagonal, AdamDiagonal, NewtonSchulz
from tests.optim import reference as ref


@dataclass(frozen=True)
class Subject:
    """One optimizer with its settings.

    Attributes:
        name: of the test.
        make: the optimizer of a model, at a learning rate, with more settings.
        reference: the equation for one parameter; see `reference.py`.
        lr: a rate at which the network learns.
        toy: a rate at which the quadratic and the curved valley go down.
    """

    name: str
    make: Callable[..., Optimizer]
    reference: Callable[..., Any]
    lr: float = 0.02
    toy: float = 0.02


def of(kind: type[Optimizer], **settings: Any) -> Callable[..., Optimizer]:
    """Built from all parameters."""
    return lambda model, lr, **more: kind(model.parameters(), lr=lr, **settings, **more)


def by_role(kind: type[Optimizer], **settings: Any) -> Callable[..., Optimizer]:
    """Built from the groups of `matrix_groups`."""
    return lambda model, lr, **more: kind(matrix_groups(model), lr=lr, **settings, **more)


def watching(kind: type[Optimizer], **settings: Any) -> Callable[..., Optimizer]:
    """Built from all parameters, with hooks on the model."""

    def make(model: nn.Module, lr: float, **more: Any) -> Optimizer:
        return kind(model.parameters(), lr=lr, model=model, **settings, **more)

    return make


ADAM: dict[str, Any] = {"output": AdamDiagonal(), "average": True, "bias_correction": True}
SUBJECTS = [
    Subject("momentum", of(PreconditionedMomentum), ref.momentum),
    Subject("momentum, Adam outside", of(PreconditionedMomentum, **ADAM), ref.adam, toy=0.05),
    Subject(
        "momentum, Adam inside",
        of(PreconditionedMomentum, preconditioner=AdamDiagonal()),
        ref.adam_inside,
        0.002,
        toy=0.02,
    ),
    Subject(
        "momentum, AdaGrad", of(PreconditionedMomentum, output=AdaGradDiagonal()), ref.adagrad_with_momentum, toy=0.05
    ),
    Subject(
        "momentum, Newton-Schulz",
        by_role(PreconditionedMomentum, output=NewtonSchulz()),
        ref.orthogonal_momentum,
        toy=0.1,
    ),
    Subject("momentum, sign", of(PreconditionedMomentum, momentum=0, output=lambda m: m.sign()), ref.sign, 0.005),
    Subject(
        "momentum, full-matrix AdaGrad",
        by_role(PreconditionedMomentum, momentum=0, output=AdaGradMatrix()),
        ref.full_matrix_adagrad,
        0.1,
        toy=0.3,
    ),
    Subject(
        "momentum, whitening",
        by_role(PreconditionedMomentum, preconditioner=Whitening(), average=True),
        ref.learned_preconditioner,
        toy=0.05,
    ),
    Subject("momentum, learned map", by_role(PreconditionedMomentum, output=LearnedMap()), ref.learned_map),
    Subject("delta momentum", of(DeltaMomentum), ref.delta_momentum, 0.1),
    Subject("delta momentum, matrix", of(DeltaMomentum, keys="matrix", scale="bounded"), ref.delta_momentum_matrix),
    Subject("deep momentum", of(DeepMomentum), ref.deep_momentum, toy=0.01),
    Subject(
        "deep momentum, L2, Newton-Schulz",
        by_role(DeepMomentum, objective="l2", output=NewtonSchulz()),
        ref.deep_l2,
        toy=0.1,
    ),
    Subject("feature momentum", of(FeatureMomentum), ref.feature_momentum, 0.01, toy=0.01),
    Subject("feature momentum, learned", of(FeatureMomentum, features=LearnedFeatures()), ref.learned_features, 0.01),
    Subject("generalized momentum", of(GeneralizedMomentum), ref.generalized_momentum, 0.1),
    Subject("delta gradient descent", watching(DeltaGradientDescent), ref.delta_gradient_descent, 0.1),
    Subject("delta gradient descent, step", watching(DeltaGradientDescent, solver="step"), ref.delta_step, 0.1),
    Subject("generalized", watching(GeneralizedGradientDescent), ref.generalized, 0.1),
    Subject(
        "generalized, window",
        watching(GeneralizedGradientDescent, window=3),
        ref.generalized_window,
        0.1,
    ),
    Subject("Oja", watching(OjaGradientDescent), ref.oja, 0.1),
    Subject("M3", by_role(M3, frequency=3), ref.m3, toy=0.2),
    Subject("M3, algorithm", by_role(M3, frequency=3, form="algorithm"), ref.m3_algorithm, 0.01, toy=0.5),
]
