"""The processes that a launcher (`torchrun`) has started together, and which of them this is.

The launcher says so in the environment. This is read before torch is loaded, and by what never sets up
`torch.distributed`: one command is made for several processes, and the others refuse them.
"""

from __future__ import annotations

import os

from nestling.errors import UserError


def process_count() -> int:
    """Processes that were started together; 1 without a launcher."""
    return max(1, _number("WORLD_SIZE", 1))


def process_index() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0)


def is_main_process() -> bool:
    """Whether this is the process that writes and prints for all."""
    return process_index() == 0


def local_process_count() -> int:
    """Those of them on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", process_count()))


def refuse_several(command: str) -> None:
    """Raises UserError where a command that is one process was started as several."""
    if process_count() > 1:
        raise UserError(
            f"{command} is one process, and {process_count()} were started (WORLD_SIZE); start it without torchrun, "
            "only nestling train is made for several"
        )


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
