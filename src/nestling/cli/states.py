"""Options for what a command goes on from and leaves behind: states, and memories of what was learned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling.errors import UserError

StateOption = Annotated[
    Path | None,
    typer.Option("--state", metavar="FILE", help="Go on from this state, which nestling read or generate wrote."),
]
SaveStateOption = Annotated[
    Path | None,
    typer.Option("--save-state", metavar="FILE", help="Write the state after everything that was read and written."),
]
LoopsOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="How often the blocks run over every token. Default: the state's, or the model's own."
    ),
]
OldSaveStateOption = Annotated[Path | None, typer.Option("--save-memory", metavar="FILE", hidden=True)]
"""The name of `--save-state` in 0.1."""

MemoryOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--memory", metavar="PATH", help="What the model knows beside its weights: a memory of nestling learn."
    ),
]
"""A list, because in 0.1 a state was given here too, alone or beside a memory."""


def state_target(save_state: Path | None, save_memory: Path | None) -> Path | None:
    """Where to write the state, of the flag's two names; refused before any work is done.

    Raises:
        UserError: both names, a directory that does not exist, or a directory's name.
    """
    if save_memory is not None:
        hint("--save-memory is called --save-state now; the old name goes with the next version")
    if save_state is not None and save_memory is not None:
        raise UserError("--save-state and --save-memory are one flag; give the first")
    file = save_memory if save_state is None else save_state
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--save-state {file}: there is no directory {file.parent}; make it first")
    if file is not None and file.is_dir():
        raise UserError(f"--save-state {file} is a directory; give a file name")
    return file


def hint(text: str) -> None:
    """Tell on standard error what will have another name."""
    print(f"hint: {text}", file=sys.stderr)
