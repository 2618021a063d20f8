"""The model of a run, from its preset and its tokenizer."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.errors import UserError
from nestling.training.config import TrainConfig

LARGE_VOCABULARY = 8192
LOSS_CHUNK = 2048
"""Tokens whose logits exist at once while training with a large vocabulary, where all of them would fill the memory."""


def check_preset(preset: str, size: str, overrides: dict[str, Any]) -> None:
    """Refuse names that do not exist, before any data is read.

    Raises:
        UserError: unknown preset, size or override; the message lists the known ones.
    """
    if preset not in presets.PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of: {', '.join(presets.PRESETS)}")
    if size not in presets.SIZES:
        raise UserError(f"unknown size {size!r}; choose one of: {', '.join(presets.SIZES)}")
    if "vocab_size" in overrides:
        raise UserError("vocab_size follows the tokenizer and cannot be set; choose another --tokenizer")
    known = set(inspect.signature(presets.PRESETS[preset]).parameters) - {"size", "vocab_size"}
    if unknown := sorted(set(overrides) - known):
        raise UserError(
            f"preset {preset} has no setting {', '.join(unknown)}; its settings: {', '.join(sorted(known))}"
        )


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> NestlingForCausalLM:
    """A model with fresh weights drawn from the run's seed.

    Raises:
        UserError: a preset, size or override that does not exist or does not fit, or carried state where it would grow
            without bound.
    """
    check_preset(config.preset, config.size, config.overrides)
    try:
        model_config = presets.PRESETS[config.preset](size=config.size, vocab_size=len(tokenizer), **config.overrides)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(model_config, name, getattr(tokenizer, name))
        if len(tokenizer) > LARGE_VOCABULARY:
            model_config.loss_chunk_size = LOSS_CHUNK
        set_seed(config.seed)
        model = NestlingForCausalLM(model_config)
    except (ValueError, TypeError) as error:
        raise UserError(f"preset {config.preset} at size {config.size}: {error}") from error
    if config.carry_state and config.carry_tokens is None and state_grows(model_config):
        raise UserError(
            f"the state of preset {config.preset} grows with every token it reads (attention without a window), so "
            "--carry-state needs --carry-tokens N, or --set window=N"
        )
    return model


def state_grows(config: NestlingConfig) -> bool:
    """Whether some layer keeps every token it has read."""
    mixers = [block["mixer"] for block in config.blocks]
    return any(mixer["kind"] == "attention" and mixer.get("window") is None for mixer in mixers)
