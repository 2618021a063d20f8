"""The three stages: train both models, read the unseen text, remember it in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from nestling import NestlingForCausalLM
from nestling.demo.plan import Plan, training_config
from nestling.demo.settings import MODELS, DemoSettings
from nestling.errors import UserError
from nestling.evaluation.language import LossReport, evaluate_loss, token_losses
from nestling.models.cache import ModelState
from nestling.tasks.text import Document
from nestling.training.config import CONFIG_FILE
from nestling.training.corpus import prepare_data
from nestling.training.records import METRICS_FILE, read_metrics
from nestling.training.run import TrainResult, train
from nestling.training.tokenization import encode_text, start_token

RECALL_SECONDS = 600  # then something is broken


@dataclass(frozen=True)
class Trained:
    """A trained model and its measurements.

    Attributes:
        carried: validation loss with the state carried through the held-out text.
        reset: the same with the state reset after every training sequence.
        metrics: records of its `metrics.jsonl`.
    """

    name: str
    result: TrainResult
    model: NestlingForCausalLM
    carried: LossReport
    reset: LossReport
    metrics: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Reading:
    """Per-token losses on the unseen text, by model and by whether the state was `carried` or `reset`."""

    document: Document
    ids: list[int] = field(repr=False)
    losses: dict[str, dict[str, Tensor]] = field(repr=False)
    state: ModelState = field(repr=False)


@dataclass(frozen=True)
class Recall:
    """Per-token losses on the continuation in the new process, and what it knew of the state's file."""

    process: int
    position: int
    bytes: int
    losses: dict[str, Tensor] = field(repr=False)


def clear_output(settings: DemoSettings) -> None:
    """Make the output directory; delete runs of an earlier demo, and nothing else.

    Raises:
        UserError: there is something else where a run should go.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        old = settings.model_dir(name)
        if (old / CONFIG_FILE).is_file():
            shutil.rmtree(old)
        elif old.exists():
            raise UserError(f"{old} is not a run of the demo; move it away, or choose another directory with --out")


def train_models(settings: DemoSettings, plan: Plan, console: Console) -> dict[str, Trained]:
    """Train every model on the same tokens in the same order, and validate both in both ways."""
    found = {}
    for name in MODELS:
        config = training_config(settings, name, plan.tokens)
        console.rule(f"training {name}", style="dim")
        result = train(config, console=console)
        model = NestlingForCausalLM.from_pretrained(result.out)
        assert isinstance(model, NestlingForCausalLM)
        data = prepare_data(config.resolved())
        carried, reset = (
            evaluate_loss(model, data.valid, config.sequence_length, carry=carry, n_bytes=data.valid_bytes)
            for carry in (True, False)
        )
        found[name] = Trained(name, result, model, carried, reset, read_metrics(result.out / METRICS_FILE))
    return found


def read_unseen(settings: DemoSettings, trained: dict[str, Trained], document: Document, console: Console) -> Reading:
    """Every model reads the start of the text twice: state carried, and state reset after every training sequence."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model_dir("hope"))
    ids = [start_token(tokenizer), *encode_text(tokenizer, document.text).tolist()]
    wanted = settings.read + settings.continuation + 1
    if len(ids) < wanted:
        raise UserError(f"{document.name} has only {len(ids):,} tokens; the demo reads {wanted:,}")
    ids = ids[:wanted]
    losses: dict[str, dict[str, Tensor]] = {}
    after = None
    for name, run in trained.items():
        with console.status(f"{name} reads {settings.read:,} bytes, state carried and reset"):
            start = ids[: settings.read + 1]
            carried, state = token_losses(run.model, torch.tensor(start))
            reset, _ = token_losses(run.model, torch.tensor(start), reset_every=settings.sequence_length)
        losses[name] = {"carried": carried, "reset": reset}
        if name == "hope":
            after = state
    assert after is not None
    return Reading(document, ids, losses, after)


def remember(settings: DemoSettings, trained: dict[str, Trained], reading: Reading, console: Console) -> Recall:
    """Save Hope's state after the text, and let a new process read the continuation with and without it.

    Raises:
        UserError: the new process failed; the message holds the end of what it said.
    """
    reading.state.save(settings.state_file, trained["hope"].model)
    recent = reading.ids[settings.read - settings.sequence_length : settings.read]
    handed = {"recent": recent, "continuation": reading.ids[settings.read :]}
    settings.tokens_file.write_text(json.dumps(handed), encoding="utf-8")
    files = (settings.model_dir("hope"), settings.state_file, settings.tokens_file)
    command = [sys.executable, "-m", "nestling.demo.recall", *map(str, files)]
    with console.status("a new process loads the state and reads on"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RECALL_SECONDS)
    if done.returncode:
        raise UserError(f"the new process failed: {' '.join(done.stderr.split())[-300:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    losses = {name: torch.tensor(answer[name]) for name in ("state", "recent", "nothing")}
    return Recall(answer["process"], answer["position"], answer["bytes"], losses)
