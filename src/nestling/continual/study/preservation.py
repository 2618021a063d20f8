"""What a low-rank difference may not change: what its layers say of everything else.

The inputs x that a layer meets in text of the model's own have the second moments C = E x x^T. A difference D = B A of
the layer's weight W changes its output there by E |D x|^2 = tr(D C D^T) on average. Two things are made of it:

    A = A' L^-1 with C + l I = L L^T              the factor is learned in coordinates in which such text is white
    sum over layers |B A'|^2 / tr(W C W^T)        is added to the loss: the share of the layers' output that is changed

So a step is dear where common inputs go, and free where the studied text alone goes: what MEMIT (arXiv:2210.07229) and
AlphaEdit (arXiv:2410.02355) do for single facts in closed form, and orthogonal weight modification (arXiv:1810.01256)
for tasks. It takes no passes over other text while it learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nestling.continual.learner.weights import Factors, LowRankWeights
from nestling.continual.stream.chunks import Piece
from nestling.continual.stream.scoring import Reader, learning

BLOCK = 2048
"""Inputs whose moments are kept together; wider layers have a block for every so many, without moments across."""
FLOOR = 1e-3
"""Of the moments' eigenvalues, in medians of the moments' diagonal: directions that the text never took."""
ROWS = 8
"""Pieces that are read together."""


class Whitened(nn.Module):
    """`A' -> A' L^-1`, block by block.

    Args:
        inverse: `[size, size]` of every block, L^-1.
    """

    def __init__(self, inverse: Sequence[Float[Tensor, "size size"]]) -> None:
        super().__init__()
        self.inverse = list(inverse)

    def forward(self, white: Float[Tensor, "rank inputs"]) -> Float[Tensor, "rank inputs"]:
        """Of the factor in white coordinates, the factor itself."""
        parts = white.split([len(block) for block in self.inverse], dim=1)
        return torch.cat([part @ block for part, block in zip(parts, self.inverse, strict=True)], dim=1)

    def right_inverse(self, factor: Float[Tensor, "rank inputs"]) -> Float[Tensor, "rank inputs"]:
        """Of the factor, what it is in white coordinates."""
        parts = factor.split([len(block) for block in self.inverse], dim=1)
        pairs = zip(parts, self.inverse, strict=True)
        return torch.cat(
            [torch.linalg.solve_triangular(block, part, upper=False, left=False) for part, block in pairs], dim=1
        )


class Preservation:
    """The moments of a model's layers, and what they make of its low-rank weights.

    Args:
        model: with its base weights on.
        weights: of low rank, of that model.
        ids: text of the model's own.

    Cost: one pass over the text; for every tensor that layers are given a matrix of inputs x inputs, at most `BLOCK` of
    them a side, for as long as this lives.
    """

    def __init__(self, model: nn.Module, weights: Sequence[LowRankWeights], ids: Int[Tensor, "pieces length"]) -> None:
        layers = {name: layer for each in weights for name, layer in each.layers.items()}
        self.factors: dict[str, Factors] = {name: f for each in weights for name, f in each.factors.items()}
        moments = input_moments(model, layers, ids)
        made: dict[int, Whitened] = {}
        for blocks in moments.values():
            if id(blocks) not in made:
                made[id(blocks)] = Whitened([_inverse_root(block) for block in blocks])
        self.white = {name: made[id(blocks)] for name, blocks in moments.items()}
        self.sizes = {name: _output_size(layers[name], blocks) for name, blocks in moments.items()}

    @contextmanager
    def coordinates(self) -> Iterator[None]:
        """The right factors in white coordinates for a `with` block; as plain tensors again afterwards."""
        with ExitStack() as back:
            for name, factors in self.factors.items():
                parametrize.register_parametrization(factors.right, "weight", self.white[name])
                back.callback(parametrize.remove_parametrizations, factors.right, "weight", leave_parametrized=True)
            yield

    def changed(self) -> Float[Tensor, ""]:
        """Sum over the layers of the share of their output's squared size that is changed, inside `coordinates`."""
        total = torch.zeros((), device=next(iter(self.factors.values())).left.weight.device)
        for name, factors in self.factors.items():
            left, white = factors.left.weight, _white(factors)
            total = total + ((left.T @ left) * (white @ white.T)).sum() / self.sizes[name]
        return total


def _white(factors: Factors) -> Tensor:
    """The right factor in white coordinates."""
    kept = cast(nn.ModuleDict, factors.right.parametrizations)["weight"]
    return cast(Tensor, kept.original)


Blocks = list[Tensor]
"""Square matrices along the diagonal of a layer's moments."""


@torch.no_grad()
def input_moments(
    model: nn.Module, layers: Mapping[str, nn.Linear], ids: Int[Tensor, "pieces length"]
) -> dict[str, Blocks]:
    """E x x^T over the inputs that layers meet in a text. Layers that are given the same tensor share one list."""
    sums: dict[str, Blocks] = {}
    same: dict[str, str] = {}
    last: tuple[Tensor | None, str] = (None, "")

    def watch(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal last
        if inputs[0] is last[0]:  # as the gate and the values of an MLP are given one tensor
            same[name] = last[1]
            return
        last, same[name] = (inputs[0], name), name
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        new = [part.T @ part for part in flat.split(BLOCK, dim=1)]
        sums[name] = new if name not in sums else [a.add_(b) for a, b in zip(sums[name], new, strict=True)]

    handles = [layer.register_forward_pre_hook(partial(watch, name)) for name, layer in layers.items()]
    reader = Reader(model)
    try:
        with learning(model, ()):
            for rows in ids.split(ROWS):
                # Of the last token alone logits are asked for, where the model can do without the others.
                last_alone = torch.arange(rows.shape[1]) == rows.shape[1] - 1
                reader.logits([Piece(row, 0, last_alone) for row in rows])
    finally:
        for handle in handles:
            handle.remove()
    means = {name: [block / ids.numel() for block in blocks] for name, blocks in sums.items()}
    return {name: means[same[name]] for name in layers}


@torch.no_grad()
def _output_size(layer: nn.Linear, moments: Blocks) -> float:
    """E |W x|^2 = tr(W C W^T)."""
    parts = layer.weight.to(moments[0].dtype).split([len(block) for block in moments], dim=1)
    return float(sum(((part @ block) * part).sum() for part, block in zip(parts, moments, strict=True)))


def _inverse_root(moments: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """L^-1, lower triangular, with L L^T the moments and a floor under them."""
    floor = FLOOR * moments.diagonal().median().clamp_min(torch.finfo(moments.dtype).tiny)
    one = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    root = torch.linalg.cholesky(moments.double() + floor * one)
    return torch.linalg.solve_triangular(root, one, upper=False).to(moments.dtype)
