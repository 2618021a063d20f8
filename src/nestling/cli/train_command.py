"""`nestling train`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import torch.distributed as dist
import typer

from nestling.cli.flags import Flags, with_flags
from nestling.processes import is_main_process
from nestling.training.config import RECORDS, TrainConfig, read_run


@with_flags
def train(
    settings: Flags[TrainConfig],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --out; its own settings hold.", rich_help_panel=RECORDS),
    ] = False,
) -> None:
    """Train a model on text.

    The directory then holds the model and its tokenizer (AutoModelForCausalLM loads it after `import nestling`),
    metrics.jsonl, TensorBoard events and the newest checkpoints. A run that was stopped at any moment goes on with
    --resume as if it had not been. Several processes (torchrun --nproc-per-node N -m nestling train ...) are one run.
    """
    from nestling.cli.console import quiet_libraries, stdout_console
    from nestling.training import train as run_training

    config = _resumed(settings) if resume else settings.make()
    quiet_libraries()
    try:
        run_training(config, resume=resume, console=stdout_console())
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\ninterrupted; continue with: nestling train --out {config.out} --resume", file=sys.stderr)
        raise typer.Exit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def _resumed(settings: Flags[TrainConfig]) -> TrainConfig:
    """The run's own settings, and over them what the command line says; `train` refuses what may not change."""
    saved, _ = read_run(settings.values["out"])
    changes = {name: settings.values[name] for name in settings.given}
    if "tokens" in settings.given and "steps" not in settings.given:
        changes["steps"] = None
    return replace(saved, **changes)
