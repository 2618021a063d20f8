"""A memory in a model and out again, and in a file and out again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nestling.continual.store import memory_file
from nestling.continual.store.applying import MemoryUseError
from nestling.continual.store.memory import DocumentRecord, LowRank, Memory, MemoryFileError
from nestling.continual.store.records import dense
from tests.continual.models import assert_same, make_memory
from tests.llamas import random_llama


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A tiny Llama."""
    return random_llama()


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_applied_adds_the_differences_and_restores_every_bit(model: LlamaForCausalLM) -> None:
    before, memory = values(model), make_memory(model)
    with memory.applied(model) as inside:
        assert inside is model
        for name, p in model.named_parameters():
            change = memory.differences.get(name)
            wanted = before[name] if change is None else before[name] + dense(change)
            assert torch.equal(p, wanted)
    assert same(values(model), before)
    with pytest.raises(KeyError), memory.applied(model):
        raise KeyError
    assert same(values(model), before)
    with memory.applied(model):  # and again, on the model restored
        assert not same(values(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_apply_and_remove(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    before, memory = values(model), make_memory(model)
    memory.apply(model)
    assert not same(values(model), before)
    memory.remove(model)
    assert same(values(model), before)
    memory.apply(model, keep_originals=False)
    memory.remove(model)
    after = values(model)
    bound = 2 * torch.finfo(dtype).eps
    assert all(float((after[n] - before[n]).abs().max()) <= bound for n in before)
    memory.apply(model)  # rounding alone does not make it another model
    memory.remove(model)
    assert same(values(model), after)


def test_a_copy_read_from_a_file_removes_what_another_applied(model: LlamaForCausalLM, tmp_path: Path) -> None:
    before, memory = values(model), make_memory(model)
    memory.save(tmp_path / "m")
    memory.apply(model)
    held = copy.deepcopy(model)
    Memory.load(tmp_path / "m").remove(held)
    assert same(values(held), before) and not same(values(model), before)


def test_what_is_refused_changes_nothing(model: LlamaForCausalLM) -> None:
    memory, other = make_memory(model), make_memory(model, seed=1)
    before = values(model)
    with pytest.raises(MemoryUseError, match="no memory is applied"):
        memory.remove(model)
    with pytest.raises(MemoryUseError, match="belongs to another model"):
        memory.apply(random_llama(seed=3))
    memory.apply(model)
    inside = values(model)
    with pytest.raises(MemoryUseError, match="this memory is already applied"):
        memory.apply(model)
    with pytest.raises(MemoryUseError, match="another memory is already applied"):
        other.apply(model)
    with pytest.raises(MemoryUseError, match="another memory is applied"):
        other.remove(model)
    assert same(values(model), inside)
    memory.remove(model)
    memory.differences["model.nothing"] = torch.zeros(2)
    with pytest.raises(MemoryUseError, match=r"changes model.nothing, which a LlamaForCausalLM does not have"):
        memory.apply(model)
    del memory.differences["model.nothing"]
    memory.differences["model.norm.weight"] = torch.zeros(31)
    with pytest.raises(MemoryUseError, match=r"shape \(31,\), the model's \(32,\)"):
        memory.apply(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with pytest.raises(MemoryUseError, match="belongs to another model"):
        other.apply(model)
    assert same(values(model), before | {"model.norm.weight": 1.5 * before["model.norm.weight"]})


def test_a_tied_weight_is_changed_once(model: LlamaForCausalLM) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight
    memory = make_memory(model)
    change = torch.ones_like(model.lm_head.weight)
    memory.differences["lm_head.weight"] = change
    with memory.applied(model):
        moved = model.model.embed_tokens.weight.detach() - random_llama().model.embed_tokens.weight.detach()
        assert float(moved.mean()) == pytest.approx(1, abs=1e-6)
    memory.differences["model.embed_tokens.weight"] = change
    with pytest.raises(MemoryUseError, match="tied weights"):
        memory.apply(model)


def test_a_file_holds_the_very_bits(model: LlamaForCausalLM, tmp_path: Path) -> None:
    memory = make_memory(model)
    size = memory.save(tmp_path / "m")
    assert size == (tmp_path / "m").stat().st_size > memory.nbytes
    assert_same(Memory.load(tmp_path / "m"), memory)
    assert memory.tokens == 127


def test_a_file_holds_very_many_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [
        DocumentRecord(f"{i}.txt", f"{i:064}", i, True, 1.5, "2026-01-01T00:00:00+00:00") for i in range(60_000)
    ]
    memory = Memory("0" * 16, {}, {}, {}, documents)
    memory.save(tmp_path / "m")
    assert Memory.load(tmp_path / "m").documents == documents
    monkeypatch.setattr(memory_file, "MAX_CONTENT", 1 << 20)
    with pytest.raises(MemoryFileError, match="longer than 1 MiB; begin a new memory"):
        memory.save(tmp_path / "m")
    with pytest.raises(MemoryFileError, match="longer than 1 MiB"):
        Memory.load(tmp_path / "m")


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("size", [1e-2, 1e-9, 1e6])
def test_half_precision_halves_the_differences(
    model: LlamaForCausalLM, tmp_path: Path, dtype: str, error: float, size: float
) -> None:
    """float16 has a scale for each tensor: differences far below its smallest number keep their precision."""
    memory = make_memory(model, size=size)
    memory.tensors = {}
    assert memory.save(tmp_path / "half", dtype) < 0.65 * memory.save(tmp_path / "full")
    found = Memory.load(tmp_path / "half")
    for name, wanted in memory.differences.items():
        if isinstance(wanted, LowRank):
            continue
        got = found.differences[name]
        assert isinstance(got, Tensor) and got.dtype == torch.float32
        large = wanted.abs() > 1e-3 * wanted.abs().max()
        assert float(((got - wanted).abs() / wanted.abs())[large].max()) <= error


def test_what_cannot_be_written(model: LlamaForCausalLM, tmp_path: Path) -> None:
    memory = make_memory(model)
    memory.save(tmp_path / "m")
    old = (tmp_path / "m").read_bytes()
    with pytest.raises(ValueError, match="dtype 'int8' is not known"):
        memory.save(tmp_path / "m", "int8")
    with pytest.raises(MemoryFileError, match="cannot be written"):
        memory.save(tmp_path / "nowhere" / "m")
    memory.settings["bad"] = object()
    with pytest.raises(MemoryFileError, match="cannot be written"):
        memory.save(tmp_path / "m")
    del memory.settings["bad"]
    memory.differences["model.norm.weight"] = torch.full((32,), torch.nan)
    with pytest.raises(MemoryFileError, match=r"model\.norm\.weight holds NaN"):
        memory.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(MemoryFileError, match="no memory file at"):
        Memory.load(tmp_path / "other")
