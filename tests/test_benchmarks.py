"""The arithmetic behind the benchmarks, and that every subject runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peak_memory
from benchmarks.learning import measure_here
from benchmarks.optimizers import Float32Muon, _float32_iteration
from benchmarks.report import Report, Verdict, write_json
from benchmarks.studying import study_throughput
from benchmarks.subjects import MIXERS, matrix_config, mixer_subject, mlp_config, neural_memory_subject, titans_subject
from benchmarks.timing import Subject, Timing, interleave, speed_ratio
from nestling.ops import native
from nestling.ops.newton_schulz import MUON, newton_schulz


@pytest.mark.parametrize(
    "subject",
    [
        titans_subject("matrix", matrix_config(), 128),
        titans_subject("mlp", mlp_config(), 128),
        neural_memory_subject("chunk 64", 64, 128),
        neural_memory_subject("chunk 16", 16, 128),
    ],
    ids=lambda s: s.name,
)
def test_necessary_operations_are_what_is_executed_less_the_waste(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch counts full squares where triangles would do, and no triangular solve: the counts differ a little."""
    monkeypatch.setattr(native, "fits", lambda *_: False)  # what runs as C++ is not counted
    with FlopCounterMode(display=False) as counter:
        subject.step()
    assert subject.flops is not None
    assert 0.6 < subject.flops / counter.get_total_flops() < 1.5


def test_necessary_operations_grow_linearly() -> None:
    """Twice the tokens, twice the operations."""
    one, two = (titans_subject("layer", matrix_config(), time).flops for time in (128, 256))
    assert one is not None and two == pytest.approx(2 * one)


@pytest.mark.parametrize("preset", MIXERS)
def test_every_mixer_runs(preset: str) -> None:
    """At the width of the benchmarks, forward and backward."""
    mixer_subject(preset, 65).step()


def test_the_ratio_is_taken_round_by_round() -> None:
    """A slow round of the machine that hits both sides leaves no trace; tokens per step may differ."""
    slow, fast = Subject("slow", lambda: None, tokens=100), Subject("fast", lambda: None, tokens=200)
    ratio = speed_ratio(Timing(fast, (1.0, 10.0, 2.0)), Timing(slow, (2.0, 20.0, 3.0)))
    assert (ratio.low, ratio.median, ratio.high) == (3.0, 4.0, 4.0)


def test_rounds_alternate() -> None:
    """Warm-up in order, then every second round reversed."""
    calls: list[str] = []
    steps: list[Callable[[], None]] = [lambda: calls.append("a"), lambda: calls.append("b")]
    timings = interleave([Subject(f"{i}", step, 1) for i, step in enumerate(steps)], rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(t.seconds) for t in timings] == [3, 3]


def test_the_muon_of_the_benchmark_is_muon() -> None:
    """In float32 its iteration is Newton-Schulz in float32; the step stays torch's."""
    torch.manual_seed(0)
    for rows, cols in ((5, 9), (9, 5)):
        x = torch.randn(rows, cols)
        torch.testing.assert_close(_float32_iteration(x, MUON, 5, 1e-7), newton_schulz(x), rtol=1e-4, atol=1e-5)
    w = torch.nn.Parameter(torch.zeros(5, 9))
    w.grad = torch.randn(5, 9)
    Float32Muon([w], 1.0).step()
    assert torch.linalg.svdvals(w.detach()).max() < 1.3 and w.norm() > 1


def test_a_verdict_knows_its_direction(tmp_path: Path) -> None:
    """And a report survives as JSON."""
    assert Verdict("speed", 1.0, 1.0).met and not Verdict("speed", 0.99, 1.0).met
    assert Verdict("size", 1.0, 1.1, at_least=False).met and not Verdict("size", 1.2, 1.1, at_least=False).met
    write_json([Report("t", ["a"], [["1"]], [Verdict("speed", 1.0, 2.0)])], tmp_path / "out.json", threads=2)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["reports"][0]["verdicts"][0]["value"] == 1.0 and written["machine"]["threads"] == 2


@pytest.mark.parametrize(("name", "learned"), [("two levels", 2 * 3 * 48 * 96), ("rank 16", 2 * 3 * 16 * (48 + 96))])
def test_the_cost_of_learning(name: str, learned: int) -> None:
    """On a small model: two blocks of three matrices, or their factors."""
    cost = measure_here(name, rounds=1, quick=True)
    assert cost.learned == learned
    assert cost.tokens_per_second > 0


@pytest.mark.slow  # three processes that import PyTorch
def test_memory_is_measured_in_another_process() -> None:
    """More tokens need more; a subject that does not exist is an error with the process's words."""
    short, long = (peak_memory.measure("matrix", time, threads=1) for time in (256, 1024))
    assert 0 < short < long < 2**30
    with pytest.raises(RuntimeError, match="failed"):
        peak_memory.measure("matrix", -1, threads=1)


def test_a_study_is_timed_beside_others() -> None:
    report = study_throughput(rounds=2, quick=True, threads=torch.get_num_threads())
    assert [row[0].split(",")[0] for row in report.rows] == ["study", "peft's LoRA", "learn"] and not report.verdicts
