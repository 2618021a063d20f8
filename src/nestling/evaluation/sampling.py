"""Continuing a text token by token, with the state after every token at hand; where a text ends, and how it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.memory.state import State

MARK = "0123456789"
"""An answer that no chat template has by itself, and that none trims."""


@torch.no_grad()
def continue_text(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    state: Any = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
    never: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[int], Any]:
    """Read a prompt and continue it.

    `model.generate` does the same and more (beams, batches); this loop also reads the last token it wrote, so that the
    state it returns has seen the prompt and all of the continuation.

    Args:
        model: any causal language model of transformers. One that returns no `past_key_values` (Mamba) reads the whole
            text again for every token.
        prompt: tokens to read first; at least one.
        max_new_tokens: tokens to write at most.
        state: a state of one row to continue from; None is the model's initial state.
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that holds this probability; 1 from all.
        seed: of the sampling. The global generators are not touched.
        stop: end when one of these tokens comes up, see `end_tokens`. It is neither returned nor read.
        never: tokens that are not sampled (padding, for one).
        on_token: called with each token as it is chosen.

    Returns:
        the new tokens, and the state after the last of them; None of a model that returns none.

    Raises:
        ValueError: an empty prompt, a negative temperature, or a top_p outside (0, 1].
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; begin with the bos token to start from nothing")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    written: list[int] = []
    unread = list(prompt)
    try:
        for step in range(max_new_tokens + 1):
            logits, state = _read(model, torch.tensor([unread], dtype=torch.long, device=device), state)
            if step == max_new_tokens:
                break
            token = _choose(logits.float().cpu(), temperature, top_p, generator, never)
            if token in stop:
                break
            written.append(token)
            if on_token is not None:
                on_token(token)
            unread = [*prompt, *written] if state is None else [token]
    finally:
        model.train(was_training)
    return written, state.detach() if isinstance(state, State) else state


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, all of the model's generation settings, and the chat template's end of a
    turn.

    Models that answer write the last one themselves, and their generation settings do not always name it.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named]), end_of_turn(tokenizer)}
    return frozenset(int(i) for i in ends if i is not None)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer; None without a template or such a token."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # templates are programs of their own; this one takes no such conversation
        return None
    _, found, after = text.rpartition(MARK)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    for token in tokenizer(after, add_special_tokens=False).input_ids if found else []:
        if token in special:
            return int(token)
        if str(tokenizer.decode([token])).strip():  # the template goes on with words
            return None
    return None


class Continuation:
    """The text of tokens that are written one by one, as it reads after its prompt.

    Decoders look at neighbours: SentencePiece's take the space from the first word they see, and a character may be
    several tokens. So new tokens are decoded behind the ones before them, and nothing is told of a character before it
    is whole.

    Args:
        tokenizer: the model's.
        prompt: tokens that the text goes on from; none where it stands by itself, as an answer does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._before, self._new = list(prompt), list[int]()
        self._told = self._decode(self._before)

    def add(self, token: int) -> str:
        """What can be told now that this token is there; empty while a character is not whole."""
        self._new.append(token)
        text = self._decode(self._before + self._new)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(self._told):
            return ""
        new = text[len(self._told) :]
        self._before, self._new = self._new, []
        self._told = self._decode(self._before)
        return new

    def rest(self) -> str:
        """What has not been told yet, whole or not."""
        return self._decode(self._before + self._new)[len(self._told) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


def decode_continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text of `written` as it reads after `prompt`; see `Continuation`."""
    text = Continuation(tokenizer, prompt)
    return "".join([*map(text.add, written), text.rest()])


def _read(model: nn.Module, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Logits `[1, vocab]` after the last token, and the state if the model has one."""
    wanted = {"past_key_values": state, "use_cache": True, "logits_to_keep": 1}
    taken = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    out = model(input_ids=ids, **{k: v for k, v in wanted.items() if anything or k in taken})
    return out.logits[:, -1], getattr(out, "past_key_values", None)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator, never: Sequence[int]) -> int:
    logits[:, list(never)] = -torch.inf
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits[0] / temperature).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
