"""`nestling study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.flags import Flags, with_flags
from nestling.continual.study.studying import Study

MEMORY = "Memory"


@with_flags
def study(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory, hub id or GGUF file.", show_default=False)
    ],
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Files or directories of text; - is standard input.", show_default=False
        ),
    ],
    memory: Annotated[
        Path, typer.Option(metavar="PATH", help="The memory: new, or to go on from.", show_default=False)
    ],
    settings: Flags[Study],
    minutes: Annotated[float | None, typer.Option(min=0, help="End after so many minutes.", show_default=False)] = None,
    rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of what a new memory learns; 0 learns the weights themselves, for a memory as large as they are.",
            rich_help_panel=MEMORY,
        ),
    ] = 16,
    keep_texts: Annotated[
        bool,
        typer.Option(
            "--keep-texts",
            help="Keep the texts beside the memory, for nestling memory forget. A memory that has begun to goes on to.",
            rich_help_panel=MEMORY,
        ),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Encrypt the texts kept with this key (nestling memory key makes one).",
            rich_help_panel=MEMORY,
            show_default=False,
        ),
    ] = None,
    note: Annotated[str, typer.Option(help="A line to keep with the snapshot.", rich_help_panel=MEMORY)] = "",
) -> None:
    """Learn texts until questions made of them are answered; what is learned goes to a memory.

    nestling learn reads a text once and foresees it better; this repeats it, sentence by sentence and as questions in
    both directions, until --until of them are known. What is known already is visited less. The model's files stay as
    they are. Interrupted, what was learned so far is kept, and the same command goes on from it.
    """
    from nestling.cli.studying import run

    stopped = run(
        model, paths, memory, settings.make(), minutes=minutes, rank=rank, keep_texts=keep_texts, key=key, note=note
    )
    if stopped:
        raise typer.Exit(130)
