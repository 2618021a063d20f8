"""The model of a run, from its preset and its tokenizer."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, assert_never

from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.errors import UserError
from nestling.layers.attention import AttentionConfig
from nestling.layers.continuum_config import ContinuumConfig
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2Config
from nestling.layers.memory_caching_config import MemoryCachingConfig
from nestling.layers.neural_memory_config import NeuralMemoryConfig
from nestling.layers.rwkv7 import RWKV7Config
from nestling.layers.self_modifying import SelfModifyingConfig
from nestling.layers.ttt_config import TTTConfig
from nestling.levels.assignment import steps_of
from nestling.models.configuration import MixerConfig
from nestling.models.pretrained import load_pretrained
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


def with_own_levels(config: TrainConfig, processes: int) -> TrainConfig:
    """The settings of a run, with the levels of the model it begins with where the run names none itself.

    Raises:
        UserError: there is no nestling model in `init`, or it has a period that is shorter than an optimizer step.
    """
    if config.init is None:
        return config
    try:
        found = AutoConfig.from_pretrained(config.init, local_files_only=True)
    except Exception as error:  # as many kinds as there are ways to damage a file
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"no model to begin with in {config.init} ({reason}); give one of nestling convert") from error
    if not isinstance(found, NestlingConfig):
        raise UserError(
            f"{config.init} holds a {found.model_type} model, not a nestling one; make it one with nestling convert"
        )
    if config.levels or not found.levels:
        return config
    steps = steps_of(found.levels, config.tokens_per_step(processes))
    return replace(config, levels=",".join(f"{level}={period}" for level, period in steps.items()))


def build_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None = None
) -> NestlingForCausalLM:
    """The model a run begins with: that of `init`, or one with fresh weights drawn from the run's seed.

    Args:
        config: of the run.
        tokenizer: of the run.
        checkpoint: of a run that is resumed, which is read in place of `init` or of the preset, whose defaults may
            have changed since.

    Raises:
        UserError: a preset, size or override that does not exist or does not fit, an `init` that cannot be loaded, or
            carried state where it would grow without bound.
    """
    if config.init is None:
        model = _fresh(config, tokenizer, checkpoint)
    else:
        model = _initial(checkpoint or config.init, tokenizer)
    if config.carry_state and config.carry_tokens is None and state_grows(model.config):
        whose = f"preset {config.preset}" if config.init is None else config.init
        why, instead = "every token it reads (attention without a window)", ", or --set window=N"
        if any(block["mixer"]["kind"] == "memory_caching" for block in model.config.blocks):
            why, instead = "every segment it reads (kept memories)", ""
        raise UserError(
            f"the state of {whose} grows with {why}, so --carry-state needs --carry-tokens N"
            f"{instead if config.init is None else ''}"
        )
    if model.config.vocab_size > LARGE_VOCABULARY:
        model.config.loss_chunk_size = LOSS_CHUNK
    return model


def _fresh(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None) -> NestlingForCausalLM:
    check_preset(config.preset, config.size, config.overrides)
    if checkpoint is not None:
        model_config = _saved_config(checkpoint)
        set_seed(config.seed)
        return NestlingForCausalLM(model_config)
    try:
        model_config = presets.PRESETS[config.preset](size=config.size, vocab_size=len(tokenizer), **config.overrides)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(model_config, name, getattr(tokenizer, name))
        set_seed(config.seed)
        return NestlingForCausalLM(model_config)
    except (ValueError, TypeError) as error:
        raise UserError(f"preset {config.preset} at size {config.size}: {error}") from error


def _saved_config(checkpoint: str) -> NestlingConfig:
    try:
        found = NestlingConfig.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"no settings of a model in {checkpoint} ({reason}); restore its config.json") from error
    assert isinstance(found, NestlingConfig)
    return found


def _initial(directory: str, tokenizer: PreTrainedTokenizerBase) -> NestlingForCausalLM:
    model, _ = load_pretrained(directory)
    assert isinstance(model, NestlingForCausalLM)  # `with_own_levels` refuses others
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {len(tokenizer):,} tokens and the model {model.config.vocab_size:,}; "
            "restore the files that belong together"
        )
    return model


def untrained_levels(config: NestlingConfig, length: int, carry: bool) -> dict[int, int]:
    """Periods in tokens, by index, of the continuum's levels that no training window updates and then reads.

    Their rate and their target get no gradient, and what they would write later is a random function of the text.

    Args:
        config: of the model.
        length: tokens of a window.
        carry: whether a window begins with the state of the one before, through which no gradient passes.
    """
    channels = [config.channel_config(index) for index in range(len(config.blocks))]
    levels = {
        i: p for c in channels if isinstance(c, ContinuumConfig) for i, p in enumerate(c.periods) if p is not None
    }
    return {i: p for i, p in levels.items() if p >= length and not (carry and p % length)}


def say_untrained(config: NestlingConfig, length: int, carry: bool) -> str | None:
    """One sentence about `untrained_levels`, where there are any."""
    found = untrained_levels(config, length, carry)
    if not found:
        return None
    are, write = ("are", "they write") if len(found) > 1 else ("is", "it writes")
    who = " and ".join(f"level {i} (period {p:,})" for i, p in found.items())
    return (
        f"{who} of the continuum {are} never updated and read again within {length:,} tokens, so nothing trains what "
        f"{write}; give shorter periods (--set 'periods=[...]') or a longer --sequence-length"
    )


def state_grows(config: NestlingConfig) -> bool:
    """Whether some layer keeps every token it has read, or a memory of every segment."""
    return any(_grows(config.mixer_config(index)) for index in range(len(config.blocks)))


def _grows(mixer: MixerConfig) -> bool:
    match mixer:
        case AttentionConfig():
            return mixer.window is None
        case MemoryCachingConfig():
            return True
        # Fast weights, and attention in a segment or a window beside them (Titans, all of them neural memories).
        case SelfModifyingConfig() | NeuralMemoryConfig() | TTTConfig():
            return False
        case LinearMemoryConfig() | RWKV7Config() | Mamba2Config():
            return False
        case _:
            assert_never(mixer)
