"""Optimizers as associative memories (NL sections 4 and 7, appendices B and C)."""

from __future__ import annotations

from nestling.optim.build import NAMES, TrainerFactory, build
from nestling.optim.deep_momentum import DeepMomentum
from nestling.optim.delta_gradient_descent import DeltaGradientDescent
from nestling.optim.delta_momentum import DeltaMomentum
from nestling.optim.feature_momentum import FeatureMomentum
from nestling.optim.generalized_gradient_descent import GeneralizedGradientDescent
from nestling.optim.generalized_momentum import GeneralizedMomentum
from nestling.optim.groups import matrix_groups
from nestling.optim.m3 import M3
from nestling.optim.multi_frequency import MultiFrequency
from nestling.optim.oja import OjaGradientDescent
from nestling.optim.optimizer_level import OptimizerLevel
from nestling.optim.preconditioned_momentum import PreconditionedMomentum

__all__ = [
    "M3",
    "NAMES",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "FeatureMomentum",
    "GeneralizedGradientDescent",
    "GeneralizedMomentum",
    "MultiFrequency",
    "OjaGradientDescent",
    "OptimizerLevel",
    "PreconditionedMomentum",
    "TrainerFactory",
    "build",
    "matrix_groups",
]
