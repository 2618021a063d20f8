"""The command line's frame: the commands, and one way out for every error."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from nestling import __version__
from nestling.cli.convert_command import convert
from nestling.cli.evaluate_command import evaluate
from nestling.cli.flags import list_options
from nestling.cli.generate_command import generate
from nestling.cli.inspect_command import inspect
from nestling.cli.learn_command import learn
from nestling.cli.memory_command import memory
from nestling.cli.read_command import read
from nestling.cli.sleep_command import sleep
from nestling.cli.study_command import study
from nestling.cli.train_command import train
from nestling.errors import UserError
from nestling.printing import forgiving_output, printable
from nestling.processes import is_main_process, process_index, refuse_several
from nestling.training.config import TrainConfig

FOR_SEVERAL_PROCESSES = ("train",)
SECONDS_FOR_THE_FIRST = 5.0  # that other processes leave it to say what all of them found

app = typer.Typer(
    name="nestling",
    help="Language models that go on learning while they read (Nested Learning).",
    epilog="Start with: nestling train --out run, then: nestling generate run --prompt 'The '",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(generate)
app.command()(evaluate)
app.command()(read)
app.command()(learn)
app.command()(study)
app.command()(sleep)
app.add_typer(memory, name="memory")
app.command()(inspect)
app.command()(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nestling {__version__}")
        raise typer.Exit


@app.callback()
def frame(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What holds for every command."""
    command = context.invoked_subcommand
    if command not in FOR_SEVERAL_PROCESSES:
        refuse_several(f"nestling {command}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done, 2 for everything the user can put right (one line on stderr), 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    forgiving_output()
    try:
        result = app(spread_lists(given), prog_name="nestling", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        command = f" {given[0]}" if given and not given[0].startswith("-") else ""
        return _fail(f"{error.format_message()} (see nestling{command} --help)") if error.format_message() else 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains on its way out
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"{error.strerror}: {error.filename or 'the output'}; free disk space and try again")
        raise


def spread_lists(arguments: list[str]) -> list[str]:
    """`train --data a b` as `--data a --data b`, so that shell patterns work. Other commands take positional paths."""
    if not arguments or arguments[0] != "train":
        return arguments
    takes_many = list_options(TrainConfig)
    spread: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in takes_many else ""
        elif option and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _fail(message: str) -> int:
    """Say what is wrong. What all of several processes find the first one says: when it ends, the launcher ends the
    others, and what only one of them finds it says a moment later."""
    where = ""
    if not is_main_process():
        time.sleep(SECONDS_FOR_THE_FIRST)
        where = f" in process {process_index()}"
    print(f"error{where}: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
