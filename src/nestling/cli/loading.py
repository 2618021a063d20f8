"""Models, memories and states, as the commands are given them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import NestlingForCausalLM
from nestling.cli.states import hint
from nestling.continual.store.memory_file import is_memory_file
from nestling.continual.store.store import load_memory
from nestling.continual.stream.tokenizing import own_beginning
from nestling.errors import UserError
from nestling.memory.state import StateFileError
from nestling.models.cache import ModelState
from nestling.models.pretrained import load_pretrained
from nestling.tasks.text import Document
from nestling.training.config import CONFIG_FILE, read_run
from nestling.training.tokenization import encode_document, encode_text, load_tokenizer, start_token

M = TypeVar("M", bound=PreTrainedModel)


def begin(model: PreTrainedModel, state: ModelState | None, loops: int | None) -> ModelState | None:
    """What to read on from: the state, or the beginning of blocks that run `loops` times; None for the model's own.

    Raises:
        UserError: a model that is not nestling's, or a state that other loops made.
    """
    if loops is None:
        return state
    if not isinstance(model, NestlingForCausalLM):
        raise UserError(f"--loops: the blocks of a {type(model).__name__} run once; leave it out")
    if state is not None and state.loops != loops:
        raise UserError(f"--loops {loops}: the state was made with {state.loops}, and goes on so; leave --loops out")
    return model.init_state(1, loops=loops) if state is None else state


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
    model, _ = load_pretrained(path)
    if not isinstance(model, NestlingForCausalLM):
        raise UserError(f"{directory} holds a {type(model).__name__}, not a nestling model")
    return _placed(model), load_tokenizer(path)


def load_causal_lm(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal language model and its tokenizer, ready to read; on a GPU where there is one.

    Args:
        source: the directory of a run, any Hugging Face directory, a GGUF file or a hub id.

    Raises:
        UserError: nothing there, an unfinished run, or a damaged model.
    """
    path = Path(source)
    if (path / CONFIG_FILE).exists():
        return load_model(path)
    model, tokenizer = load_pretrained(source)
    return _placed(model), tokenizer


def _placed(model: M) -> M:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it and loses the signature
    return model


def load_saved(model: PreTrainedModel, memory: Sequence[Path], state: Path | None) -> ModelState | None:
    """Put what was learned into the model, and return the state to read on from.

    The memory goes first: a state belongs to the weights it was read with.

    Args:
        model: changed in place by a memory.
        memory: a memory of `nestling learn` (a directory of snapshots, or one file) or none. A state among them, which
            0.1 took here, counts as `state`, with a hint.
        state: a file of `nestling read` or `generate`, or None.

    Returns:
        the state; None where none was given.

    Raises:
        UserError: two of a kind, a missing or damaged file, a memory of another model, or a state of several rows.
    """
    for file in memory:
        if not file.exists():
            raise UserError(f"no memory at {file}; check the path")
    learned = [file for file in memory if _is_memory(file)]
    states = [file for file in memory if file not in learned]
    for file in states:
        hint(f"{file} is a state: give it with --state; --memory takes states until the next version")
    states += [] if state is None else [state]
    if len(learned) > 1:
        raise UserError(
            f"two memories, {learned[0]} and {learned[1]}: a model takes one; make one of them with nestling memory "
            "merge"
        )
    if len(states) > 1:
        raise UserError(f"two states, {states[0]} and {states[1]}: a model goes on from one; give one")
    for file in learned:
        load_memory(file).apply(model, keep_originals=False)
    return _load_state(states[0], model) if states else None


def _is_memory(file: Path) -> bool:
    return file.is_dir() or is_memory_file(file)


def _load_state(file: Path, model: PreTrainedModel) -> ModelState:
    if file.exists() and _is_memory(file):
        raise UserError(f"{file} is a memory of nestling learn and no state; give it with --memory")
    if not isinstance(model, NestlingForCausalLM):
        raise UserError(
            f"a {type(model).__name__} takes no state ({file}); nestling learn writes memories that it can use"
        )
    try:
        state = ModelState.load(file, model)
    except FileNotFoundError as error:
        raise UserError(f"no state at {file}; write one with nestling read DIR PATH --save-state {file}") from error
    except StateFileError as error:
        raise UserError(str(error)) from error
    if state.batch_size != 1:
        raise UserError(f"{file} holds {state.batch_size} rows; save one of them with state.select([row]).save(...)")
    return state.to(model.device)


def save_state(state: ModelState, file: Path, model: NestlingForCausalLM) -> None:
    """Write a state; an earlier file survives a failure.

    Raises:
        UserError: the disk is full or not writable, or the state holds NaN.
    """
    try:
        state.save(file, model)
    except Exception as error:  # safetensors reports a full disk with an error of its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the state was not written to {file} ({reason}); an earlier file there is intact") from error


def reading_tokens(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], continuing: bool) -> np.ndarray:
    """Documents as one text to read: parted as in training, left open at the end so that reading can go on.

    Args:
        tokenizer: the model's.
        documents: in order.
        continuing: a state was given, so the first document goes on from it and has no beginning token.
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


def document_tokens(
    source: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> Int[Tensor, " n"]:
    """A document as the model has seen documents: as in the run that trained it here, else as its tokenizer begins a
    text; int64.

    Raises:
        UserError: a token that the model has no embedding for.
    """
    if (Path(source) / CONFIG_FILE).exists():
        ids = encode_document(tokenizer, text)
    else:
        ids = np.concatenate([own_beginning(tokenizer), encode_text(tokenizer, text)])
    check_tokens(source, model, ids)
    return torch.from_numpy(ids.astype(np.int64))


def prompt_tokens(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, prompt: str, *, continuing: bool, chat: bool
) -> list[int]:
    """A prompt to continue.

    Args:
        source: the model's.
        tokenizer: the model's.
        prompt: the text; with `chat` what the user says.
        continuing: a state was given, so the prompt goes on from it and has no beginning token.
        chat: put it in the tokenizer's chat template, for an answer to follow.

    Raises:
        UserError: a tokenizer without a chat template, or one that fails, or nothing to begin an empty prompt with.
    """
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {source} has no chat template; leave out --chat")
        turn = [{"role": "user", "content": prompt}]
        try:
            ids: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates are programs of their own
            raise UserError(f"the chat template of {source} failed: {str(error)[:200]}; leave out --chat") from error
        return [int(i) for i in ids]
    if (Path(source) / CONFIG_FILE).exists() or continuing:
        return [int(i) for i in reading_tokens(tokenizer, [Document("prompt", prompt)], continuing)]
    found = [*own_beginning(tokenizer), *map(int, encode_text(tokenizer, prompt))]
    if not found and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {source} has no beginning and no end token to begin with; give a --prompt")
    return found or [start_token(tokenizer)]


def check_tokens(source: str | Path, model: PreTrainedModel, ids: Sequence[int] | np.ndarray | Tensor) -> None:
    """Refuse tokens that the model has no embedding for: somebody added them to its tokenizer alone.

    Raises:
        UserError: naming the first.
    """
    rows = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    found = np.asarray(ids)
    if len(beyond := found[found >= rows]):
        raise UserError(
            f"token {int(beyond[0])} of the text is beyond the {rows:,} embeddings of {source}: its tokenizer has "
            "tokens that the model was never resized for; use model.resize_token_embeddings and save it"
        )


def trained_length(directory: str | Path) -> int:
    """Sequence length a model was trained at; 256 where the directory does not say."""
    if not (Path(directory) / CONFIG_FILE).exists():
        return 256
    return read_run(directory)[0].sequence_length
