"""`nestling study`."""

from __future__ import annotations

from typing import Annotated

import typer

from nestling.cli.document_arguments import RECORDS, KeepTexts, Key, Model, Note, Paths, Place
from nestling.cli.flags import Flags, with_flags
from nestling.continual.study.settings import Study


@with_flags
def study(
    model: Model,
    paths: Paths,
    memory: Place,
    settings: Flags[Study],
    minutes: Annotated[float | None, typer.Option(min=0, help="End after so many minutes.", show_default=False)] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of what a new memory learns; 0 learns the weights themselves, for a memory as large as they are. "
            "Default: 16.",
            rich_help_panel=RECORDS,
            show_default=False,
        ),
    ] = None,
    keep_texts: KeepTexts = False,
    key: Key = None,
    note: Note = "",
) -> None:
    """Learn texts until questions made of them are answered; what is learned goes to a memory.

    nestling learn reads a text once and foresees it better; this repeats it, sentence by sentence and as questions in
    both directions, until --until of them are known. Texts are believed in the order in which they are given, the last
    one most. A new memory speaks from where a text names something that was studied; elsewhere the model is as before.
    The model's files stay as they are. Interrupted, what was learned so far is kept, and the same command goes on from
    it.
    """
    from nestling.cli.studying import run

    stopped = run(
        model, paths, memory, settings.make(), minutes=minutes, rank=rank, keep_texts=keep_texts, key=key, note=note
    )
    if stopped:
        raise typer.Exit(130)
