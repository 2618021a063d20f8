"""Small models and memories for the tests of continual learning."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nestling.continual.store.fingerprint import base_fingerprint
from nestling.continual.store.memory import DocumentRecord, LowRank, Memory


def make_memory(model: LlamaForCausalLM, seed: int = 0, size: float = 0.01) -> Memory:
    """Two levels by layer, every MLP weight moved, one of them by a difference of low rank."""
    g = torch.Generator().manual_seed(seed)
    names = [name for name, _ in model.named_parameters() if ".mlp." in name]
    parameters = dict(model.named_parameters())
    differences: dict[str, Tensor | LowRank] = {
        name: size * torch.randn(parameters[name].shape, generator=g) for name in names[1:]
    }
    rows, columns = parameters[names[0]].shape
    left, right = torch.randn(rows, 2, generator=g), torch.randn(2, columns, generator=g)
    differences[names[0]] = LowRank(size * left, right)
    return Memory(
        fingerprint=base_fingerprint(model),
        periods={"fast": 16, "slow": 64},
        parameters={"fast": [n for n in names if ".1." in n], "slow": [n for n in names if ".0." in n]},
        differences=differences,
        documents=[
            DocumentRecord("a.txt", "aa", 120, True, 2.5, "2026-01-01T00:00:00+00:00"),
            DocumentRecord("b.txt", f"b{seed}", 7, False, float("nan"), "2026-01-02T00:00:00+00:00"),
        ],
        settings={"lr": 1e-3, "nested": {"a": [1, None, True]}},
        tensors={"step": torch.tensor(3), "average": torch.randn(4, 5, generator=g), "ids": torch.arange(7)},
    )


def assert_same(a: Memory, b: Memory) -> None:
    """The same bits, a NaN loss included."""
    for field in ("fingerprint", "periods", "parameters", "settings"):
        assert getattr(a, field) == getattr(b, field)
    assert list(map(repr, a.documents)) == list(map(repr, b.documents))
    assert a.differences.keys() == b.differences.keys() and a.tensors.keys() == b.tensors.keys()
    for name, difference in a.differences.items():
        other = b.differences[name]
        if isinstance(difference, LowRank):
            assert isinstance(other, LowRank)
            assert torch.equal(difference.left, other.left) and torch.equal(difference.right, other.right)
        else:
            assert isinstance(other, Tensor) and torch.equal(difference, other)
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name])
