"""How OpenMP threads wait for each other, settled before torch loads them.

After each product a thread waits for the next one in a busy loop, for milliseconds, before it sleeps. Where other work
wants the same processors, whoever waits holds up whoever is waited for, and a run becomes tens of times slower.
`python -m benchmarks --only contention` measures it; docs/performance.md has its table. The runtime reads its settings
once, when it is loaded, so the package settles them before anything of it imports torch, and for this project's own
command lines only: a program that merely imports the library decides for itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "GOMP_SPINCOUNT"
SPINS = "1000"
"""Rounds of the busy loop, some microseconds in all; unset they are 300,000."""
SAID_BY_THE_USER = (VARIABLE, "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES")
"""With these a user says how threads wait, or where they run, so that others keep off their processors."""
PROGRAMS = ("nestling", "reproductions", "benchmarks")


def wait_briefly() -> None:
    """Let OpenMP threads spin briefly, unless the user has said something else; of no use once torch is loaded."""
    if not any(os.environ.get(name) for name in SAID_BY_THE_USER):
        os.environ[VARIABLE] = SPINS


def is_own_command() -> bool:
    """Whether the interpreter was started for this project: `nestling`, `python -m nestling`, `-m nestling.demo`."""
    if Path(sys.argv[0]).stem in PROGRAMS:
        return True
    modules = [after for before, after in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if before == "-m"]
    return bool(modules) and modules[0].split(".")[0] in PROGRAMS
