"""Continuing a text token by token, with the state after every token at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestling.memory.state import State


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
    stop_token: int | None = None,
    never: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[int], Any]:
    """Read a prompt and continue it.

    `model.generate` does the same and more (beams, batches); this loop also reads the last token it wrote, so that the
    state it returns has seen the prompt and all of the continuation.

    Args:
        model: called as `model(input_ids, past_key_values=..., use_cache=True, logits_to_keep=1)`.
        prompt: tokens to read first; at least one.
        max_new_tokens: tokens to write at most.
        state: a state of one row to continue from; None is the model's initial state.
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that holds this probability; 1 from all.
        seed: of the sampling. The global generators are not touched.
        stop_token: end when this token comes up. It is neither returned nor read.
        never: tokens that are not sampled (padding, for one).
        on_token: called with each token as it is chosen.

    Returns:
        the new tokens, and the state after the last of them.

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
    try:
        ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
        for step in range(max_new_tokens + 1):
            out = model(input_ids=ids, past_key_values=state, use_cache=True, logits_to_keep=1)
            state = out.past_key_values
            if step == max_new_tokens:
                break
            token = _choose(out.logits[:, -1].float().cpu(), temperature, top_p, generator, never)
            if token == stop_token:
                break
            written.append(token)
            if on_token is not None:
                on_token(token)
            ids = torch.tensor([[token]], dtype=torch.long, device=device)
    finally:
        model.train(was_training)
    return written, state.detach() if isinstance(state, State) else state


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator, never: Sequence[int]) -> int:
    logits[:, list(never)] = -torch.inf
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits[0] / temperature).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
