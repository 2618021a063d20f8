"""`nestling learn`."""

from __future__ import annotations

from typing import Annotated

import typer

from nestling.cli.document_arguments import RECORDS, KeepTexts, Key, Model, Note, Paths, Place
from nestling.cli.flags import Flags, with_flags
from nestling.continual.learner.options import Settings


@with_flags
def learn(
    model: Model,
    paths: Paths,
    memory: Place,
    settings: Flags[Settings],
    save_tokens: Annotated[
        int | None, typer.Option(min=1, help="Save after so many tokens as well.", rich_help_panel=RECORDS)
    ] = None,
    save_seconds: Annotated[float, typer.Option(min=0, help="Save after so long.", rich_help_panel=RECORDS)] = 120.0,
    measure: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Measure the loss before and after on the first N tokens of each document; 0 leaves it out.",
            rich_help_panel=RECORDS,
        ),
    ] = 4096,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --measure 0.", rich_help_panel=RECORDS)] = False,
    keep_texts: KeepTexts = False,
    key: Key = None,
    note: Note = "",
) -> None:
    """Read texts and learn from them; what is learned goes to a memory, the model's files stay as they are.

    Interrupted at any moment, the memory is whole, and the same command goes on where it stopped: no token is learned
    twice and none is lost. Documents that were finished are skipped. A memory that exists keeps its own settings.
    """
    from nestling.cli.learning import run

    stopped = run(
        model,
        paths,
        memory,
        settings,
        save_tokens=save_tokens,
        save_seconds=save_seconds,
        measure=0 if quick else measure,
        note=note,
        keep_texts=keep_texts,
        key=key,
    )
    if stopped:
        raise typer.Exit(130)
