"""Which tokens a training step sees, as a function of the seed and the step alone.

Rows are numbered in the order a run consumes them, whatever processes share them: accelerate deals batches out to the
processes in turn. A resumed run asks for row i and gets what the uninterrupted run would have got; nothing has to be
replayed.

Every row is a dictionary of `input_ids` `[L]`, `targets` `[L]` (the same tokens one later, so no target is lost at a
row's end) and `fresh`, whether a carried state starts anew here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from nestling.errors import UserError

Row = dict[str, Tensor]


class ShuffledRows(Dataset[Row]):
    """Windows of the corpus in a new random order each epoch.

    An epoch's windows do not overlap; their common offset into the corpus is drawn anew each epoch.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, total: int, seed: int) -> None:
        """Args: the corpus `[tokens]`; row length L; rows the run will consume; seed of the order."""
        self.tokens, self.length, self.total, self.seed = tokens, sequence_length, total, seed
        self.windows = (len(tokens) - 1) // sequence_length
        if self.windows < 1:
            raise too_short(len(tokens), sequence_length + 1, "one sequence")
        self._order: tuple[int, int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.total:
            raise IndexError(f"row {index} of {self.total}")
        epoch, place = divmod(index, self.windows)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            slack = (len(self.tokens) - 1) - self.windows * self.length
            self._order = (epoch, int(generator.integers(slack + 1)), generator.permutation(self.windows))
        _, offset, order = self._order
        return cut_row(self.tokens, offset + int(order[place]) * self.length, self.length, fresh=True)


class ContiguousRows(Dataset[Row]):
    """Row i reads on in stream i % `streams`, a contiguous part of the corpus, L tokens at a time; for carried state.

    When the streams end, a new epoch deals the parts to the rows anew and every state starts fresh.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        streams: int,
        total: int,
        seed: int,
        carry_tokens: int | None = None,
    ) -> None:
        """Args: as `ShuffledRows`; rows side by side, over all processes; tokens after which states are reset, a
        multiple of L, or None."""
        self.tokens, self.length, self.total, self.seed = tokens, sequence_length, total, seed
        self.streams = streams
        self.micro_steps = (len(tokens) - 1) // (self.streams * sequence_length)
        if self.micro_steps < 1:
            raise too_short(
                len(tokens), self.streams * sequence_length + 1, f"one sequence for each of {self.streams} rows"
            )
        self.carry_steps = None if carry_tokens is None else carry_tokens // sequence_length

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.total:
            raise IndexError(f"row {index} of {self.total}")
        turn, stream = divmod(index, self.streams)
        epoch, place = divmod(turn, self.micro_steps)
        generator = np.random.default_rng([self.seed, epoch])
        slack = (len(self.tokens) - 1) - self.streams * self.micro_steps * self.length
        offset = int(generator.integers(slack + 1))
        part = int(generator.permutation(self.streams)[stream])
        start = offset + (part * self.micro_steps + place) * self.length
        fresh = place == 0 or (self.carry_steps is not None and place % self.carry_steps == 0)
        return cut_row(self.tokens, start, self.length, fresh)


class StreamedRows(IterableDataset[Row]):
    """Rows of a streamed set: row r of the batch takes whole documents in turn and reads them without a gap.

    The position (in the stream, and what each row has left of its documents) is kept for the last few micro-batches,
    so that a checkpoint can name the one it belongs to although the loader reads ahead.
    """

    def __init__(
        self,
        stream: Any,
        encode: Callable[[dict[str, Any]], np.ndarray],
        skip: int,
        sequence_length: int,
        rows: int,
        carry_tokens: int | None = None,
        memory: int = 64,
    ) -> None:
        """Set up, reading nothing yet.

        Args:
            stream: an iterable of examples with `state_dict` and `load_state_dict` (`datasets.IterableDataset`).
            encode: the tokens of one example.
            skip: examples at the beginning that are held out for validation.
            sequence_length: L.
            rows: batch rows over all processes.
            carry_tokens: tokens after which carried states are reset, a multiple of L, or None.
            memory: micro-batches whose position is kept.
        """
        self.stream, self.encode, self.skip = stream, encode, skip
        self.length, self.rows, self.memory = sequence_length, rows, memory
        self.carry_steps = None if carry_tokens is None else carry_tokens // sequence_length
        self.micro = 0
        self.buffers = [np.zeros(0, dtype=np.int32) for _ in range(rows)]
        self._inside = False  # whether the stream was left in the middle, by load_state_dict
        self._history: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Row]:
        examples = self._examples()
        while True:
            fresh = self.micro == 0 or (self.carry_steps is not None and self.micro % self.carry_steps == 0)
            for row in range(self.rows):
                while len(self.buffers[row]) < self.length + 1:
                    self.buffers[row] = np.concatenate([self.buffers[row], self.encode(next(examples))])
            self.micro += 1
            batch = [cut_row(buffer, 0, self.length, fresh) for buffer in self.buffers]
            self.buffers = [buffer[self.length :] for buffer in self.buffers]
            position = copy.deepcopy(self.stream.state_dict())
            self._history[self.micro] = {"stream": position, "buffers": list(self.buffers)}
            self._history.pop(self.micro - self.memory, None)
            yield from batch

    def state_dict(self, micro: int) -> dict[str, Any]:
        """The position after `micro` micro-batches, as JSON values."""
        if micro not in self._history:
            raise KeyError(f"the position after micro-batch {micro} is no longer kept ({self.memory} are)")
        kept = self._history[micro]
        return {"micro": micro, "stream": kept["stream"], "buffers": [b.tolist() for b in kept["buffers"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` gave."""
        self.micro = state["micro"]
        self.buffers = [np.asarray(buffer, dtype=np.int32) for buffer in state["buffers"]]
        self.stream.load_state_dict(state["stream"])
        self._inside = True

    def _examples(self) -> Iterator[dict[str, Any]]:
        while True:
            found = False
            for place, example in enumerate(self.stream):
                if self._inside or place >= self.skip:
                    found = True
                    yield example
            if not found and not self._inside:
                raise UserError("the streamed set ends inside its validation part; lower --eval-tokens or give --valid")
            self._inside = False


def cut_row(tokens: np.ndarray, start: int, length: int, fresh: bool) -> Row:
    """The row of `length` inputs that begins at `start`, with the next tokens as targets."""
    window = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
    return {"input_ids": window[:-1], "targets": window[1:], "fresh": torch.tensor(fresh)}


def collate(rows: list[Row]) -> Row:
    """Stack rows to a batch: `input_ids` and `targets` `[B, L]`, `fresh` `[B]`."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def too_short(tokens: int, needed: int, what: str) -> UserError:
    """The error for a corpus that does not fill a row."""
    return UserError(
        f"the training text has {tokens} tokens, shorter than {what} ({needed} tokens); give more text with --data, or "
        "lower --sequence-length or --batch-size"
    )
