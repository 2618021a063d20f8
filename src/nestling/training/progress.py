"""What a person sees while training: a live bar on a terminal, plain lines in a file."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingDisplay:
    """Progress of one run on a console."""

    def __init__(self, console: Console, total_steps: int) -> None:
        """Args: where to print; steps of the whole run."""
        self.console = console
        self.total = total_steps
        self._first = 0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, loss="-", rate="-")

    def start(self, step: int) -> None:
        """Begin at a step; not 0 when a run is resumed."""
        self._first = step
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        """A step is done; cheap, called at every step."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{tokens_per_s:,.0f}")

    def log(self, record: dict[str, Any]) -> None:
        """A line for a record of `metrics.jsonl`; training records show on a terminal in the bar only."""
        step = f"step {record['step']:>{len(str(self.total))}}/{self.total}"
        if "val_loss" in record:
            bits = record["bits_per_byte"]
            tail = "" if bits is None else f"  bits per byte {bits:.4f}"
            perplexity = record["perplexity"]
            self._say(f"{step}  validation loss {record['val_loss']:.4f}  perplexity {perplexity:.2f}{tail}")
        elif not self.console.is_terminal:
            rate = record["tokens_per_s"]
            left = (self.total - record["step"]) * (record["tokens"] / record["step"]) / max(rate, 1e-9)
            self._say(
                f"{step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  {rate:,.0f} tokens/s  {clock(left)} left"
            )

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
