"""`nestling generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A trained or converted model, any causal LM's directory, hub id or GGUF file."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    memory: MemoryOption = None,
    state: StateOption = None,
    save_state: SaveStateOption = None,
    save_memory: OldSaveStateOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn; print the answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    loops: LoopsOption = None,
) -> None:
    """Continue a text, from a fresh state or a saved one.

    The prompt and its continuation go to standard output; with --chat the answer alone.
    """
    from nestling import NestlingForCausalLM
    from nestling.cli import loading
    from nestling.cli.console import quiet_libraries
    from nestling.evaluation.sampling import Continuation, continue_text, end_tokens
    from nestling.printing import printable
    from nestling.training.tokenization import special_ids

    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature:g} --top-p {top_p:g}: they must be at least 0, and in (0, 1]")
    target = state_target(save_state, save_memory)
    quiet_libraries()
    model, tokenizer = loading.load_causal_lm(source)
    if target is not None and not isinstance(model, NestlingForCausalLM):
        raise UserError(f"--save-state: a {type(model).__name__} keeps nothing that it reads; use nestling learn")
    start = loading.load_saved(model, memory or [], state)
    if start is not None and not prompt:
        raise UserError("--state needs a --prompt of at least one character to go on with")
    if chat and not prompt:
        raise UserError("--chat needs a --prompt")
    ids = loading.prompt_tokens(source, tokenizer, prompt, continuing=start is not None, chat=chat)
    loading.check_tokens(source, model, ids)
    begun = loading.begin(model, start, loops)
    room = _room(model, len(ids), max_new_tokens)
    text = Continuation(tokenizer, [] if chat else ids)
    ends = end_tokens(model, tokenizer)
    _write("" if chat else printable(prompt))
    written, end = continue_text(
        model,
        ids,
        room,
        state=begun,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=ends,
        never=[i for i in special_ids(tokenizer) if i not in ends],
        on_token=lambda token: _write(printable(text.add(token))),
    )
    _write(printable(text.rest()) + "\n")
    if len(written) == room < max_new_tokens:
        print(f"stopped after {room:,} tokens, at the last position that the model has", file=sys.stderr)
    if target is not None:
        assert isinstance(model, NestlingForCausalLM)  # any other was refused above
        loading.save_state(end, target, model)
        print(f"state after {end.get_seq_length()} tokens written to {target}", file=sys.stderr)


def _room(model: PreTrainedModel, read: int, wanted: int) -> int:
    """Tokens to write at most, where a model has a table of positions."""
    from nestling.continual.stream.scoring import learned_positions

    most = learned_positions(model)
    if most is None:
        return wanted
    if read > most:
        raise UserError(f"the prompt has {read:,} tokens, and the model has {most:,} positions; give a shorter one")
    return min(wanted, most - read)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
