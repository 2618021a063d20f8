"""Two processes, each with half the rows, compute what one process with all rows computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestling.cli import main
from nestling.training.records import read_metrics

ARGUMENTS = [
    *("train", "--preset", "hope", "--set", "hidden_size=16", "num_layers=1", "num_heads=1", "--steps", "6"),
    *("--sequence-length", "32", "--carry-state", "--log-every", "1", "--save-every", "4", "--eval-tokens", "200"),
    *("--sample-tokens", "0", "--no-tensorboard", "--device", "cpu"),
]


def two_processes(out: Path, *more: str) -> str:
    """Run the command under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nestling"]
    command += [*ARGUMENTS, "--batch-size", "2", "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path: Path) -> None:
    assert main([*ARGUMENTS, "--batch-size", "4", "--out", str(tmp_path / "one")]) == 0
    output = two_processes(tmp_path / "two")
    assert output.count("step 6/6  loss") == 1  # only the first process speaks
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    checkpoint = tmp_path / "two" / "checkpoint-4"
    assert {f"carried_state_{rank}.safetensors" for rank in range(2)} <= {p.name for p in checkpoint.iterdir()}

    before = losses(tmp_path / "two")
    for name in ("checkpoint-6", "result.json"):  # as if killed after step 4
        (tmp_path / "two" / name).rename(tmp_path / name)
    assert "checkpoint-4" in two_processes(tmp_path / "two", "--resume")
    assert losses(tmp_path / "two") == before


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["delta_gradient_descent", "generalized_gradient_descent"])
def test_optimizers_that_see_layer_inputs_see_all_processes(tmp_path: Path, optimizer: str) -> None:
    """At every step and at a slow level, where a row can be shorter than what a layer waits for."""
    more = ("--optimizer", optimizer, "--lr", "0.3", "--levels", "cms.1=2")
    assert main([*ARGUMENTS, "--batch-size", "4", "--out", str(tmp_path / "one"), *more]) == 0
    two_processes(tmp_path / "two", *more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
