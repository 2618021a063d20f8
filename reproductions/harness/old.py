"""Rows of version 0.1, which kept some results as one JSON document: `python -m reproductions --convert FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reproductions.harness.rows import NAME, Row


def convert(path: Path) -> Path:
    """Write the rows of a `results.json` (or another file of lines) of version 0.1 to results.jsonl beside it, after
    what is there.

    Raises:
        SystemExit: no such file, or none of version 0.1's results.
    """
    if not path.is_file():
        raise SystemExit(f"no file at {path}; give a results.json of version 0.1")
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else rows_of(json.loads(text))
    target = path.with_name(NAME)
    with target.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return target


def rows_of(record: Any) -> list[Row]:
    """The rows of a document of version 0.1.

    Raises:
        SystemExit: not such a document.
    """
    match record:
        case list():  # orthogonal_tasks
            return record
        case {"rows": list(rows)}:  # figure12
            more = {key: value for key, value in record.items() if key != "rows"}
            return [row | more for row in rows]
        case {"methods": dict(methods), "functions": list(functions)}:  # figure4
            return [_valley(name, found, functions, record) for name, found in methods.items()]
        case {"best": dict(), "runs": list(runs), "train": list()}:  # small_lm
            return [row for run in runs for row in _language(run, record)]
        case {"runs": list(runs), "torch": torch, "threads": threads}:  # parity
            more = {key: record[key] for key in ("learning_rate", "rows")}
            return [run | more | {"made": {"torch": torch, "threads": threads}} for run in runs]
    raise SystemExit("this is no results.json of version 0.1: it has neither rows nor runs")


def _valley(name: str, found: Row, functions: list[Row], record: Row) -> Row:
    best = [{key: f[key] for key in ("k", "alpha", "omega")} | (f[name] or {"steps": None}) for f in functions]
    return {"method": name, "limit": record["steps"], "near": record["near"], **found, "best": best}


def _language(run: Row, record: Row) -> list[Row]:
    key = {"preset": run["preset"], "rate": run["rate"], "seed": run["seed"], "tokens": run["tokens"]}
    key |= {"length": record["sequence_length"], "batch": record["batch_size"], "train": record["train"]}
    losses = {"book": record["valid"], "loss": run["validation"], "parameters": run["parameters"]}
    rows = [{"part": "validation", **key, **losses}]
    if "test" in run:
        rows.append({"part": "test", **key, "book": record["test"], "loss": run["test"]})
    made = {name: record[name] for name in ("commit", "machine", "threads")}
    return [row | {"made": made} for row in rows]
