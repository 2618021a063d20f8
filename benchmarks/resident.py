"""Measurements that need a process of their own, and the high-water mark of its resident set."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_own_process(module: str, *arguments: object) -> str:
    """The last line that `python -m MODULE ARGUMENTS` prints.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()[-1]


def reset_peak() -> int:
    """Start a new high-water mark where the system can (Linux), and return the present one in bytes."""
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        # Not permitted in some containers; the old mark then stays, which the warm-up keeps low.
        with contextlib.suppress(OSError):
            marker.write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """The high-water mark in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
