"""`nestling evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.states import LoopsOption, MemoryOption, StateOption
from nestling.errors import UserError


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.", show_default=False)],
    data: Annotated[
        list[str], typer.Option(metavar="PATH", help="Text to measure on; may be given again.", show_default=False)
    ],
    state: StateOption = None,
    memory: MemoryOption = None,
    carry: Annotated[bool, typer.Option("--carry", help="Keep the state through the whole text.")] = False,
    reset: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Start anew after N tokens. Default: the length trained at."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows read side by side with --reset.")] = 8,
    loops: LoopsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte on a text.

    Every token but the first is predicted once, in order, whatever the state does: with --carry it is kept from the
    first token to the last, with --reset N it starts anew every N tokens, from --state where one is given.
    """
    from nestling.cli.console import quiet_libraries, stdout_console
    from nestling.cli.loading import begin, check_tokens, load_model, load_saved, reading_tokens, trained_length
    from nestling.evaluation.language import evaluate_loss
    from nestling.tasks.text import read_documents
    from nestling.training.tokenization import count_bytes

    if carry and reset is not None:
        raise UserError("--carry and --reset exclude each other; give one of them")
    documents = [document for path in data for document in read_documents(path)]
    quiet_libraries()
    model, tokenizer = load_model(directory)
    start = load_saved(model, memory or [], state)
    ids = reading_tokens(tokenizer, documents, continuing=start is not None)
    check_tokens(directory, model, ids)
    if len(ids) < 2:
        raise UserError(f"{', '.join(data)} has fewer than two tokens; give a longer text")
    length = reset or trained_length(directory)
    report = evaluate_loss(
        model,
        ids,
        length,
        carry,
        batch_size=1 if carry else batch_size,
        state=begin(model, start, loops),
        n_bytes=count_bytes(tokenizer, ids[1:]),
    )
    mode = "carried through the text" if carry else f"reset every {length} tokens"
    if as_json:
        values = {"loss": report.loss, "perplexity": report.perplexity, "bits_per_byte": report.bits_per_byte}
        print(json.dumps(values | {"tokens": report.tokens, "bytes": report.bytes, "state": mode}))
        return
    console = stdout_console()
    console.print(f"{report.tokens:,} tokens, {report.bytes:,} bytes, state {mode}")
    bits = "" if report.bits_per_byte is None else f"   bits per byte {report.bits_per_byte:.4f}"
    console.print(f"loss {report.loss:.4f}   perplexity {report.perplexity:.3f}{bits}")
