"""Every `nestling` command that a document shows is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from nestling.cli.app import app, spread_lists

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("reproductions/**/*.md")]
COMMAND = re.compile(r"^\s*(?:\$ )?nestling (\w[\w-]* .*)$", re.MULTILINE)
SHOWN = sorted({line for file in FILES for line in COMMAND.findall(file.read_text("utf-8").replace("\\\n", " "))})


@pytest.mark.parametrize("line", SHOWN)
def test_commands_are_taken(line: str) -> None:
    """Its name, its options, and what it cannot do without; nothing runs."""
    name, *words = spread_lists(shlex.split(line, comments=True))
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):
        command, *words = command.commands[words[0]], *words[1:]
    command.make_context(name, words)


def test_there_are_commands() -> None:
    """The pattern finds them."""
    assert len(SHOWN) > 15
