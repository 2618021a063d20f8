"""Several processes are one run: they compute what one process with all the rows computes, and one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nestling.cli import main
from nestling.training.checkpoint import checkpoints
from nestling.training.records import read_metrics

SMALL = ("--preset", "hope", "--set", "hidden_size=16", "num_layers=1", "num_heads=1", "--steps", "6")
ARGUMENTS = [
    *("train", *SMALL, "--sequence-length", "32", "--log-every", "1", "--eval-every", "3", "--save-every", "2"),
    *("--keep-checkpoints", "9", "--eval-tokens", "200", "--sample-tokens", "3"),
]
CARRIED = ("--carry-state", "--no-tensorboard")


def start(processes: int, *arguments: str) -> subprocess.Popen[str]:
    """The command line under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "nestling", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(launcher: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher and for the processes it started, which it would leave alone."""
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        process.kill()
    launcher.communicate()


def run(processes: int, out: Path, *more: str) -> str:
    """What a run of so many processes prints; one is started without a launcher."""
    arguments = [*ARGUMENTS, "--out", str(out), *more]
    if processes == 1:
        assert main(arguments) == 0
        return ""
    started = start(processes, *arguments)
    output, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors
    return output


def assert_same_run(found: Path, expected: Path) -> None:
    """Equal records but for their speeds, and equal weights, to rounding."""
    records = [[{k: v for k, v in r.items() if k != "tokens_per_s"} for r in read(out)] for out in (found, expected)]
    assert len(records[0]) == len(records[1])
    for mine, its in zip(*records, strict=True):
        assert mine == pytest.approx(its, rel=2e-3, abs=1e-5)
        for name in ("loss", "val_loss"):
            assert mine.get(name, 0.0) == pytest.approx(its.get(name, 0.0), abs=1e-5)
    weights = [load_file(out / "model.safetensors") for out in (found, expected)]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=0, atol=2e-5, msg=name)


def read(out: Path) -> list[dict[str, Any]]:
    return read_metrics(out / "metrics.jsonl")


def test_two_processes_are_one_run_that_one_of_them_writes(tmp_path: Path) -> None:
    more = ("--measure-levels", "--levels", "cms.1=2", "--lr", "1e-3")
    output = run(2, tmp_path / "two", *more, "--batch-size", "2")
    run(1, tmp_path / "one", *more, "--batch-size", "4")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert any("cms.1/update_norm" in record for record in read(tmp_path / "two"))
    for line in ("model", "step 6/6  loss", "step 6/6  validation", "done", "saved"):
        assert output.count(f"\n{line}") == 1, line
    assert "128 tokens (sequences of 32, shared by 2 processes)" in output
    assert len(list((tmp_path / "two" / "tensorboard").glob("events.*"))) == 1
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["tokens"] == 6 * 128 and result["sample"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--carry-state", "--gradient-accumulation", "2"),
        ("--gradient-checkpointing", "--levels", "cms.1=2,cms.2=4"),
        ("--preset", "titans_mac", "--precision", "bf16"),
        ("--optimizer", "delta_gradient_descent", "--lr", "0.3", "--levels", "cms.1=2", "--carry-state"),
        ("--optimizer", "generalized_gradient_descent", "--lr", "0.3", "--levels", "cms.1=2", "--carry-state"),
        ("--optimizer", "m3"),
    ],
    ids=["carried", "checkpointing", "bf16", "delta", "generalized", "m3"],
)
def test_every_way_to_train_is_one_run(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Also optimizers that see layer inputs, and slow levels, where a row can be shorter than what a layer awaits."""
    run(2, tmp_path / "two", *more, "--batch-size", "2")
    run(1, tmp_path / "one", *more, "--batch-size", "4")
    if "bf16" in more:
        pairs = zip(read(tmp_path / "two"), read(tmp_path / "one"), strict=True)
        assert all(a.get("loss", 0.0) == pytest.approx(b.get("loss", 0.0), abs=1e-2) for a, b in pairs)
    else:
        assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("carry", [CARRIED, ()], ids=["carried", "shuffled"])
@pytest.mark.parametrize(("began", "resumed"), [(2, 1), (1, 2), (2, 2)])
def test_a_killed_run_goes_on_with_any_number_of_processes(
    tmp_path: Path, began: int, resumed: int, carry: tuple[str, ...]
) -> None:
    more = [*carry, "--log-every", "4", "--lr", "1e-3"]  # the last checkpoint lies between two records
    run(1, tmp_path / "whole", *more, "--batch-size", "4")
    cut = tmp_path / "cut"
    more += ["--batch-size", str(4 // began)]
    run(began, cut, *more)
    for late in [*(c for c in checkpoints(cut) if c.name != "checkpoint-2"), cut / "result.json"]:
        late.rename(tmp_path / late.name)  # as if killed after step 2
    run(resumed, cut, *more, "--resume")
    assert_same_run(cut, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("--steps", "40", "--carry-state", "--no-tensorboard")
    run(1, whole, *more, "--batch-size", "4")
    killed = start(2, *ARGUMENTS, "--out", str(cut), *more, "--batch-size", "2")
    deadline = time.monotonic() + 200
    while not any(record["step"] >= 5 for record in read(cut)) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(killed)
    assert not (cut / "result.json").exists()
    run(1, cut, *more, "--batch-size", "2", "--resume")
    assert_same_run(cut, whole)


@pytest.mark.slow
def test_a_streamed_set_is_shared_out_and_resumed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"text": f"Document {i}. " + "word " * (i % 40)}) for i in range(90)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    more = ("--streaming", "--data", str(tmp_path / "set"), "--carry-state", "--eval-tokens", "100")
    run(1, tmp_path / "one", *more, "--batch-size", "4")
    run(2, tmp_path / "two", *more, "--batch-size", "2")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    for late in [*(c for c in checkpoints(tmp_path / "two") if c.name != "checkpoint-2"), tmp_path / "two/result.json"]:
        late.rename(tmp_path / late.name)
    run(1, tmp_path / "two", *more, "--batch-size", "2", "--resume")
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_what_breaks_in_one_process_stops_all_with_its_name(tmp_path: Path) -> None:
    started = start(2, *ARGUMENTS, "--out", str(tmp_path / "run"), "--lr", "1e30", "--warmup-steps", "0")
    _, errors = started.communicate(timeout=200)
    assert started.returncode == 1
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: training stopped at step "), errors


@pytest.mark.parametrize("command", ["generate", "evaluate", "read", "learn", "memory", "inspect", "convert"])
def test_other_commands_refuse_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: nestling {command} is one process, and 2 were started (WORLD_SIZE)")
    assert "only nestling train is made for several" in error and error.count("\n") == 1
