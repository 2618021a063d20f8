"""Consoles, and quiet for the libraries underneath."""

from __future__ import annotations

import logging
import os

from rich.console import Console
from rich.markup import escape

from nestling.printing import one_line, short


def stdout_console() -> Console:
    """Standard output."""
    return Console(soft_wrap=True, highlight=False)


def say(console: Console, line: str) -> None:
    """Print a line that holds names from elsewhere: no markup, and nothing that a terminal would obey."""
    console.print(one_line(line), markup=False)


def cell(text: str) -> str:
    """A text from elsewhere as a table shows it: on one line, at most 200 characters, nothing in it obeyed."""
    return escape(one_line(short(text)))


def quiet_libraries() -> None:
    """No progress bars and no advice from transformers and datasets; this package reports for itself."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
