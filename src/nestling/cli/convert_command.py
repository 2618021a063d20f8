"""`nestling convert`."""

from __future__ import annotations

import errno
import re
import warnings
from pathlib import Path
from typing import Annotated

import typer

from nestling.errors import UserError

LEVELS = "fast=256,mid=1024,slow=4096"
"""Fastest level at half of a usual learning context, and each next one four times slower, as in the trials the
periods come from."""

OWN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|"
    r"model\.safetensors\.index)\.json|chat_template\.jinja|merges\.txt|tokenizer\.model|model.*\.safetensors"
)
"""Files that `save_pretrained` writes."""


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A model's directory, a GGUF file, or a hub name.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; new, or empty.", show_default=False)],
    levels: Annotated[
        str, typer.Option(metavar="NAME=PERIOD,...", help="Levels and their update periods in tokens.")
    ] = LEVELS,
    assignment: Annotated[
        str,
        typer.Option(
            help="depth: groups of layers, the top ones fastest; interleaved: layers in turn; split: every layer's "
            "hidden neurons are divided over the levels."
        ),
    ] = "depth",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUT.")] = False,
) -> None:
    """Make a pre-trained transformer a model whose MLPs are levels that learn at their own periods.

    Until it learns, the new model computes what the old one did. Llama, SmolLM2, Mistral, Qwen2 and Qwen3.
    """
    from nestling.cli.console import quiet_libraries, say, stdout_console
    from nestling.levels.assignment import parse_levels, stream_levels
    from nestling.models.conversion import ASSIGNMENTS, ConversionWarning
    from nestling.models.conversion import convert as convert_model
    from nestling.models.pretrained import load_pretrained
    from nestling.training.checkpoint import new_directory

    periods = parse_levels(levels, unit="tokens")
    if assignment not in ASSIGNMENTS:
        raise UserError(f"unknown --assignment {assignment!r}; choose one of: {', '.join(ASSIGNMENTS)}")
    _check_out(out, source, overwrite)
    quiet_libraries()
    model, tokenizer = load_pretrained(source)
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", ConversionWarning)
            converted = convert_model(model, periods, assignment)  # type: ignore[arg-type]  # checked above
    except ValueError as error:
        raise UserError(f"{source} cannot be converted: {error}") from error
    del model
    try:
        with new_directory(out) as staging:
            converted.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"nothing was written to {out} ({error.strerror or error}); choose another directory"
        ) from error
    except Exception as error:  # transformers and safetensors have errors of their own
        raise UserError(f"nothing was written to {out} ({' '.join(str(error).split())[:200]})") from error
    sizes = {name: p.numel() for name, p in converted.named_parameters()}
    console = stdout_console()
    for note in notes:
        if issubclass(note.category, ConversionWarning):
            say(console, f"note: {note.message}")
    for level, names in stream_levels(converted).items():
        count = sum(sizes[n] for n in names)
        say(console, f"{level}: {count:,} parameters every {periods[level]:,} tokens")
    say(console, f"{sum(sizes.values()):,} parameters in all, by {assignment}; saved in {out}")


def _check_out(out: Path, source: str, overwrite: bool) -> None:
    """Refuse an OUT that would lose something, before any work is done."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory for the converted model")
    target, origin = out.resolve(), Path(source).resolve()
    if Path.cwd().resolve().is_relative_to(target):
        raise UserError(f"{out} is the working directory, or holds it; name a new one")
    if Path(source).exists() and (target == origin or target in origin.parents):
        raise UserError(f"{out} holds the model to convert; give another directory")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out} is not empty; choose a new directory, or replace its model with --overwrite")
    if not (out / "config.json").is_file():
        raise UserError(f"{out} holds no model (no config.json), so --overwrite does not replace it")
    if more := sorted(p.name for p in out.iterdir() if p.is_dir() or not OWN.fullmatch(p.name)):
        raise UserError(f"{out} holds more than a model ({', '.join(more[:3])}), which --overwrite would delete")
