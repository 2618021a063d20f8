"""Carried states beside a checkpoint: a file for each process, read again by any number of them."""

from __future__ import annotations

from pathlib import Path

import torch

from nestling.models.cache import ModelState
from nestling.models.causal_lm import NestlingForCausalLM
from nestling.training.layout import Layout

PATTERN = "carried_state_*.safetensors"


def save_carried(directory: Path, state: ModelState, model: NestlingForCausalLM, process: int) -> None:
    """Write the rows of this process."""
    state.save(_file(directory, process), model)


def load_carried(directory: Path, model: NestlingForCausalLM, layout: Layout) -> ModelState:
    """The rows of this process, from the files of as many processes as had written them.

    Raises:
        StateFileError: a file is damaged, or of another model.
    """
    writers = len(list(directory.glob(PATTERN)))
    if writers == layout.processes:
        return ModelState.load(_file(directory, layout.process), model)
    size = layout.streams // writers
    rows = range(layout.process * layout.batch_size, (layout.process + 1) * layout.batch_size)
    files = range(rows[0] // size, rows[-1] // size + 1)
    states = [ModelState.load(_file(directory, file), model) for file in files]
    return joined(states).select([row - files[0] * size for row in rows])


def joined(states: list[ModelState]) -> ModelState:
    """The rows of all the states, in order, as one state."""
    parts = zip(*([tensor for _, tensor in state.tensors()] for state in states), strict=True)
    return states[0].map(lambda _: torch.cat(next(parts)))


def _file(directory: Path, process: int) -> Path:
    return directory / f"carried_state_{process}.safetensors"
