"""Two processes with parameters spread by FSDP2 compute what one process computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optim.subjects import SUBJECTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # two processes that import PyTorch
def test_two_processes_equal_one() -> None:
    """Every optimizer, half a batch each, with a save and a load in between."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.optim.sharded"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert results.pop("skips") == 1.0
    for subject in SUBJECTS:
        # The algorithm of M3 divides by tiny roots at first, which makes much of rounding.
        assert results[subject.name] < (1e-6 if subject.name == "M3, algorithm" else 1e-9), subject.name
