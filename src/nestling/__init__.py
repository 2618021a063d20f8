"""Nested Learning in PyTorch: Hope, the Continuum Memory System, self-modifying Titans, and their baselines."""

from __future__ import annotations

import logging

from nestling.threads import is_own_command, wait_briefly

if is_own_command():
    wait_briefly()  # before torch is loaded, by the imports below
    # Loaded with transformers where it is installed; what it says on standard error concerns 4-bit models alone.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from nestling.models import NestlingConfig, NestlingForCausalLM, presets

__all__ = ["NestlingConfig", "NestlingForCausalLM", "__version__", "presets"]

__version__ = "0.2.0"
