"""How much a model reads in the time of another, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nestling import NestlingForCausalLM, optim, presets
from reproductions.harness.rows import Row
from reproductions.small_lm import training

VOCABULARY = 259  # of the byte tokenizer


def shares(names: Sequence[str], reference: str, shape: dict[str, Any], rounds: int) -> dict[str, Row]:
    """Of every preset the median milliseconds of a training step, and how many of its steps fit into one of the
    reference's (`share`, 1 for the reference itself): the median ratio of two steps that followed each other.

    A machine that is busy with other work slows both alike. The presets take turns.

    Args:
        names: of presets.
        reference: a preset, in `names` or not.
        shape: width and heads.
        rounds: steps of each that are counted, after one that is not.
    """
    models = {name: _model(name, shape) for name in dict.fromkeys([reference, *names])}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            taken[name].append(_step(*model))
    counted = {name: times[1:] for name, times in taken.items()}
    found = {}
    for name in names:
        ratios = [ours / own for ours, own in zip(counted[reference], counted[name], strict=True)]
        share = 1.0 if name == reference else statistics.median(ratios)
        found[name] = {"step_ms": 1e3 * statistics.median(counted[name]), "share": share}
    return found


def _model(name: str, shape: dict[str, Any]) -> tuple[NestlingForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = NestlingForCausalLM(presets.PRESETS[name]("tiny", vocab_size=VOCABULARY, **shape))
    return model, optim.build("adamw", model, lr=1e-3, weight_decay=0.1)


def _step(model: NestlingForCausalLM, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one training step, as the trainer takes it."""
    ids = torch.randint(0, VOCABULARY, (training.BATCH, training.LENGTH))
    start = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start
