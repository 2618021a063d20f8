"""`nestling generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling.errors import UserError


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    memory: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on from this memory.")] = None,
    save_memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the memory of everything read and written here.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a text, from a fresh memory or a saved one.

    The prompt and its continuation go to standard output.
    """
    from nestling.cli.console import quiet_libraries
    from nestling.cli.loading import check_memory_target, load_memory, load_model, reading_tokens
    from nestling.cli.loading import save_memory as write_memory
    from nestling.evaluation.sampling import continue_text
    from nestling.tasks.text import Document
    from nestling.training.progress import printable
    from nestling.training.tokenization import special_ids

    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature:g} --top-p {top_p:g}: they must be at least 0, and in (0, 1]")
    check_memory_target(save_memory)
    quiet_libraries()
    model, tokenizer = load_model(directory)
    state = load_memory(memory, model)
    if state is not None and not prompt:
        raise UserError("--memory needs a --prompt of at least one character to go on with")
    ids = reading_tokens(tokenizer, [Document("prompt", prompt)], continuing=state is not None)
    written: list[int] = []
    shown = 0

    def show(token: int) -> None:
        nonlocal shown
        written.append(token)
        text = str(tokenizer.decode(written))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character is still to come
            _write(printable(text[shown:]))
            shown = len(text)

    _write(printable(prompt))
    _, state = continue_text(
        model,
        ids.tolist(),
        max_new_tokens,
        state=state,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_token=tokenizer.eos_token_id,
        never=special_ids(tokenizer),
        on_token=show,
    )
    _write(printable(str(tokenizer.decode(written))[shown:]) + "\n")
    if save_memory is not None:
        write_memory(state, save_memory, model)
        print(f"memory of {state.get_seq_length()} tokens written to {save_memory}", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
