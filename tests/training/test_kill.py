"""The claim of exact resumption, with real processes and real SIGKILLs."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nestling.cli import main
from nestling.training.checkpoint import checkpoint_step, last_checkpoint
from nestling.training.records import read_metrics

STEPS = 24
ARGUMENTS = [
    *("train", "--preset", "hope", "--set", "hidden_size=16", "num_layers=1", "num_heads=1"),
    *("--steps", str(STEPS), "--sequence-length", "32", "--batch-size", "2", "--gradient-accumulation", "2"),
    *("--carry-state", "--log-every", "1", "--eval-every", "10", "--save-every", "7", "--eval-tokens", "200"),
    *("--sample-tokens", "0", "--no-tensorboard", "--device", "cpu", "--levels", "cms.0=2,cms.1=5,cms.2=11"),
    "--measure-levels",
]


def start(out: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nestling", *ARGUMENTS, "--out", str(out), *more]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def kill_after(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    """SIGKILL as soon as the run has recorded `steps` steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= steps for record in read_metrics(out / "metrics.jsonl")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "result.json").exists(), "the run was too quick to be killed"


def records(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in read_metrics(out / "metrics.jsonl")]


def too_small_files() -> None:
    """What a full disk looks like to a process: writing past 40 kB fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_killed_and_out_of_space_a_run_computes_what_it_would_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill_after(start(cut), cut, steps=9)
    kept = last_checkpoint(cut)
    assert kept is not None and STEPS > checkpoint_step(kept) >= 7
    files = {p.name: p.read_bytes() for p in kept.iterdir()}

    full = start(cut, "--resume", preexec_fn=too_small_files)
    _, errors = full.communicate(timeout=300)
    assert full.returncode == 2
    assert errors.startswith("error: the checkpoint of step ") and errors.count("\n") == 1
    assert f"{kept} is intact" in errors and "--resume" in errors
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == files
    assert not (cut / ".saving").exists()

    assert main([*ARGUMENTS, "--out", str(whole)]) == 0  # the same with nothing in its way
    capsys.readouterr()
    assert main([*ARGUMENTS, "--out", str(cut), "--resume"]) == 0
    assert f"from {kept}" in capsys.readouterr().out
    assert records(cut) == records(whole)
    assert [r["step"] for r in records(cut) if "loss" in r] == list(range(1, STEPS + 1))
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((cut / "result.json").read_text())["steps"] == STEPS
