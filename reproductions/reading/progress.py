"""A run that takes hours goes on where it was interrupted: one file, written now and then.

Not one whose levels are measured: what the measures sum up over many steps is not in a learner's memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nestling.continual.store.memory import Memory
from reproductions.harness.rows import Row
from reproductions.harness.stream_methods import StreamModel

SECONDS = 600.0
"""Between two saves: a memory of all MLPs with its optimizer is about 1 GB."""
NAME = "reading"


@dataclass
class State:
    """What a run has found so far.

    Attributes:
        row: of the texts that are finished.
        losses: of the present text as far as it was read.
        reading: seconds that this took so far.
        seconds: that the run took.
    """

    row: Row
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    reading: float = 0.0
    seconds: float = 0.0


class Progress:
    """The file of one run: what the learner learned, and what was measured meanwhile.

    Args:
        path: of the file; None keeps none.
        state: at the start, and from then on.
    """

    def __init__(self, path: Path | None, state: State) -> None:
        self.path, self.state = path, state
        self._begun = self._counted = time.perf_counter()

    def resume(self, reader: StreamModel) -> None:
        """Put the reader and `state` where the file was written, if there is one and the reader learns.

        Raises:
            MemoryFileError: a damaged file.
            ValueError: one of another model or method, which only a changed program can leave under this name.
        """
        if self.path is None or reader.learner is None or not self.path.exists():
            return
        memory = Memory.load(self.path)
        saved, losses = memory.settings.pop(NAME), memory.tensors.pop(NAME)
        reader.learner.load(memory)
        self.state = State(losses=losses, **saved)
        print(f"going on from {self.path}, {memory.tokens} tokens", flush=True)

    def read(self, reader: StreamModel, ids: Tensor) -> Tensor:
        """Losses of a text, NaN for its first token, from where the file was written on."""
        self._begun = time.perf_counter()
        start = len(self.state.losses)
        rest = reader.read(ids, start=start, on_step=lambda losses: self._step(reader, losses))
        self.state.reading += time.perf_counter() - self._begun
        losses = rest if reader.learner is None else self.state.losses
        self.state.losses = torch.empty(0)
        return losses

    def _step(self, reader: StreamModel, losses: Tensor) -> None:
        """A part of a text was read; write the file if it is time."""
        now = time.perf_counter()
        self.state.reading += now - self._begun
        self.state.losses = torch.cat((self.state.losses, losses))
        if self.path is not None and now - self._counted >= SECONDS:
            self._save(reader, self.path)
        self._begun = time.perf_counter()

    def _save(self, reader: StreamModel, path: Path) -> None:
        assert reader.learner is not None
        self._count()
        memory = reader.learner.memory()
        own = dict(vars(self.state))
        memory.tensors[NAME] = own.pop("losses")
        memory.settings[NAME] = own
        path.parent.mkdir(parents=True, exist_ok=True)
        memory.save(path)

    def _count(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._counted
        self._counted = now

    def close(self) -> float:
        """The run is finished; the seconds it took."""
        self._count()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        return self.state.seconds
