"""One command for all of them: `python -m reproductions NAME`; without a name it lists them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run one, with its own options."""
    names = sorted(path.parent.name for path in HERE.glob("*/run.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"python -m reproductions NAME, of {', '.join(names)}; NAME --help has its options")
    name = sys.argv.pop(1)
    importlib.import_module("nestling")  # settles how threads wait, before an experiment loads torch
    importlib.import_module(f"reproductions.{name}.run").main()


if __name__ == "__main__":
    main()
