"""Declared shapes are checked in all other tests; here is the check itself."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import nestling
from nestling.layers.rates import Gates
from nestling.ops.chunk_rule import decay_products
from nestling.ops.newton_schulz import newton_schulz_many
from nestling.ops.packing import Rows
from nestling.ops.short_conv import short_conv
from tests import shapes
from tests.shapes import ShapeError


def test_every_declared_shape_can_be_read() -> None:
    """What jaxtyping cannot read (two variadic dimensions, say) is found without a call."""
    for module in pkgutil.walk_packages(nestling.__path__, "nestling."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert len(shapes.declared) > 80
    wrong = {}
    for made in shapes.declared:
        try:
            assert shapes.shapes_of(made)
        except Exception as error:
            wrong[f"{made.__module__}.{made.__qualname__}"] = error
    assert not wrong


def test_a_function_is_held_to_its_shapes() -> None:
    """Arguments by place and by name, dimensions that depend on others, dtypes, lists, and results."""
    x, weight, tail = torch.ones(2, 5, 3), torch.ones(3, 4), torch.ones(2, 3, 3)
    short_conv(x, weight, tail)
    for wrong in ((x, weight, tail[:1]), (x, weight, tail[:, :2]), (x.long(), weight, tail)):
        with pytest.raises(ShapeError, match=r"nestling\.ops\.short_conv\.short_conv: "):
            short_conv(*wrong)
    with pytest.raises(ShapeError, match="tail is"):
        short_conv(x, weight=weight, tail=tail[:1])
    with pytest.raises(ShapeError, match="matrices is"):
        newton_schulz_many([torch.ones(3)])
    decay_products(torch.zeros(2, 3, 4), valid=torch.ones(2, 1, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="valid is"):
        decay_products(torch.zeros(2, 3, 4), valid=torch.ones(2, 2, 4, dtype=torch.bool))


def test_a_result_is_held_to_its_shape() -> None:
    """The dimensions of the arguments bind those of the result."""

    def halved(x):
        return x[: len(x) // 2]

    halved.__annotations__ = {"x": Float[Tensor, "n"], "return": Float[Tensor, "n"]}
    with pytest.raises(ShapeError, match="what it returns is"):
        shapes.checked(halved)(torch.ones(4))
    shapes.declared.remove(halved)


def test_a_dataclass_is_held_to_its_shapes() -> None:
    """Fields agree with one another."""
    eta = torch.zeros(2, 3, 4)
    Gates(eta, None, None, torch.ones(2, 1, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="alpha is"):
        Gates(eta, eta[:, :1], None, None)
    with pytest.raises(ShapeError, match="lengths is"):
        Rows(torch.ones(2), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), (2, 3))


@pytest.mark.any_shapes
def test_it_can_be_left_out() -> None:
    """For tests of what a user would see."""
    Gates(torch.zeros(2, 3, 4), torch.zeros(1), None, None)
