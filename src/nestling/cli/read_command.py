"""`nestling read`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestling.errors import UserError


def read(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.", show_default=False)],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files or directories to read.", show_default=False)
    ],
    save_memory: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the memory here.")] = None,
    memory: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from this memory.")] = None,
    bins: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 12,
    segment: Annotated[int, typer.Option(min=1, help="Tokens in a forward pass; changes no result.")] = 512,
) -> None:
    """Read texts with the memory on, and show how well each part was foreseen.

    The memory is kept from the first token to the last. Save it, and nestling generate or evaluate can go on from it.
    """
    from rich.progress import Progress
    from rich.table import Table

    from nestling.cli.console import quiet_libraries, say, stdout_console
    from nestling.cli.loading import check_memory_target, load_memory, load_model, reading_tokens
    from nestling.cli.loading import save_memory as write_memory
    from nestling.evaluation.language import loss_by_position, read_text
    from nestling.tasks.text import read_documents

    check_memory_target(save_memory)
    documents = [document for path in paths for document in read_documents(path)]
    quiet_libraries()
    model, tokenizer = load_model(directory)
    state = load_memory(memory, model)
    ids = reading_tokens(tokenizer, documents, continuing=state is not None)
    if len(ids) < 2:
        raise UserError(f"{', '.join(paths)} has fewer than two tokens; give a longer text")
    console = stdout_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=len(ids) - 1)
        losses, state = read_text(model, ids, state=state, segment=segment, on_segment=lambda n: bar.advance(task, n))
    table = Table(title=f"{len(ids):,} tokens read with memory")
    for heading in ("tokens", "loss", "perplexity"):
        table.add_column(heading, justify="right")
    for part in loss_by_position(losses, bins):
        table.add_row(f"{part.start + 1:,} - {part.stop:,}", f"{part.loss:.4f}", f"{part.perplexity:.2f}")
    console.print(table)
    console.print(f"mean loss {float(losses.double().mean()):.4f}")
    if save_memory is not None:
        write_memory(state, save_memory, model)
        size = save_memory.stat().st_size
        say(console, f"memory of {state.get_seq_length():,} tokens written to {save_memory} ({size:,} bytes)")
