"""What runs on the CPU runs on a GPU with the same numbers; skipped without one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling import NestlingForCausalLM, presets
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.options import Options, Replay
from nestling.continual.store.memory import Memory
from nestling.models import convert
from nestling.optim import NAMES, build
from tests.llamas import random_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
VOCABULARY = 64


def far(new: Tensor, old: Tensor) -> float:
    """Relative distance."""
    return float((new.cpu().double() - old.double()).norm() / (old.double().norm() + 1e-6))


def tiny(preset: str) -> NestlingForCausalLM:
    torch.manual_seed(0)
    return NestlingForCausalLM(presets.PRESETS[preset]("tiny", vocab_size=VOCABULARY, hidden_size=64, num_layers=2))


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_loss_gradients_and_continuation(preset: str) -> None:
    model, ids = tiny(preset), tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        model.zero_grad()
        out = model(ids.to(device), labels=ids.to(device), attention_mask=mask.to(device))
        out.loss.backward()
        with torch.no_grad():
            state = model(ids[:, :40].to(device), use_cache=True).past_key_values
            rest = model(ids[:, 40:51].to(device), past_key_values=state, use_cache=True).logits
        gradients = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.detach().cpu(), rest.cpu(), gradients))
    (loss, rest, gradients), (new_loss, new_rest, new_gradients) = found
    assert far(new_loss, loss) < 1e-4
    assert far(new_rest, rest) < 1e-3
    largest = max(float(g.norm()) for g in gradients.values())
    for name, gradient in gradients.items():
        # A gradient near zero is rounding on either device.
        assert far(new_gradients[name], gradient) < 1e-2 or float(gradient.norm()) < 1e-5 * largest, name


@pytest.mark.parametrize("preset", ["hope", "hope_attention", "titans_mac", "ttt_mlp", "mamba2"])
def test_generate(preset: str) -> None:
    model, ids = tiny(preset), tokens(2, 9)
    near = model.generate(ids, max_new_tokens=6, do_sample=False)
    on_gpu = model.to("cuda").generate(ids.cuda(), max_new_tokens=6, do_sample=False)
    assert on_gpu.cpu().equal(near)


@pytest.mark.parametrize("name", NAMES)
def test_optimizers(name: str) -> None:
    first = {}
    for device in ("cpu", "cuda"):
        model, ids = tiny("transformer").to(device), tokens(2, 33).to(device)
        optimizer = build(name, model, lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        first[device] = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    assert far(first["cuda"], first["cpu"]) < 1e-2


@pytest.mark.parametrize("rank", [None, 4])
def test_learner_and_its_memory(rank: int | None, tmp_path: Path) -> None:
    base = convert(random_llama(), {"fast": 16, "slow": 32})
    ids = torch.randint(3, 259, (150,), generator=torch.Generator().manual_seed(1))
    losses = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(base).to(device)
        learner = Learner(model, None, lr=1e-3, context=32, options=Options(rank=rank, replay=Replay(weight=0.5)))
        losses.append(learner.observe(ids).losses)
        learner.consolidate(retention=0.5, steps=2, rows=2)
        path = tmp_path / f"{device}.safetensors"
        learner.memory().save(path)
        learner.detach()
        with Memory.load(path).applied(model), torch.no_grad():
            losses.append(model(ids[None, :20].to(device)).logits.cpu())
    assert far(losses[2][1:], losses[0][1:]) < 1e-3
    assert far(losses[3], losses[1]) < 1e-2


def test_learner_resumes_on_another_device(tmp_path: Path) -> None:
    base = convert(random_llama(), {"fast": 16, "slow": 32})
    ids = torch.randint(3, 259, (160,), generator=torch.Generator().manual_seed(1))
    whole = Learner(copy.deepcopy(base), None, lr=1e-3, context=32).observe(ids).losses
    first = Learner(copy.deepcopy(base), None, lr=1e-3, context=32)
    first.observe(ids[:96])
    first.memory().save(tmp_path / "memory.safetensors")
    second = Learner(copy.deepcopy(base).to("cuda"), None, lr=1e-3, context=32)
    second.load(Memory.load(tmp_path / "memory.safetensors"))
    assert far(second.observe(ids[96:]).losses, whole[96:]) < 1e-3
