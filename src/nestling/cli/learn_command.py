"""`nestling learn`."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from nestling.errors import UserError

LEARNING, RECORDS = "Learning", "Records"


def learn(
    command: typer.Context,
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
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=PERIOD,...",
            help="Tokens between two updates: of the model's own levels, or of patterns of parameter names as in "
            "`*.mlp.*=256`. Default: the model's levels; all MLPs every 256 tokens where it has none.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the fastest level.", rich_help_panel=LEARNING)] = 1e-4,
    rate_exponent: Annotated[
        float,
        typer.Option(
            help="A slower level's rate is multiplied by (its period / fastest)^this.", rich_help_panel=LEARNING
        ),
    ] = -0.5,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="As in nestling train.", rich_help_panel=LEARNING)
    ] = "adamw",
    context: Annotated[
        int, typer.Option("--context", min=2, help="Tokens read together at most.", rich_help_panel=LEARNING)
    ] = 512,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Learn differences of this rank, for a small memory.", rich_help_panel=LEARNING),
    ] = None,
    retention: Annotated[
        float,
        typer.Option(
            help="Kept part of the difference to the base at each update; 1 keeps all.", rich_help_panel=LEARNING
        ),
    ] = 1.0,
    replay: Annotated[
        int,
        typer.Option(
            min=0,
            help="Earlier pieces kept, one learned again with each chunk: by heart, or from a --teacher.",
            rich_help_panel=LEARNING,
        ),
    ] = 0,
    teacher: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="What is replayed is taught by the running mean of the weights over so many tokens.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    rehearse: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="PIECES",
            help="Pieces of text that the model writes before it learns; one with each chunk keeps what it knew.",
            rich_help_panel=LEARNING,
        ),
    ] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Forward pass in bfloat16; weights stay float32.", rich_help_panel=LEARNING)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of ranks, replay and rehearsal.", rich_help_panel=LEARNING)] = 0,
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
    note: Annotated[str, typer.Option(help="A line to keep with the snapshot.", rich_help_panel=RECORDS)] = "",
) -> None:
    """Read texts and learn from them; what is learned goes to a memory, the model's files stay as they are.

    Interrupted at any moment, the memory is whole, and the same command goes on where it stopped: no token is learned
    twice and none is lost. Documents that were finished are skipped. A memory that exists keeps its own settings.
    """
    from nestling.cli.learning import LearnSettings, run

    values = {f.name: command.params[f.name] for f in fields(LearnSettings) if f.name in command.params}
    sources = {name: command.get_parameter_source(name) for name in values}
    settings = LearnSettings(
        **values,
        given=frozenset(
            name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"
        ),
    )
    if not 0 <= lr < math.inf:
        raise UserError(f"--lr {lr:g}: a learning rate is a finite number, 0 or more")
    stopped = run(
        model,
        paths,
        memory,
        settings,
        save_tokens=save_tokens,
        save_seconds=save_seconds,
        measure=0 if quick else measure,
        note=note,
    )
    if stopped:
        raise typer.Exit(130)
