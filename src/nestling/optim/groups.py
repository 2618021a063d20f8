"""Parameter groups of a model: which parameters take a matrix step, and which decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nestling.optim.matrices import Kind


def decaying(model: nn.Module) -> list[str]:
    """Names of matrices and stacks of them; gains, biases, rates and what a layer marks `_no_weight_decay` stay."""
    return [name for name, parameter in model.named_parameters() if _decays(parameter)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what decays, and what does not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if _decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not _decays(p)], "weight_decay": 0.0},
    ]


def matrix_groups(model: nn.Module, weight_decay: float = 0.0, heads: Iterable[nn.Module] = ()) -> list[dict[str, Any]]:
    """Groups by role, for optimizers with a matrix step (`M3`, and others with Newton-Schulz).

    The role follows from the module that owns a parameter, not from its name. Embeddings and output heads are
    tables with one vector a row, whose singular values mean nothing, so they go to AdamW, as do vectors, filters and
    whatever a layer marks `_no_weight_decay` (rates, biases, short filters). A weight shared by an embedding and a head
    is one parameter and goes there too. Kernels of convolutions without groups become `[out, in * size]`; those with
    groups go to AdamW. What is left with two or more dimensions is a matrix, or a stack of them over the last two.

    Args:
        model: any module; parameters that need no gradient are left out.
        weight_decay: of matrices, kernels, embeddings and heads; the rest does not decay (see `decaying`).
        heads: output layers beside the one that a Hugging Face model names with `get_output_embeddings`: a classifier's
            last layer, for instance.

    Returns:
        At most four groups with `params`, `kind` (see `nestling.optim.matrices.Kind`) and `weight_decay`; none is
        empty.

    Examples:
        >>> import torch
        >>> from nestling.optim import matrix_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 4))
        >>> sorted({group["kind"] for group in matrix_groups(model, weight_decay=0.1)})
        ['elementwise', 'matrices']
    """
    tables = _tables(model, heads)
    groups: dict[tuple[Kind, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            kind: Kind = "elementwise" if parameter in tables else _role(module, parameter)
            groups.setdefault((kind, _decays(parameter)), []).append(parameter)
    return [
        {"params": parameters, "kind": kind, "weight_decay": weight_decay if decays else 0.0}
        for (kind, decays), parameters in groups.items()
    ]


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)


def _role(owner: nn.Module, parameter: nn.Parameter) -> Kind:
    if not _decays(parameter):
        return "elementwise"
    if isinstance(owner, _ConvNd):
        return "kernels" if owner.groups == 1 else "elementwise"
    return "matrices"


def _tables(model: nn.Module, heads: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Weights of embeddings and output heads."""
    owners: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    named = getattr(model, "get_output_embeddings", lambda: None)()
    owners += [m for m in (*heads, named) if m is not None]
    return {p for owner in owners for p in owner.parameters()}
