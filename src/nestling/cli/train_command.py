"""`nestling train`."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling import presets
from nestling.errors import UserError
from nestling.optim import NAMES as OPTIMIZERS

DATA, MODEL, OPTIMIZER, RECORDS = "Data", "Model", "Optimisation", "Records"


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory of the run; new, or empty.", show_default=False)],
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(presets.PRESETS)}.", rich_help_panel=MODEL)] = "hope",
    size: Annotated[str, typer.Option(help=f"One of: {', '.join(presets.SIZES)}.", rich_help_panel=MODEL)] = "tiny",
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Go on training this model, with its tokenizer and at the periods of its levels, instead of a preset.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE...", help="Change a setting of the preset.", rich_help_panel=MODEL),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...",
            help="Files or directories of UTF-8 text. Default: CPython's language reference, embedded.",
            rich_help_panel=DATA,
        ),
    ] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH...",
            help="Text to validate on. Default: the last tenth of each corpus, held out.",
            rich_help_panel=DATA,
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, bpe:SIZE, or a Hugging Face path or name.", rich_help_panel=DATA)
    ] = "bytes",
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="--data names a set of the hub, read as it arrives.", rich_help_panel=DATA),
    ] = False,
    subset: Annotated[str | None, typer.Option(help="Subset of a streamed set.", rich_help_panel=DATA)] = None,
    split: Annotated[str, typer.Option(help="Split of a streamed set.", rich_help_panel=DATA)] = "train",
    column: Annotated[str, typer.Option(help="Text column of a streamed set.", rich_help_panel=DATA)] = "text",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: 500.", rich_help_panel=OPTIMIZER)] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Budget in tokens, instead of --steps.", rich_help_panel=OPTIMIZER)
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.", rich_help_panel=OPTIMIZER)] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.", rich_help_panel=OPTIMIZER)] = 8,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Batches in an optimizer step.", rich_help_panel=OPTIMIZER)
    ] = 1,
    carry_state: Annotated[
        bool,
        typer.Option("--carry-state", help="Read on with the state of the step before.", rich_help_panel=OPTIMIZER),
    ] = False,
    carry_tokens: Annotated[
        int | None, typer.Option(help="Reset carried states after so many tokens.", rich_help_panel=OPTIMIZER)
    ] = None,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help=f"One of: {', '.join(OPTIMIZERS)}.", rich_help_panel=OPTIMIZER)
    ] = "adamw",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Peak learning rate. Default: 3e-3 for tiny, 1e-4 with --init, else 4e-4; 0.1 for optimizers that "
            "step like sgd.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    min_lr_ratio: Annotated[
        float, typer.Option(help="Last learning rate, as a part of the peak.", rich_help_panel=OPTIMIZER)
    ] = 0.1,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Default: a tenth of the run.", rich_help_panel=OPTIMIZER)
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.", rich_help_panel=OPTIMIZER)] = 0.1,
    beta1: Annotated[
        float, typer.Option(help="AdamW's; the momentum of optimizers that step like sgd.", rich_help_panel=OPTIMIZER)
    ] = 0.9,
    beta2: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=OPTIMIZER)] = 0.95,
    grad_clip: Annotated[float, typer.Option(help="Largest gradient norm.", rich_help_panel=OPTIMIZER)] = 1.0,
    levels: Annotated[
        str,
        typer.Option(
            metavar="NAME=PERIOD,...",
            help="Steps between two updates of a level, as in cms.0=1,cms.1=8,cms.2=64; a name is cms.N, a converted "
            "model's level, or a pattern of parameter names. Everything else: 1.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = "",
    level_rate_exponent: Annotated[
        float, typer.Option(help="A level's learning rate is multiplied by PERIOD^this.", rich_help_panel=OPTIMIZER)
    ] = 0.0,
    precision: Annotated[
        str, typer.Option(help="float32, or bf16 for autocast.", rich_help_panel=OPTIMIZER)
    ] = "float32",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory for more computation.", rich_help_panel=OPTIMIZER),
    ] = False,
    device: Annotated[str, typer.Option(help="auto or cpu.", rich_help_panel=OPTIMIZER)] = "auto",
    seed: Annotated[int, typer.Option(help="Of the weights and the data order.", rich_help_panel=OPTIMIZER)] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out; its own settings hold.", rich_help_panel=RECORDS),
    ] = False,
    log_every: Annotated[int, typer.Option(help="Steps between two records.", rich_help_panel=RECORDS)] = 10,
    eval_every: Annotated[int, typer.Option(help="Steps between two validations.", rich_help_panel=RECORDS)] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.", rich_help_panel=RECORDS)] = 100,
    keep_checkpoints: Annotated[int, typer.Option(help="Newest checkpoints kept.", rich_help_panel=RECORDS)] = 2,
    eval_tokens: Annotated[int, typer.Option(help="Most tokens a validation reads.", rich_help_panel=RECORDS)] = 65536,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events.", rich_help_panel=RECORDS)] = True,
    measure_levels: Annotated[
        bool,
        typer.Option(
            "--measure-levels", help="Measure updates and gradients of the levels as well.", rich_help_panel=RECORDS
        ),
    ] = False,
    sample_tokens: Annotated[int, typer.Option(help="Length of the sample at the end.", rich_help_panel=RECORDS)] = 200,
    sample_prompt: Annotated[str, typer.Option(help="Beginning of the sample.", rich_help_panel=RECORDS)] = "",
) -> None:
    """Train a model on text.

    The directory then holds the model and its tokenizer (AutoModelForCausalLM loads it after `import nestling`),
    metrics.jsonl, TensorBoard events and the newest checkpoints. A run that was stopped at any moment goes on with
    --resume as if it had not been.
    """
    from nestling.cli.console import quiet_libraries, stdout_console
    from nestling.training import TrainConfig
    from nestling.training import train as run_training

    names = {f.name for f in fields(TrainConfig)}
    values = {name: value for name, value in context.params.items() if name in names}
    values |= {"out": str(out), "init": None if init is None else str(init)}
    values |= {"overrides": parse_overrides(overrides or [])}
    values |= {"data": tuple(data or ()), "valid": tuple(valid or ())}
    given = {name for name in values if _on_command_line(context, name)}
    config = _resumed_config(values, given) if resume else TrainConfig(**values)
    quiet_libraries()
    try:
        run_training(config, resume=resume, console=stdout_console())
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with: nestling train --out {out} --resume", file=sys.stderr)
        raise typer.Exit(130) from None


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["hidden_size=64", "periods=[16, null]"]` as a dictionary; values are JSON.

    Raises:
        UserError: an assignment without `=`, or a value that is not JSON.
    """
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"--set {assignment}: write NAME=VALUE, as in --set hidden_size=64")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"--set {assignment}: the value must be JSON (64, 0.5, true, null, [16, 64])") from error
    return found


def _resumed_config(values: dict[str, Any], given: set[str]) -> Any:
    """The run's own settings, and over them what the command line says; `train` refuses what may not change."""
    from nestling.training.config import read_run

    saved, _ = read_run(values["out"])
    changes = {name: values[name] for name in given}
    if "tokens" in given and "steps" not in given:
        changes["steps"] = None
    return replace(saved, **changes)


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
