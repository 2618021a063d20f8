"""The benchmark of two runs on one machine: its processes answer, and its table says what they did."""

from __future__ import annotations

import pytest

from benchmarks import contention
from benchmarks.contention import SCENARIOS, SETTINGS, Measured, Worker
from benchmarks.worker import rate
from nestling.threads import SPINS


def test_a_worker_answers_with_its_rate() -> None:
    with Worker("busy", None) as worker:
        assert worker.answer() == "ready"
        for cpus in (2, 1):
            worker.begin(0.05, cpus)
            assert float(worker.answer()) > 0
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(RuntimeError, match="has died"):
            worker.answer()


def test_a_rate_counts_whole_steps() -> None:
    steps: list[int] = []
    found = rate(lambda: steps.append(0), 0.02)
    assert steps and 0 < found <= len(steps) / 0.02


def test_the_table_is_relative_to_the_runtimes_own_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(factor: float) -> Measured:
        return Measured({name: [10.0 * factor, 40.0 * factor, 20.0 * factor] for name in SCENARIOS})

    found = {spins: measured(1.0 if spins is None else 0.5) for spins in SETTINGS}
    monkeypatch.setattr(contention, "_measure", lambda *_: found)
    reports = contention.contention(rounds=3, quick=False)
    assert len(reports) == 2
    for report in reports:
        assert [row[0] for row in report.rows] == ["the runtime's own", *(f"{int(s):,}" for s in SETTINGS if s)]
        assert set(report.rows[0][1:]) == {"100% (100% to 100%)"}
        assert set(report.rows[1][1:]) == {"50% (50% to 50%)"}
        assert [verdict.met for verdict in report.verdicts] == [False, True]
    assert SPINS in SETTINGS
