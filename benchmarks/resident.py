"""The resident set of this process and its high-water mark."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


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
