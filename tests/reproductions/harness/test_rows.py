from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reproductions.harness.rows import Rows, read_rows


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def make(value: float) -> dict[str, float]:
        made.append(value)
        return {"loss": value}

    results = Rows(tmp_path / "rows.jsonl")
    assert results.get({"name": "a", "sizes": (1, 2)}, lambda: make(1.0))["loss"] == 1.0
    assert results.get({"name": "a", "sizes": (1, 2)}, lambda: make(2.0))["loss"] == 1.0
    assert results.get({"name": "a", "sizes": (1, 3)}, lambda: make(math.inf))["loss"] == math.inf
    again = Rows(tmp_path / "rows.jsonl")
    assert again.get({"name": "a", "sizes": [1, 3]}, lambda: make(4.0))["loss"] == math.inf
    assert made == [1.0, math.inf]
    assert again.find({"name": "b"}) is None


def test_rows_of_another_process_are_seen(tmp_path: Path) -> None:
    one, other = (Rows(tmp_path / "rows.jsonl") for _ in range(2))
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
        Rows(tmp_path / "rows.jsonl").get({"name": "a"}, make)

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
    results = Rows(path)
    results.get({"name": "b"}, lambda: {"loss": 2})
    assert [row["name"] for row in Rows(path).rows] == ["a", "b"]
    assert json.loads(path.read_text().splitlines()[-1]).items() >= {"name": "b", "loss": 2}.items()


def test_a_row_says_what_made_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    committed = [{"name": "a", "loss": 0.5, "seconds": 3, "scores": [1, 2], "more": {"x": 1.0}}]
    rows = Rows(tmp_path / "new" / "rows.jsonl", "python -m reproductions a", committed)
    made = rows.get({"name": "a"}, lambda: {"loss": 0.25, "seconds": 9, "scores": [1, 3], "more": {"x": 2.0}})["made"]
    assert set(made) == {"commit", "machine", "threads", "torch", "command"} and made["command"].endswith(" a")
    out = capsys.readouterr().out
    assert "loss 0.5, 0.25; scores [1, 2], [1, 3]; more (x 1, 2)" in out and "seconds" not in out
    rows.get({"name": "b"}, lambda: {"loss": 0.25})
    assert capsys.readouterr().out == ""


def test_threads_share_rows(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: rows.get({"name": i % 8}, lambda: {"loss": float(i)}), range(32)))
    assert sorted(row["name"] for row in rows.rows) == list(range(8)) == sorted(r["name"] for r in read_rows(rows.path))
