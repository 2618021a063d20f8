from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from reproductions.harness.result_file import ResultFile, best_rate, next_rate, tune_rate


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def make(value: float) -> dict[str, float]:
        made.append(value)
        return {"loss": value}

    results = ResultFile(tmp_path / "rows.jsonl")
    assert results.get({"name": "a", "sizes": (1, 2)}, lambda: make(1.0))["loss"] == 1.0
    assert results.get({"name": "a", "sizes": (1, 2)}, lambda: make(2.0))["loss"] == 1.0
    assert results.get({"name": "a", "sizes": (1, 3)}, lambda: make(math.inf))["loss"] == math.inf
    again = ResultFile(tmp_path / "rows.jsonl")
    assert again.get({"name": "a", "sizes": [1, 3]}, lambda: make(4.0))["loss"] == math.inf
    assert made == [1.0, math.inf]
    assert again.find({"name": "b"}) is None


def test_rows_of_another_process_are_seen(tmp_path: Path) -> None:
    one, other = (ResultFile(tmp_path / "rows.jsonl") for _ in range(2))
    one.get({"name": "a"}, lambda: {"loss": 1.0})
    assert other.get({"name": "a"}, lambda: pytest.fail("made twice"))["loss"] == 1.0


def test_the_same_run_is_made_once_at_a_time(tmp_path: Path) -> None:
    started, finish, made = threading.Event(), threading.Event(), []

    def make() -> dict[str, float]:
        made.append(1)
        started.set()
        finish.wait(5)
        return {"loss": 1.0}

    def get() -> None:
        ResultFile(tmp_path / "rows.jsonl").get({"name": "a"}, make)

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(5)
    finish.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a", "loss": 1}\n{"name": "b", "sizes": {"x": 1}')
    results = ResultFile(path)
    results.get({"name": "b"}, lambda: {"loss": 2})
    assert [row["name"] for row in ResultFile(path).rows] == ["a", "b"]
    assert json.loads(path.read_text().splitlines()[-1]) == {"name": "b", "loss": 2}


@pytest.mark.parametrize(("best", "tried"), [(1e-4, 4), (2e-5, 5), (3e-6, 7), (3e-3, 6), (9.0, 10)])
def test_the_grid_grows_until_the_best_is_inside(best: float, tried: int) -> None:
    found = tune_rate(lambda rate: abs(math.log(rate / best)))
    assert len(found) == tried and list(found) == sorted(found)
    assert best_rate(found) == min(found, key=lambda rate: abs(math.log(rate / best)))
    assert best_rate(found) not in (min(found), max(found)) or best > 1


def test_rates_that_diverge_are_no_candidates() -> None:
    found = tune_rate(lambda rate: math.nan if rate > 2e-5 else rate)
    assert best_rate(found) == 1e-7 and found[1e-7] == 1e-7
    assert best_rate({1e-3: math.inf, 1e-4: math.nan}) == 1e-4


def test_the_next_rate() -> None:
    assert [next_rate(r, up=True) for r in (1e-4, 3e-4, 1e-3)] == [3e-4, 1e-3, 3e-3]
    assert [next_rate(r, up=False) for r in (1e-4, 3e-4, 3e-5)] == [3e-5, 1e-4, 1e-5]
