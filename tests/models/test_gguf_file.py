"""What a GGUF file says beside its weights arrives or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedModel

from nestling.errors import UserError
from nestling.models import convert
from nestling.models.gguf_file import GGUFHeader, check_header, complete
from nestling.models.pretrained import load_pretrained
from tests.models.gguf_models import write_gguf
from tests.models.pretrained import LLAMA3, SHAPE, pretrained, randomized

pytest.importorskip("gguf")

IDS = torch.randint(2, 300, (2, 90), generator=torch.Generator().manual_seed(0))
LONG = SHAPE | {"max_position_embeddings": 512}


def llama(**settings: Any) -> PreTrainedModel:
    """A random one."""
    return randomized(lambda: LlamaForCausalLM(LlamaConfig(**LONG | settings)))


def llama3_factors() -> np.ndarray:
    """By what Llama 3.1's kind of stretching divides every frequency, as files have it."""
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
    return (plain / llama(rope_parameters=LLAMA3).model.rotary_emb.inv_freq).float().numpy()


def check_same(original: PreTrainedModel, path: Path, tmp_path: Path) -> None:
    """The model in the file, saved again, and converted, says what the original says."""
    loaded, _ = load_pretrained(path)
    loaded.save_pretrained(tmp_path / "again")
    again = type(loaded).from_pretrained(tmp_path / "again")
    with torch.no_grad():
        wanted = original(IDS).logits
        for model in (loaded, again, convert(loaded, {"fast": 4})):
            torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama bias", "qwen2", "qwen3"])
def test_weights_and_biases_arrive(family: str, tmp_path: Path) -> None:
    original = pretrained(family) if family != "llama bias" else llama(attention_bias=True, tie_word_embeddings=True)
    if family == "qwen3":
        original.config.rope_parameters["rope_type"] = "default"
        original.model.rotary_emb = type(original.model.rotary_emb)(original.config)
    values = {"attention.key_length": 16, "attention.value_length": 16} if family == "qwen3" else {}
    check_same(original, write_gguf(tmp_path / "m.gguf", original, values), tmp_path)


LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "values", "factors"),
    [
        (LLAMA3, {}, True),
        (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, False),
        (LINEAR, {"rope.scaling.factor": 4.0}, False),
        (LINEAR, {"rope.scale_linear": 4.0}, False),
        (
            {"rope_type": "default", "rope_theta": 100.0},
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            False,
        ),
    ],
)
def test_stretched_positions_arrive(
    rope: dict[str, Any], values: dict[str, Any], factors: bool, tmp_path: Path
) -> None:
    original = llama(rope_parameters=rope)
    tensors = {"rope_freqs.weight": llama3_factors()} if factors else {}
    check_same(original, write_gguf(tmp_path / "m.gguf", original, values, tensors), tmp_path)


def test_factors_and_a_linear_stretch_multiply(tmp_path: Path) -> None:
    original = llama(rope_parameters=LLAMA3)
    original.model.rotary_emb.inv_freq /= 4
    tensors = {"rope_freqs.weight": llama3_factors()}
    check_same(original, write_gguf(tmp_path / "m.gguf", original, {"rope.scaling.factor": 4.0}, tensors), tmp_path)


@pytest.mark.parametrize("window", [6, None])
def test_a_window_is_what_the_file_says(window: int | None) -> None:
    """Some versions of transformers take 4096 for a file that is called mistral and has none."""
    config = complete(MistralConfig(**LONG), GGUFHeader("llama", {"attention.sliding_window": window or 0}, (), None))
    assert config.sliding_window == window


ONES = np.ones(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "positions are stretched by 'yarn'"),
        ({"rope.scaling.type": "longrope"}, {}, "positions are stretched by 'longrope'"),
        ({"rope.scaling.attn_factor": 1.2}, {}, r"llama\.rope\.scaling\.attn_factor = 1\.2"),
        ({}, {"rope_factors_long.weight": ONES}, "positions of two kinds"),
        ({"expert_count": 4}, {}, r"it says llama\.expert_count = 4, which is not supported"),
        ({"logit_scale": 0.5}, {}, r"it says llama\.logit_scale = 0\.5"),
        ({"residual_scale": 0.5}, {}, r"llama\.residual_scale"),
        ({"attn_logit_softcapping": 50.0}, {}, r"llama\.attn_logit_softcapping"),
        ({"rope.dimension_count": 4, "attention.key_length": 8}, {}, r"different widths \(4, 8 channels"),
        ({"attention.sliding_window": 6}, {}, "a window of 6 tokens"),
        ({}, {"blk.0.ffn_up.bias": np.ones(50, dtype=np.float32)}, r"holds blk\.0\.ffn_up\.bias, for which a LlamaFor"),
        ({}, {"blk.0.attn_q_norm.weight": np.ones(8, dtype=np.float32)}, r"holds blk\.0\.attn_q_norm\.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}, "lacks 15 of the model's weights"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    values: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama(), values, tensors)
    with pytest.raises(UserError, match=message):
        load_pretrained(path)


def test_values_without_meaning_are_passed_over(tmp_path: Path) -> None:
    original = llama()
    values = {"expert_count": 0, "rope.scaling.attn_factor": 1.0, "attention.sliding_window": 512, "logit_scale": 0.0}
    tensors = {"rope_freqs.weight": ONES}
    check_same(original, write_gguf(tmp_path / "m.gguf", original, values, tensors), tmp_path)


def test_other_architectures_lose_no_stretching() -> None:
    """transformers reads their other values itself."""
    check_header(GGUFHeader("gemma2", {"attn_logit_softcapping": 50.0}, ("x.weight",), None))
    check_header(GGUFHeader("gpt-oss", {"rope.scaling.type": "yarn"}, (), None))
    with pytest.raises(ValueError, match="not supported for gemma3"):
        check_header(GGUFHeader("gemma3", {"rope.scaling.factor": 8.0}, (), None))
    with pytest.raises(ValueError, match="positions of two kinds"):
        check_header(GGUFHeader("phi3", {}, ("rope_factors_short.weight",), None))
