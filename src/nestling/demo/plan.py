"""How long the demo will take here, and how many tokens fit."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from nestling import NestlingForCausalLM, presets
from nestling.demo.settings import MODELS, DemoSettings
from nestling.training.config import TrainConfig

PROBES = 4
FEWEST_TOKENS = 100_000  # with less training the models know nothing worth showing
FIXED_SECONDS = 45.0  # imports, data, saving, the new process, the page
SAFETY = 1.15  # machines get slower when they get warm
READS = 5  # passes over the text: two by each model, and the short ones of the new process
READ_SHARE = 0.5  # seconds a token of reading, over those of training on it


@dataclass(frozen=True)
class Plan:
    """What fits.

    Attributes:
        tokens: budget of each model, a multiple of a step's tokens.
        seconds: estimate of the whole demo.
        rates: measured training speed of every model, tokens/s.
        parameters: of every model.
    """

    tokens: int
    seconds: float
    rates: dict[str, float]
    parameters: dict[str, int]


def make_plan(settings: DemoSettings) -> Plan:
    """Train every model for a few steps on noise, and fit the token budget into the time.

    On a machine so slow that hardly anything would fit, the demo takes longer than it should, and the estimate says so.
    """
    rates, parameters = {}, {}
    for name in MODELS:
        config = training_config(settings, name, settings.tokens)
        model = NestlingForCausalLM(presets.PRESETS[name](size=settings.size, **config.overrides))
        parameters[name] = model.num_parameters()
        rates[name] = _training_rate(model, settings)
    each = sum(1 / rate for rate in rates.values())  # seconds to train every model on one token
    reading = READS * READ_SHARE * (settings.read + settings.continuation) / min(rates.values())
    budget = (60 * settings.minutes - FIXED_SECONDS - reading) / (SAFETY * each)
    steps = max(1, int(min(settings.tokens, max(budget, FEWEST_TOKENS))) // settings.tokens_per_step)
    tokens = steps * settings.tokens_per_step
    return Plan(tokens, FIXED_SECONDS + reading + SAFETY * each * tokens, rates, parameters)


def training_config(settings: DemoSettings, name: str, tokens: int) -> TrainConfig:
    """The same run for every model: same tokens in the same order, state carried from step to step.

    Attention gets a window of one training sequence, so that its state, too, is carried and stays bounded.
    """
    steps = tokens // settings.tokens_per_step
    return TrainConfig(
        out=str(settings.model_dir(name)),
        preset=name,
        size=settings.size,
        overrides={"window": settings.sequence_length} if name == "transformer" else {},
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
        tokens=tokens,
        carry_state=True,
        carry_tokens=settings.carry_tokens,
        seed=settings.seed,
        log_every=max(1, steps // 24),
        eval_every=max(1, steps // 3),
        save_every=max(1, steps),
        eval_tokens=settings.validate,
        tensorboard=False,
        sample_tokens=settings.sample,
        sample_prompt="The ",
    )


def _training_rate(model: NestlingForCausalLM, settings: DemoSettings) -> float:
    """Tokens per second of forward and backward; the first step, which allocates, does not count."""
    ids = torch.randint(0, 256, (settings.batch_size, settings.sequence_length))
    seconds = []
    for _ in range(PROBES):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return ids.numel() / statistics.median(seconds[1:])
