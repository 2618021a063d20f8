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
            help="A class of torch.optim or nestling.optim. Default: that of the run; 'none' shows the model alone.",
        ),
    ] = None,
    levels: Annotated[
        str | None, typer.Option(metavar="NAME=PERIOD,...", help="As in nestling train. Default: those of the run.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .svg, .png or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model and its optimizer as levels of memories with their update frequencies.

    Columns: level and updates (the fastest first), component, what flows into it, what it minimises and how, its
    parameters, and what else it holds. docs/levels.md explains them.
    """
    from nestling.cli.console import quiet_libraries, stdout_console
    from nestling.cli.loading import load_model
    from nestling.levels import inspect as find_levels

    if plot is not None and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot}: the name must end in .svg, .png or .pdf")
    if plot is not None and not plot.parent.is_dir():
        raise UserError(f"--plot {plot}: there is no directory {plot.parent}; make it first")
    quiet_libraries()
    model, _ = load_model(directory)
    system = find_levels(model, _optimizer(model, directory, optimizer, levels))
    if plot is not None:
        system.plot(plot)
    if as_json:
        print(json.dumps(system.to_dict(), indent=2, ensure_ascii=False))
        return
    console = stdout_console()
    system.print(console)
    if plot is not None:
        console.print(f"picture written to {plot}", highlight=False)


def _optimizer(model: Any, directory: Path, name: str | None, levels: str | None) -> Any:
    """The named optimizer or that of the run, over the given levels or those of the run; before its first step."""
    from nestling.levels.assignment import multi_frequency, parse_levels
    from nestling.training.config import CONFIG_FILE, read_run

    run = read_run(directory)[0].resolved() if (directory / CONFIG_FILE).exists() else None
    if name == "none":
        if levels:
            raise UserError("--levels has no meaning with --optimizer none")
        return None
    options: dict[str, Any] = {}
    if name is None and run is not None:
        options = {"lr": run.learning_rate, "betas": (run.beta1, run.beta2), "weight_decay": run.weight_decay}
    made = partial(optimizer_class(name or "AdamW"), **options)
    spec = levels if levels is not None else run.levels if run is not None else ""
    try:
        if not spec:
            return made([p for p in model.parameters() if p.requires_grad])
        exponent = run.level_rate_exponent if run is not None and levels is None else 0.0
        decay = run.weight_decay if options and run is not None else 0.0
        periods = parse_levels(spec)
        return multi_frequency(model, periods, optimizer=made, rate_exponent=exponent, weight_decay=decay)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--optimizer {name or 'AdamW'} cannot be made over all parameters of this model: {reason}"
        ) from error


def optimizer_class(name: str) -> Any:
    """A class of `nestling.optim` or `torch.optim`, by its name in any case.

    Raises:
        UserError: no such class; the message lists those that exist.
    """
    import torch

    import nestling.optim

    found = {}
    for module in (torch.optim, nestling.optim):
        for key, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
                found[key] = value
    for base in ("Optimizer", "MultiFrequency"):
        found.pop(base, None)
    for key, value in found.items():
        if key.lower() == name.lower():
            return value
    raise UserError(f"unknown optimizer {name!r}; choose one of: {', '.join(sorted(found))}, none")
