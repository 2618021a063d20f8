"""Models whose weights lie on the disk or in memory apart until a module is called (`device_map`, accelerate)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoModelForCausalLM

from nestling import NestlingForCausalLM
from nestling.models import convert
from nestling.models.cache import ModelState
from tests.llamas import random_llama
from tests.models.conftest import small_model

PLACES = {"embed_tokens": "cpu", "blocks": "disk", "norm": "cpu", "lm_head": "cpu"}


@torch.no_grad()
def read(model: NestlingForCausalLM, ids: Tensor) -> list[Tensor]:
    """Logits of a text, of padded rows, and of its tokens one after another with the state."""
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0
    found = [model(ids).logits, model(ids, attention_mask=mask).logits]
    out = model(ids[:, :9])
    for t in range(9, 14):  # over the ends of a chunk and of a window
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        found.append(out.logits)
    return found


def check(model: NestlingForCausalLM, ids: Tensor, folder: Path) -> None:
    """From the disk and from memory it computes what it does where its weights are."""
    wanted = read(model, ids)
    model.save_pretrained(folder / "model")
    spread = AutoModelForCausalLM.from_pretrained(folder / "model", device_map=PLACES, offload_folder=folder / "off")
    assert all(p.is_meta for p in spread.blocks.parameters())
    moved = cpu_offload(NestlingForCausalLM.from_pretrained(folder / "model"), execution_device=torch.device("cpu"))
    for offloaded in (spread, moved):
        torch.testing.assert_close(read(offloaded, ids), wanted)
        state = offloaded.init_state(2)
        for (name, found), (_, first) in zip(state.tensors(), model.init_state(2).tensors(), strict=True):
            torch.testing.assert_close(found, first, msg=name)


def test_offloaded_presets_compute_the_same(preset: str, ids: Tensor, tmp_path: Path) -> None:
    check(small_model(preset).eval(), ids, tmp_path)


@pytest.mark.parametrize("assignment", ["depth", "split"])
def test_offloaded_converted_models_compute_the_same(assignment: str, ids: Tensor, tmp_path: Path) -> None:
    check(convert(random_llama(61), {"fast": 16, "slow": 64}, assignment).eval(), ids, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["hope", "transformer", "titans_mag"])
def test_a_state_of_an_offloaded_model_is_a_file(preset: str, ids: Tensor, tmp_path: Path) -> None:
    """Written by the offloaded model and read by the whole one: both have one fingerprint."""
    model = small_model(preset).eval()
    with torch.no_grad():
        moved = cpu_offload(small_model(preset).eval(), execution_device=torch.device("cpu"))
        state = moved(ids).past_key_values
        state.save(tmp_path / "state", moved)
        loaded = ModelState.load(tmp_path / "state", model)
        again = ModelState.load(tmp_path / "state", moved)
        wanted = model(ids[:, :2], past_key_values=loaded).logits
        torch.testing.assert_close(moved(ids[:, :2], past_key_values=again).logits, wanted)
