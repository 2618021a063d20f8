"""Models in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nestling import NestlingForCausalLM
from nestling.models import convert
from tests.compat.subjects import batch
from tests.models.conftest import SMALL, small_model
from tests.models.pretrained import SHAPE

pytestmark = pytest.mark.slow
SETTINGS = {
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}

SIZES = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""As bitsandbytes' fast product on CPUs takes them: the original has no other."""
WIDE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def wider(preset: str) -> NestlingForCausalLM:
    """Wide enough for a scale to be shared by 64 inputs."""
    return small_model(preset, hidden_size=64).eval()


def quantized(directory: Path, bits: int) -> PreTrainedModel:
    """The model of a directory with quantized layers."""
    config = BitsAndBytesConfig(**SETTINGS[bits])
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map={"": "cpu"}).eval()
    assert any("bit" in type(m).__name__ for m in model.modules())
    return model


def assert_cache_changes_nothing(model: PreTrainedModel, ids: Tensor) -> None:
    """Generation with the cache is generation without."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(*(model.generate(ids, use_cache=use, **options) for use in (True, False)))


@pytest.mark.parametrize("bits", SETTINGS)
@pytest.mark.parametrize("preset", SMALL)
def test_presets(preset: str, bits: int, tmp_path: Path) -> None:
    """The logits are near those of the model in float32."""
    pytest.importorskip("bitsandbytes", reason="needs the extra compat")
    ids, exact = batch(1, 24), wider(preset)
    exact.save_pretrained(tmp_path)
    model = quantized(tmp_path, bits)
    assert_cache_changes_nothing(model, ids)
    with torch.no_grad():
        found, expected = model(ids).logits, exact(ids).logits
    assert float((found - expected).norm() / expected.norm()) < {4: 0.3, 8: 0.03}[bits]


@pytest.mark.parametrize("bits", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_converted_models(family: str, bits: int, tmp_path: Path) -> None:
    """The logits are those of the original with its weights quantized."""
    pytest.importorskip("bitsandbytes", reason="needs the extra compat")
    ids, original = batch(1, 24), WIDE[family]()
    original.save_pretrained(tmp_path / "original")
    convert(original, {"fast": 64, "slow": 512}).save_pretrained(tmp_path / "converted")
    model = quantized(tmp_path / "converted", bits)
    assert_cache_changes_nothing(model, ids)
    with torch.no_grad():
        expected = quantized(tmp_path / "original", bits)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=2e-2)
