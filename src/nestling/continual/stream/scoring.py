"""Losses of pieces under any causal language model of transformers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestling.continual.stream.chunks import Piece, Stream, batches


class Reader:
    """Runs a model over pieces, several in one right-padded batch.

    Padding stands right, where a causal model's real tokens cannot see it and positions need no shift; a single piece
    goes without a mask, so that attention takes its fastest form. Logits are asked for where a target follows only.

    Args:
        model: called as `model(input_ids=..., attention_mask=..., use_cache=False)`, and with `logits_to_keep` if its
            forward takes that.
        bfloat16: run it under autocast.
    """

    def __init__(self, model: nn.Module, bfloat16: bool = False) -> None:
        self.model, self.bfloat16 = model, bfloat16
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, pieces: Sequence[Piece]) -> Float[Tensor, "targets vocab"]:
        """What the model says about every target of the pieces, in order, float32 at least."""
        rows, low, high = _pad(pieces)
        device = next(self.model.parameters()).device
        arguments: dict[str, Any] = {"input_ids": rows.to(device), "use_cache": False}
        if len(pieces) > 1:
            lengths = torch.tensor([len(piece.ids) for piece in pieces])
            arguments["attention_mask"] = (torch.arange(rows.shape[1]) < lengths[:, None]).long().to(device)
        if self.selects:
            arguments["logits_to_keep"] = torch.arange(low, high, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            logits: Tensor = self.model(**arguments).logits
        if not self.selects:
            logits = logits[:, low:high]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        kept = torch.zeros(len(pieces), high - low, dtype=torch.bool)
        for row, piece in enumerate(pieces):
            kept[row, piece.targets.nonzero()[:, 0] + piece.start - 1 - low] = True
        if bool(kept.all()):
            return logits.flatten(0, 1)
        # Found on the CPU: a mask on a GPU would have to be waited for.
        return logits.flatten(0, 1)[kept.flatten().nonzero()[:, 0].to(device)]

    def losses(self, pieces: Sequence[Piece]) -> Float[Tensor, " targets"]:
        """Cross-entropy of every target of the pieces, in order, nats."""
        return losses_of(self.logits(pieces), pieces)

    @torch.no_grad()
    def scores(self, pieces: Sequence[Piece]) -> Float[Tensor, " targets"]:
        """`losses` without gradients; pieces without targets add none."""
        if not any(bool(piece.targets.any()) for piece in pieces):
            return torch.empty(0)
        return self.losses([piece for piece in pieces if bool(piece.targets.any())])


def losses_of(logits: Float[Tensor, "targets vocab"], pieces: Sequence[Piece]) -> Float[Tensor, " targets"]:
    """Cross-entropy of every target of the pieces, nats, from what a `Reader` says about them."""
    return F.cross_entropy(logits, target_ids(pieces).to(logits.device), reduction="none")


def read_frozen(
    model: nn.Module,
    ids: Int[Tensor, " n"],
    context: int = 512,
    piece: int | None = None,
    batch_tokens: int = 2048,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Float[Tensor, " n"]:
    """Losses of a text under a model that learns nothing, read in pieces as a `Learner` does: so losses before, while
    and after learning differ in the weights alone.

    Args:
        model: any causal language model of transformers.
        ids: `[n]`.
        context: tokens a piece is read with at most, its own included; 2 or more.
        piece: tokens read together; None is half of `context`. Every token sees at least `context - piece` others.
        batch_tokens: tokens of one forward pass over several pieces, padding included.
        on_batch: called with the tokens scored since the last call.

    Returns:
        nats, float32, on the CPU; NaN for the first token.
    """
    stream = Stream(max(1, len(ids)), piece or max(1, context // 2), context)
    stream.add(ids.cpu().long(), torch.ones(len(ids), dtype=torch.bool))
    reader, found = Reader(model), [torch.full((min(1, len(ids)),), math.nan)]
    with own_modes(), learning(model, ()):
        for batch in batches(stream.pieces, batch_tokens):
            found.append(reader.scores(batch).cpu().float())
            on_batch(len(found[-1]))
    return torch.cat(found)


@contextmanager
def own_modes() -> Iterator[None]:
    """As if no caller had set a mode of torch's: `no_grad`, `inference_mode` or `autocast`."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


def divergences(
    said: Float[Tensor, "targets vocab"], says: Float[Tensor, "targets vocab"]
) -> Float[Tensor, " targets"]:
    """KL(said || says) of every target, nats, from logits."""
    return F.kl_div(says.log_softmax(-1), said.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def target_ids(pieces: Sequence[Piece]) -> Int[Tensor, " targets"]:
    """The targets of pieces, in order."""
    return torch.cat([piece.ids[piece.start :][piece.targets] for piece in pieces])


@contextmanager
def learning(model: nn.Module, learned: Iterable[Tensor]) -> Iterator[None]:
    """Gradients for the learned parameters alone, none there to begin with, and the model as in evaluation.

    Dropout would make the score of a token differ from the loss that is learned from. Everything is as before
    afterwards, but that no parameter of the model that was learned has a gradient.
    """
    wanted = list(learned)
    flags: list[tuple[Tensor, bool]] = [(p, p.requires_grad) for p in model.parameters()]
    modes = [module for module in model.modules() if module.training]
    ids = {id(p) for p in wanted}
    for p, _ in flags:
        p.requires_grad_(id(p) in ids)
    for p in wanted:
        p.grad = None
    model.eval()
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for p in wanted:
            p.grad = None
        for module in modes:
            module.training = True


def _pad(pieces: Sequence[Piece]) -> tuple[Int[Tensor, "rows longest"], int, int]:
    """Right-padded rows, and the first and the end of the positions that a target of some row follows."""
    rows = torch.zeros(len(pieces), max(len(piece.ids) for piece in pieces), dtype=torch.int64)
    low, high = rows.shape[1], 0
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece.ids)] = piece.ids
        follows = piece.targets.nonzero()[:, 0] + piece.start
        low, high = min(low, int(follows[0]) - 1), max(high, int(follows[-1]))
    return rows, low, high


def learned_positions(model: nn.Module) -> int | None:
    """Positions that a model has embeddings for; None where it has rotary ones, which go on, or none."""
    config: Any = getattr(model, "config", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return None if rotary else getattr(config, "max_position_embeddings", None)


def check_context(model: nn.Module, context: int) -> None:
    """Raises ValueError for more tokens than a model has positions."""
    if (most := learned_positions(model)) is not None and context > most:
        raise ValueError(f"a context of {context} tokens is more than the model's {most} positions")
