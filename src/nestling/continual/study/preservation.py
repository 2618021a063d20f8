"""What a low-rank difference may not change: what the model says of everything else.

In text of the model's own a layer meets inputs x with the second moments C = E x x^T, and the text's log-likelihood has
gradients g by the layer's outputs with G = E g g^T. To second order a difference D = B A of the layer's weight costs

    KL(base || model) = 1/2 E (g . D x)^2 = 1/2 tr(G D C D^T)        nats a token (K-FAC's approximation)

Two things are made of it:

    A = A' L^-1 with C + l I = L L^T          the factor is learned in coordinates in which such text is white
    1/2 sum over layers tr(B^T G B A' A'^T)   is added to the loss, in its own unit

So a step is dear where common inputs go and common outputs come from, and free where the studied text alone goes. That
is elastic weight consolidation with a structured Fisher information (arXiv:1805.07810); MEMIT (arXiv:2210.07229) and
AlphaEdit (arXiv:2410.02355) use C alone, for single facts. It takes no passes over other text while it learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nestling.continual.learner.weights import Factors, LowRankWeights
from nestling.continual.stream.scoring import learning, own_modes

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
        ids: text of the model's own, so that its tokens are drawn from what the model says.

    Cost: one pass over the text with gradients; for each layer a matrix of inputs x inputs and one of outputs x
    outputs, at most `BLOCK` of them a side, for as long as this lives.
    """

    def __init__(self, model: nn.Module, weights: Sequence[LowRankWeights], ids: Int[Tensor, "pieces length"]) -> None:
        layers = {name: layer for each in weights for name, layer in each.layers.items()}
        self.factors: dict[str, Factors] = {name: f for each in weights for name, f in each.factors.items()}
        inputs, self.gradients = moments(model, layers, ids)
        made: dict[int, Whitened] = {}
        for blocks in inputs.values():
            if id(blocks) not in made:
                made[id(blocks)] = Whitened([_inverse_root(block) for block in blocks])
        self.white = {name: made[id(blocks)] for name, blocks in inputs.items()}

    @contextmanager
    def coordinates(self) -> Iterator[None]:
        """The right factors in white coordinates for a `with` block; as plain tensors again afterwards."""
        with ExitStack() as back:
            for name, factors in self.factors.items():
                parametrize.register_parametrization(factors.right, "weight", self.white[name])
                back.callback(parametrize.remove_parametrizations, factors.right, "weight", leave_parametrized=True)
            yield

    def divergence(self) -> Float[Tensor, ""]:
        """KL(base || model) on the text, nats a token, to second order and layer by layer; inside `coordinates`."""
        total = torch.zeros((), device=next(iter(self.factors.values())).left.weight.device)
        for name, factors in self.factors.items():
            left, white, blocks = factors.left.weight, _white(factors), self.gradients[name]
            parts = left.split([len(block) for block in blocks])
            curved = sum(part.T @ (block @ part) for part, block in zip(parts, blocks, strict=True))
            total = total + 0.5 * (curved * (white @ white.T)).sum()
        return total


def _white(factors: Factors) -> Tensor:
    """The right factor in white coordinates."""
    kept = cast(nn.ModuleDict, factors.right.parametrizations)["weight"]
    return cast(Tensor, kept.original)


Blocks = dict[str, list[Tensor]]
"""By layer: square matrices along the diagonal of one of the layer's moments."""


class _Watch:
    """Sums the second moments of what passes a layer, in blocks, over all tokens."""

    def __init__(self) -> None:
        self.inputs: Blocks = {}
        self.gradients: Blocks = {}
        self.same: dict[str, str] = {}
        self.last: tuple[Tensor | None, str] = (None, "")

    def __call__(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook."""
        output.register_hook(partial(self._gradient, name))
        if inputs[0] is self.last[0]:  # as the gate and the values of an MLP are given one tensor
            self.same[name] = self.last[1]
            return
        self.last, self.same[name] = (inputs[0], name), name
        _add(self.inputs, name, inputs[0])

    def _gradient(self, name: str, gradient: Tensor) -> None:
        _add(self.gradients, name, gradient)


@torch.no_grad()
def _add(sums: Blocks, name: str, values: Tensor) -> None:
    flat = values.detach().reshape(-1, values.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    new = [part.T @ part for part in flat.split(BLOCK, dim=1)]
    sums[name] = new if name not in sums else [a.add_(b) for a, b in zip(sums[name], new, strict=True)]


def moments(
    model: nn.Module, layers: Mapping[str, nn.Linear], ids: Int[Tensor, "pieces length"]
) -> tuple[Blocks, Blocks]:
    """E x x^T over the inputs that layers meet in a text, and E g g^T over the gradients of its log-likelihood by their
    outputs, in blocks. Layers that are given the same tensor share one list of the first.

    The text is sampled from the model, so the second is the factor of the Fisher information that K-FAC
    (arXiv:1503.05671) has for the outputs.
    """
    watch = _Watch()
    handles = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    embed = cast(Any, model).get_input_embeddings()
    try:
        with own_modes(), learning(model, ()):
            for rows in ids.to(device).split(ROWS):
                found = model(inputs_embeds=embed(rows).detach().requires_grad_(), use_cache=False).logits
                F.cross_entropy(found[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    tokens = ids.numel()
    inputs = {name: [block / tokens for block in blocks] for name, blocks in watch.inputs.items()}
    gradients = {name: [block / tokens for block in blocks] for name, blocks in watch.gradients.items()}
    return {name: inputs[watch.same[name]] for name in layers}, gradients


def _inverse_root(moments: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """L^-1, lower triangular, with L L^T the moments and a floor under them."""
    floor = FLOOR * moments.diagonal().median().clamp_min(torch.finfo(moments.dtype).tiny)
    size = len(moments)
    root = torch.linalg.cholesky(moments.double() + floor * torch.eye(size, dtype=torch.float64))
    return torch.linalg.solve_triangular(root, torch.eye(size, dtype=torch.float64), upper=False).to(moments.dtype)
