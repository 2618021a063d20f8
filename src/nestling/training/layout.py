"""How the rows of an optimizer step are shared out over processes.

A run keeps the rows of its steps for life: `batch_size` rows for each process it began with, `gradient_accumulation`
times. A run that goes on with another number of processes shares the same rows out anew, so that its losses stay what
they would have been, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestling.errors import UserError
from nestling.training.config import TrainConfig


@dataclass(frozen=True)
class Layout:
    """The rows of one optimizer step.

    Attributes:
        streams: rows that the run reads side by side, over all processes; with carried states each is one text.
        turns: how often it does in a step (`TrainConfig.gradient_accumulation`).
        processes: now at work.
        batch_size: rows that one process reads at once now.
        micro_batches: how often it does in a step now.
        process: which of them this is.
    """

    streams: int
    turns: int
    processes: int
    batch_size: int
    micro_batches: int
    process: int = 0

    @property
    def rows(self) -> int:
        """Rows in an optimizer step."""
        return self.streams * self.turns


def share_rows(config: TrainConfig, began: int = 1, now: int = 1, process: int = 0) -> Layout:
    """The layout of a run.

    Args:
        config: of the run.
        began: processes it began with.
        now: processes at work.
        process: which of them this is.

    Raises:
        UserError: the rows cannot be shared equally.
    """
    streams, turns = config.batch_size * began, config.gradient_accumulation
    if now == began:
        return Layout(streams, turns, now, config.batch_size, turns, process)
    shared, what = (streams, "rows side by side") if config.carry_state else (streams * turns, "rows in a step")
    if shared % now:
        raise UserError(
            f"the run in {config.out} has {shared} {what}, which {now} processes cannot share equally; resume it with "
            f"a number of processes that divides {shared}, as the {began} it began with"
        )
    own = shared // now
    if config.carry_state:  # a turn reads what the turn before has read up to, so only the streams can be shared
        return Layout(streams, turns, now, own, turns, process)
    most = max(size for size in range(1, min(config.batch_size, own) + 1) if own % size == 0)
    return Layout(streams, turns, now, most, own // most, process)
