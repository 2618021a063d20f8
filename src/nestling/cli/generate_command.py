"""`nestling generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling.errors import UserError


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A trained or converted model, any causal LM's directory, hub id or GGUF file."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    memory: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A memory of nestling learn, or of nestling read; or one of each."),
    ] = None,
    save_memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the memory of everything read and written here.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn; print the answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a text, from a fresh memory or a saved one.

    The prompt and its continuation go to standard output; with --chat the answer alone.
    """
    from nestling import NestlingForCausalLM
    from nestling.cli.console import quiet_libraries
    from nestling.cli.loading import check_memory_target, load_causal_lm, load_memories, prompt_tokens
    from nestling.cli.loading import save_memory as write_memory
    from nestling.continual.stream.scoring import learned_positions
    from nestling.evaluation.sampling import Continuation, continue_text, end_tokens
    from nestling.printing import printable
    from nestling.training.tokenization import special_ids

    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature:g} --top-p {top_p:g}: they must be at least 0, and in (0, 1]")
    check_memory_target(save_memory)
    quiet_libraries()
    model, tokenizer = load_causal_lm(source)
    if save_memory is not None and not isinstance(model, NestlingForCausalLM):
        raise UserError(f"--save-memory: a {type(model).__name__} keeps nothing that it reads; use nestling learn")
    state = load_memories(memory or [], model)
    if state is not None and not prompt:
        raise UserError("--memory needs a --prompt of at least one character to go on with")
    if chat and not prompt:
        raise UserError("--chat needs a --prompt")
    ids = prompt_tokens(source, tokenizer, prompt, continuing=state is not None, chat=chat)
    most = learned_positions(model)
    if most is not None and len(ids) > most:
        raise UserError(f"the prompt has {len(ids):,} tokens, and the model has {most:,} positions; give a shorter one")
    room = max_new_tokens if most is None else min(max_new_tokens, most - len(ids))
    text = Continuation(tokenizer, [] if chat else ids)
    ends = end_tokens(model, tokenizer)
    _write("" if chat else printable(prompt))
    written, state = continue_text(
        model,
        ids,
        room,
        state=state,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=ends,
        never=[i for i in special_ids(tokenizer) if i not in ends],
        on_token=lambda token: _write(printable(text.add(token))),
    )
    _write(printable(text.rest()) + "\n")
    if len(written) == room < max_new_tokens:
        print(f"stopped after {room:,} tokens: the model has {most:,} positions", file=sys.stderr)
    if save_memory is not None:
        assert isinstance(model, NestlingForCausalLM)  # any other was refused above
        write_memory(state, save_memory, model)
        print(f"memory of {state.get_seq_length()} tokens written to {save_memory}", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
