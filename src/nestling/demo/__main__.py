"""The demo's command line: `python -m nestling.demo`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nestling.demo.settings import DemoSettings
from nestling.errors import UserError
from nestling.printing import forgiving_output
from nestling.processes import refuse_several

WIDTH = 110  # of the tables when the output is a file or a pipe


def main(
    out: Annotated[Path, typer.Option(help="Directory for models, state and report.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=1.0, help="Time the whole demo may take.")] = DemoSettings.minutes,
    tokens: Annotated[int, typer.Option(min=1, help="Training bytes of each model at most.")] = DemoSettings.tokens,
) -> None:
    """Train Hope beside a Transformer++, read an unseen text, save the state and load it in a new process."""
    settings = DemoSettings(out=out, minutes=minutes, tokens=tokens)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(
        f"[bold]The nestling demo[/] takes {minutes:g} minutes or less on a machine with two cores. It\n"
        "  1. trains two language models of equal size on the same text, a Transformer++ and Hope;\n"
        "  2. lets both read a text they have never seen, with state carried and with state reset;\n"
        "  3. saves Hope's state after it, loads that in a new process and reads on with and without it;\n"
        f"  4. writes a report with plots to {settings.report_file}.\n",
        highlight=False,
    )
    try:
        refuse_several("the demo")
        run(settings, console)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def run(settings: DemoSettings, console: Console) -> None:
    """All stages in order. Imports come late, so that the first words are on the screen at once."""
    began = time.perf_counter()
    with console.status("loading PyTorch"):
        from nestling.cli.console import quiet_libraries
        from nestling.demo import stages, tables
        from nestling.demo.plan import make_plan
        from nestling.demo.unseen import unseen_text

    quiet_libraries()
    stages.clear_output(settings)
    with console.status("measuring this machine's speed"):
        plan = make_plan(settings)
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in plan.rates.items())
    console.print(
        f"Speed here: {rates} bytes/s. Each model is trained on {plan.tokens:,} bytes; about {plan.seconds / 60:.0f} "
        f"minutes in all.\n",
        highlight=False,
    )
    trained = stages.train_models(settings, plan, console)
    tables.show_training(trained, settings, console)
    reading = stages.read_unseen(settings, trained, unseen_text(), console)
    tables.show_reading(reading, settings, console)
    recall = stages.remember(settings, trained, reading, console)
    tables.show_recall(recall, settings, console)
    seconds = time.perf_counter() - began
    tables.write_page(settings, plan, trained, reading, recall, seconds)
    console.print(f"\nDone in {seconds / 60:.1f} minutes. Open {settings.report_file} in a browser.", highlight=False)


if __name__ == "__main__":
    forgiving_output()
    typer.run(main)
