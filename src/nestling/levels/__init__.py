"""Levels: a model and its optimizer as a nested system (NL section 3)."""

from __future__ import annotations

from nestling.levels.components import Component, Frequency, SystemLevel, Transfer
from nestling.levels.inspection import inspect
from nestling.levels.problems import Problem, descent
from nestling.levels.runner import Runner
from nestling.levels.system import NestedSystem

__all__ = [
    "Component",
    "Frequency",
    "NestedSystem",
    "Problem",
    "Runner",
    "SystemLevel",
    "Transfer",
    "descent",
    "inspect",
]
