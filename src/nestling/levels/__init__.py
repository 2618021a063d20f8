"""Levels: a model and its optimizer as a nested system (NL section 3)."""

from __future__ import annotations

from nestling.levels.inspection import inspect
from nestling.levels.problems import Problem, Runner, descent
from nestling.levels.system import Component, Frequency, Level, NestedSystem, Transfer

__all__ = [
    "Component",
    "Frequency",
    "Level",
    "NestedSystem",
    "Problem",
    "Runner",
    "Transfer",
    "descent",
    "inspect",
]
