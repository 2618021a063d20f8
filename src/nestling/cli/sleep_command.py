"""`nestling sleep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.document_arguments import RECORDS, Model, Note
from nestling.cli.flags import Flags, with_flags
from nestling.continual.study.sleeping import Sleep


@with_flags
def sleep(
    model: Model,
    memory: Annotated[
        Path, typer.Option(metavar="PATH", help="The memory, of two studies or more.", show_default=False)
    ],
    settings: Flags[Sleep],
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Of kept texts that are encrypted.", rich_help_panel=RECORDS, show_default=False
        ),
    ] = None,
    note: Note = "",
) -> None:
    """Make one adapter of all that a memory was taught, study by study.

    Every nestling study adds an adapter to its memory. Sleep distils what the model says with all of them into one new
    adapter, on exercises of the texts that were kept and on text that the model writes for itself, and clears the old
    ones. The memory is then as small as after one study. Interrupted, it stays as it was; the snapshot before stays,
    to roll back to.
    """
    from nestling.cli.sleeping import run

    if run(model, memory, settings.make(), key=key, note=note):
        raise typer.Exit(130)
