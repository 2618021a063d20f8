"""`nestling read`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.states import (
    LoopsOption,
    MemoryOption,
    OldSaveStateOption,
    SaveStateOption,
    StateOption,
    state_target,
)
from nestling.errors import UserError


def read(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.", show_default=False)],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files or directories to read.", show_default=False)
    ],
    save_state: SaveStateOption = None,
    state: StateOption = None,
    memory: MemoryOption = None,
    save_memory: OldSaveStateOption = None,
    bins: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 12,
    segment: Annotated[int, typer.Option(min=1, help="Tokens in a forward pass; changes no result.")] = 512,
    loops: LoopsOption = None,
) -> None:
    """Read texts, and show how well each part was foreseen.

    The state is kept from the first token to the last. Save it, and nestling generate or evaluate can go on from it.
    """
    from rich.progress import Progress
    from rich.table import Table

    from nestling.cli import loading
    from nestling.cli.console import quiet_libraries, say, stdout_console
    from nestling.evaluation.language import loss_by_position, read_text
    from nestling.tasks.text import read_documents

    target = state_target(save_state, save_memory)
    documents = [document for path in paths for document in read_documents(path)]
    quiet_libraries()
    model, tokenizer = loading.load_model(directory)
    start = loading.load_saved(model, memory or [], state)
    ids = loading.reading_tokens(tokenizer, documents, continuing=start is not None)
    begun = loading.begin(model, start, loops)
    loading.check_tokens(directory, model, ids)
    if len(ids) < 2:
        raise UserError(f"{', '.join(paths)} has fewer than two tokens; give a longer text")
    console = stdout_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=len(ids) - 1)
        losses, end = read_text(model, ids, state=begun, segment=segment, on_segment=lambda n: bar.advance(task, n))
    table = Table(title=f"{len(ids):,} tokens read")
    for heading in ("tokens", "loss", "perplexity"):
        table.add_column(heading, justify="right")
    for part in loss_by_position(losses, bins):
        table.add_row(f"{part.start + 1:,} - {part.stop:,}", f"{part.loss:.4f}", f"{part.perplexity:.2f}")
    console.print(table)
    console.print(f"mean loss {float(losses.double().mean()):.4f}")
    if target is not None:
        loading.save_state(end, target, model)
        size = target.stat().st_size
        say(console, f"state after {end.get_seq_length():,} tokens written to {target} ({size:,} bytes)")
