"""Text of unknown origin, made fit to be printed."""

from __future__ import annotations

import io
import sys
import unicodedata

KEPT = "\n\t"
UNPRINTABLE = ("Cc", "Cs")  # what a terminal would obey, and halves of characters, which no output can encode


def printable(text: str) -> str:
    """The text with control characters and lone surrogates replaced; line ends and tabs stay."""
    return "".join(
        c if c in KEPT or unicodedata.category(c) not in UNPRINTABLE else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def one_line(text: str) -> str:
    """As `printable`, with a space for every line end and tab."""
    return printable(text).replace("\n", " ").replace("\t", " ")


def short(text: str, most: int = 200) -> str:
    """The text, cut in the middle to `most` characters where it is longer: paths differ at their ends."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - end :]}"


def forgiving_output() -> None:
    """From here on, what standard output and standard error cannot encode comes out as a stand-in, not as an error.

    Their encoding is the terminal's or the pipe's, and not every one has the characters of every text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
