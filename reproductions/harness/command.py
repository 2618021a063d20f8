"""The command line that all reproductions share."""

from __future__ import annotations

import argparse
import importlib
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reproductions.harness.report import Report, write
from reproductions.harness.rows import NAME, Row, Rows, read_rows

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/reproductions")
SHARED = """
rows: every finished run is a line of results.jsonl in --folder, a new folder below runs/reproductions unless said. A
run that was stopped goes on with --resume, and several processes may share the work so. `--folder {folder} --resume`
adds to the committed rows. Where a committed row has the key of a new one, both are printed. The report is written at
the end; --report alone makes that of the committed rows (or of --folder) anew.
"""


@dataclass(frozen=True)
class Reproduction:
    """What `run.py` of every folder calls `REPRODUCTION`.

    Attributes:
        run: makes all rows that are missing.
        report: of rows, in whatever number.
        quick: makes some rows in seconds, of tiny models and invented data.
        arguments: adds what this one has of its own to the command line.
        threads: by default.
    """

    run: Callable[[argparse.Namespace, Rows], None]
    report: Callable[[Sequence[Row]], Report]
    quick: Callable[[argparse.Namespace, Rows], None]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    threads: int = 1


def names() -> list[str]:
    """All reproductions."""
    return sorted(path.parent.name for path in ROOT.glob("*/run.py"))


def about(name: str) -> str:
    """The first line of one's description."""
    return (importlib.import_module(f"reproductions.{name}.run").__doc__ or "").splitlines()[0]


def load(name: str) -> Reproduction:
    """One by name."""
    made: Reproduction = importlib.import_module(f"reproductions.{name}.run").REPRODUCTION
    return made


def run(name: str, words: Sequence[str]) -> None:
    """`python -m reproductions NAME WORDS`.

    Raises:
        SystemExit: what the command line asks for cannot be done.
    """
    made = load(name)
    args = _parser(name, made).parse_args(words)
    torch.set_num_threads(args.threads)
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            args.folder = Path(folder)
            rows = Rows(args.folder / NAME)
            made.quick(args, rows)
            write(args.folder, made.report(rows.rows), rows.rows)
            print((args.folder / "report.md").read_text(encoding="utf-8"))
    elif args.report:
        place = args.folder or ROOT / name
        found = read_rows(place / NAME)
        for path in write(place, made.report(found), found):
            print(path)
    else:
        args.folder = args.folder or RUNS / name
        _run(made, args, ROOT / name, f"python -m reproductions {shlex.join([name, *_told(words)])}")


def _run(made: Reproduction, args: argparse.Namespace, committed: Path, command: str) -> None:
    """All rows, then the report."""
    place: Path = args.folder
    same = place.resolve() == committed.resolve()
    rows = Rows(place / NAME, command, [] if same else read_rows(committed / NAME))
    if rows.rows and not args.resume:
        raise SystemExit(f"{place} has {len(rows.rows)} finished rows; go on with --resume, or give another --folder")
    made.run(args, rows)
    place.mkdir(parents=True, exist_ok=True)
    for path in write(place, made.report(rows.rows), rows.rows):
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))


def _parser(name: str, made: Reproduction) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m reproductions {name}",
        description=importlib.import_module(f"reproductions.{name}.run").__doc__,
        epilog=SHARED.format(folder=f"reproductions/{name}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.arguments(parser)
    shared = parser.add_argument_group("of all reproductions")
    shared.add_argument("--quick", action="store_true", help="some seconds of tiny models; nothing is kept")
    shared.add_argument("--report", action="store_true", help="of what is finished; nothing runs")
    shared.add_argument("--resume", action="store_true", help="go on with the rows in --folder")
    shared.add_argument("--folder", type=Path, help="of results.jsonl and the report")
    if not any(action.dest == "threads" for action in parser._actions):
        shared.add_argument("--threads", type=int, default=made.threads)
    return parser


def _told(words: Sequence[str]) -> list[str]:
    """What says what and not where: without the folder, and of paths their names."""
    kept, skip = [], False
    for word in words:
        if not skip and word not in ("--folder", "--resume"):
            kept.append(Path(word).name if "/" in word else word)
        skip = word == "--folder"
    return kept
