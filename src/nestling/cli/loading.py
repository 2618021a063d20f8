"""Models and memories, as the commands are given them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from nestling import NestlingForCausalLM
from nestling.errors import UserError
from nestling.memory.state import StateFileError
from nestling.models.cache import ModelState
from nestling.tasks.text import Document
from nestling.training.config import CONFIG_FILE, read_run
from nestling.training.tokenization import encode_text, load_tokenizer, start_token


def load_model(directory: str | Path) -> tuple[NestlingForCausalLM, PreTrainedTokenizerBase]:
    """The model of a run and its tokenizer, ready to read; on a GPU where there is one.

    Raises:
        UserError: no such directory, an unfinished run, a damaged model, or one that is not nestling's.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"no directory {directory}; give the --out directory of a finished nestling train")
    if not (path / "config.json").exists():
        if (path / CONFIG_FILE).exists():
            raise UserError(
                f"the run in {directory} is not finished; finish it with nestling train --out {directory} --resume, or "
                "give one of its checkpoint directories"
            )
        raise UserError(f"{directory} holds no model (no config.json); give the --out directory of nestling train")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path))
    except Exception as error:  # damaged files fail in every layer of the libraries underneath
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the model in {directory} cannot be loaded ({reason}); train it again or restore it"
        ) from error
    if not isinstance(model, NestlingForCausalLM):
        raise UserError(f"{directory} holds a {type(model).__name__}, not a nestling model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[call-arg, arg-type]  # transformers wraps it and loses the signature
    return model.eval(), load_tokenizer(path)


def load_memory(file: Path | None, model: NestlingForCausalLM) -> ModelState | None:
    """The memory in a file, for this model; None for no file.

    Raises:
        UserError: a missing or damaged file, a memory of another model, or one of several rows.
    """
    if file is None:
        return None
    try:
        state = ModelState.load(file, model)
    except FileNotFoundError as error:
        raise UserError(f"no memory file {file}; write one with nestling read DIR PATH --save-memory {file}") from error
    except StateFileError as error:
        raise UserError(str(error)) from error
    if state.batch_size != 1:
        raise UserError(f"{file} holds {state.batch_size} rows; save one of them with state.select([row]).save(...)")
    return state.to(model.device)


def check_memory_target(file: Path | None) -> None:
    """Refuse a place a memory cannot be written to, before any work is done.

    Raises:
        UserError: the directory does not exist, or the name is a directory's.
    """
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--save-memory {file}: there is no directory {file.parent}; make it first")
    if file is not None and file.is_dir():
        raise UserError(f"--save-memory {file} is a directory; give a file name")


def save_memory(state: ModelState, file: Path, model: NestlingForCausalLM) -> None:
    """Write a memory; an earlier file survives a failure.

    Raises:
        UserError: the disk is full or not writable, or the state holds NaN.
    """
    try:
        state.save(file, model)
    except Exception as error:  # safetensors reports a full disk with an error of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the memory was not written to {file} ({reason}); an earlier file there is intact") from error


def reading_tokens(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], continuing: bool) -> np.ndarray:
    """Documents as one text to read: parted as in training, left open at the end so that reading can go on.

    Args:
        tokenizer: the model's.
        documents: in order.
        continuing: a memory was given, so the first document goes on from it and has no beginning token.
    """
    first = start_token(tokenizer)
    parts: list[Any] = []
    for place, document in enumerate(documents):
        if place:
            parts.append([t for t in (tokenizer.eos_token_id,) if t is not None and t != first])
        if place or not continuing:
            parts.append([first])
        parts.append(encode_text(tokenizer, document.text))
    return np.concatenate(parts).astype(np.int32)


def trained_length(directory: str | Path) -> int:
    """Sequence length a model was trained at; 256 where the directory does not say."""
    if not (Path(directory) / CONFIG_FILE).exists():
        return 256
    return read_run(directory)[0].sequence_length
