"""What a forward pass is given, looked at before it is used."""

from __future__ import annotations

from torch import Tensor

from nestling.models.cache import ModelState


def check_tokens(tokens: Tensor, vocab_size: int, name: str) -> None:
    """Refuse numbers outside the vocabulary, for tensors on the CPU; a GPU would have to wait."""
    if tokens.device.type == "cpu":
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.numel():
            raise ValueError(
                f"{name} {int(outside[0])} is outside the vocabulary of {vocab_size}; a tokenizer with more tokens "
                "needs model.resize_token_embeddings(len(tokenizer))"
            )


def check_state_kind(state: object) -> ModelState | None:
    """The state that a call goes on from; refuse the caches of other models."""
    if state is not None and not isinstance(state, ModelState):
        raise ValueError(
            f"past_key_values is a {type(state).__name__}; this model goes on from a ModelState only, which a call "
            "with use_cache=True returns as past_key_values"
        )
    return state
