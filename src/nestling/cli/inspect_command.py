"""`nestling inspect`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.errors import UserError


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.", show_default=False)],
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="As in nestling train. Default: that of the run; 'none' shows the model alone.",
        ),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=PERIOD,...",
            help="As in nestling train. Default: those of the run; without one a converted model's own, where a step "
            "is the fastest level's period.",
        ),
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens that a row reads in an optimizer step, on which the order of levels depends. Default: those "
            "of the run.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .svg, .png or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model and its optimizer as levels of memories with their update frequencies.

    Columns: level and updates (the fastest first), component, what flows into it, what it minimises and how, its
    parameters, and what else it holds. docs/levels.md explains them.
    """
    from nestling.cli.console import quiet_libraries, say, stdout_console
    from nestling.cli.loading import load_model
    from nestling.levels import inspect as find_levels

    if plot is not None and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot}: the name must end in .svg, .png or .pdf")
    if plot is not None and not plot.parent.is_dir():
        raise UserError(f"--plot {plot}: there is no directory {plot.parent}; make it first")
    quiet_libraries()
    model, _ = load_model(directory)
    made, tokens, restart = _optimizer(model, directory, optimizer, levels)
    system = find_levels(model, made, tokens_per_step=tokens_per_step or tokens, restart=restart)
    if plot is not None:
        system.plot(plot)
    if as_json:
        print(json.dumps(system.to_dict(), indent=2, ensure_ascii=False))
        return
    console = stdout_console()
    system.print(console)
    if plot is not None:
        say(console, f"picture written to {plot}")


def _optimizer(model: Any, directory: Path, name: str | None, levels: str | None) -> tuple[Any, int | None, int | None]:
    """The named optimizer or that of the run, over the given levels or those of the run, before its first step; tokens
    that a row reads in a step, and after which it starts anew, where a run or a converted model says so."""
    from nestling.levels.assignment import multi_frequency, parse_levels, steps_of
    from nestling.optim import NAMES, build
    from nestling.training.config import CONFIG_FILE, TrainConfig, read_run

    trained = (directory / CONFIG_FILE).exists()
    run = (read_run(directory)[0] if trained else TrainConfig(out=str(directory))).resolved()
    if name == "none":
        if levels:
            raise UserError("--levels has no meaning with --optimizer none")
        return None, None, None
    if name is not None and name not in NAMES:
        raise UserError(f"unknown optimizer {name!r}; choose one of: {', '.join(NAMES)}, none")
    assert run.learning_rate is not None
    made = partial(
        build,
        name or run.optimizer,
        model,
        lr=run.learning_rate,
        weight_decay=run.weight_decay,
        betas=(run.beta1, run.beta2),
    )
    clock = (run.row_tokens_per_step(), run.restart()) if trained else (None, None)
    if not (spec := run.levels if levels is None else levels):
        if own := getattr(model.config, "levels", None):  # a converted model that no run has trained
            step = min(own.values())
            return multi_frequency(model, steps_of(own, step), made), step, None
        return made(), *clock
    exponent = run.level_rate_exponent if levels is None else 0.0
    return multi_frequency(model, parse_levels(spec), made, exponent), *clock
