"""Nested Learning in PyTorch: Hope, the Continuum Memory System, self-modifying Titans, and their baselines."""

from __future__ import annotations

from nestling.threads import is_own_command, wait_briefly

if is_own_command():
    wait_briefly()  # before the next line, which loads torch

from nestling.models import NestlingConfig, NestlingForCausalLM, presets

__all__ = ["NestlingConfig", "NestlingForCausalLM", "__version__", "presets"]

__version__ = "0.1.0"
