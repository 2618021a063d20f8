"""Learning in the stream, as plainly as it can be said: one piece at a time, optimizers by hand, nothing clever."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Update = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass
class ReferenceLevel:
    """Names of its parameters, tokens between updates, and weight, gradient and state to the change."""

    names: Sequence[str]
    period: int
    update: Update
    kept: float = 1.0
    relative: float = math.inf


@dataclass
class Result:
    """Losses of all tokens (NaN for none), weights at the end and their running mean, and the updated levels with
    their position."""

    losses: list[float]
    weights: dict[str, Tensor]
    mean: dict[str, Tensor]
    updates: list[tuple[int, str]] = field(default_factory=list)


def adam(lr: float, betas: tuple[float, float] = (0.9, 0.95)) -> Update:
    """Kingma and Ba, algorithm 1."""

    def update(weight: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        t = state["t"] = state.get("t", 0) + 1
        state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * gradient
        state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * gradient**2
        return -lr * (state["m"] / (1 - betas[0] ** t)) / ((state["v"] / (1 - betas[1] ** t)).sqrt() + 1e-8)

    return update


def momentum(lr: float, kept: float = 0.9) -> Update:
    """Gradient descent with heavy-ball momentum."""

    def update(weight: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        state["m"] = kept * state["m"] + gradient if state else gradient
        return -lr * state["m"]

    return update


def rows_of(documents: Sequence[Sequence[int]], chunk: int, size: int, context: int) -> list[list[tuple[Any, ...]]]:
    """For every whole chunk, and what is left at the end, its pieces: (context, tokens) of each."""
    places = [(d, i) for d, document in enumerate(documents) for i in range(len(document))]
    found = []
    for first in range(0, len(places), chunk):
        inside, pieces = places[first : first + chunk], []
        for d in dict.fromkeys(place[0] for place in inside):
            own = [i for document, i in inside if document == d]
            for at in range(0, len(own), size):
                part = own[at : at + size]
                before = range(max(0, part[0] - (context - size)), part[0])
                pieces.append(([documents[d][i] for i in before], [documents[d][i] for i in part]))
        found.append(pieces)
    return found


def piece_logits(model: nn.Module, weights: Mapping[str, Tensor], context: list[int], tokens: list[int]) -> Tensor:
    """What the model says before every token of one piece; a document's first token has nothing before it."""
    row = torch.tensor([context + tokens])
    logits = functional_call(model, dict(weights), (), {"input_ids": row, "use_cache": False}).logits[0]
    return logits[[i - 1 for i in range(len(context), row.shape[1]) if i > 0]]


def piece_losses(model: nn.Module, weights: Mapping[str, Tensor], context: list[int], tokens: list[int]) -> Tensor:
    """Loss of every token of one piece, one after the other; a document's first token has none."""
    logits = piece_logits(model, weights, context, tokens)
    targets = tokens[len(tokens) - len(logits) :]
    each = [F.cross_entropy(said, torch.tensor(token)) for said, token in zip(logits, targets, strict=True)]
    return torch.stack(each) if each else torch.empty(0, dtype=logits.dtype)


def piece_divergences(
    model: nn.Module,
    teacher: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    context: list[int],
    tokens: list[int],
) -> Tensor:
    """sum_x p(x) log(p(x) / q(x)) before every token of one piece, p of the teacher."""
    p = piece_logits(model, teacher, context, tokens).softmax(-1)
    q = piece_logits(model, weights, context, tokens).softmax(-1)
    return (p * (p / q).log()).sum(-1)


def learn(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    levels: Mapping[str, ReferenceLevel],
    context: int,
    size: int,
    *,
    passes: Callable[[Tensor, list[float]], Tensor] | None = None,
    replay: Callable[[int], tuple[list[int], list[int]] | None] | None = None,
    replay_weight: float = 1.0,
    projection: bool = False,
    mean_rate: float = 1.0,
    taught: bool = False,
    rehearse: Callable[[int], list[int]] | None = None,
    rehearsal_weight: float = 1.0,
) -> Result:
    """Learn from documents in order.

    `passes` says which losses of a chunk are learned from, given those of all earlier ones; `replay` gives the piece
    replayed with a chunk. The running mean moves by `mean_rate`, at first faster; where `taught`, it says what is to be
    said of the replayed piece. `rehearse` gives the text of which the base weights say what is to be said.
    """
    chunk = min(level.period for level in levels.values())
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights = {n: p.clone() for n, p in base.items()}
    gradients: dict[str, list[dict[str, Tensor]]] = {name: [] for name in levels}
    states: dict[str, dict[str, Any]] = {n: {} for n in base}
    mean = {n: p.clone() for n, p in base.items()}
    result, earlier = Result([], weights, mean), []
    for number, pieces in enumerate(rows_of(documents, chunk, size, context), 1):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        each = [piece_losses(model, leaves, *piece) for piece in pieces]
        for (before, _), found in zip(pieces, each, strict=True):
            result.losses += [math.nan] * (not before) + found.tolist()
        if sum(len(tokens) for _, tokens in pieces) < chunk:
            break
        losses = torch.cat(each)
        chosen = losses if passes is None else losses[passes(losses.detach(), earlier)]
        earlier += losses.tolist()
        objective, old = chosen.sum() / len(losses), None if replay is None else replay(number)
        gradient = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
        if old is not None:
            each = piece_divergences(model, mean, leaves, *old) if taught else piece_losses(model, leaves, *old)
            replayed = each.mean()
            extra = dict(zip(leaves, torch.autograd.grad(replayed, list(leaves.values())), strict=True))
        if rehearse is not None:
            known = piece_divergences(model, base, leaves, [], rehearse(number)).mean()
            kept = dict(zip(leaves, torch.autograd.grad(known, list(leaves.values())), strict=True))
        for name, level in levels.items():
            own = {n: gradient[n] for n in level.names}
            if old is not None:
                if projection:
                    product = sum((own[n] * extra[n]).sum() for n in level.names)
                    square = sum((extra[n] ** 2).sum() for n in level.names)
                    if product < 0:
                        own = {n: own[n] - product / square * extra[n] for n in level.names}
                own = {n: own[n] + replay_weight * extra[n] for n in level.names}
            if rehearse is not None:
                own = {n: own[n] + rehearsal_weight * kept[n] for n in level.names}
            gradients[name].append(own)
            if number * chunk % level.period == 0:
                _update(level, weights, base, gradients.pop(name), states)
                gradients[name] = []
                result.updates.append((number * chunk, name))
        for n in mean:
            mean[n] = mean[n] + max(mean_rate, 1 / (number + 1)) * (weights[n] - mean[n])
    return result


def _update(
    level: ReferenceLevel,
    weights: dict[str, Tensor],
    base: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    states: dict[str, dict[str, Any]],
) -> None:
    before = {n: weights[n].clone() for n in level.names}
    for n in level.names:
        mean = torch.stack([g[n] for g in gradients]).mean(0)
        pulled = base[n] + level.kept * (weights[n] - base[n])
        weights[n] = pulled + level.update(pulled, mean, states[n])
    length = sum(((weights[n] - before[n]) ** 2).sum() for n in level.names) ** 0.5
    longest = level.relative * sum((before[n] ** 2).sum() for n in level.names) ** 0.5
    for n in level.names:
        weights[n] = before[n] + min(1.0, float(longest / length)) * (weights[n] - before[n])
