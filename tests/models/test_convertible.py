"""What a model holds beside its configuration is carried, and its owner told, or refused: never lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from nestling.models import convert
from nestling.models.conversion import ConversionWarning
from tests.models.pretrained import LLAMA3, SHAPE, pretrained, randomized

IDS = torch.randint(3, 290, (2, 70), generator=torch.Generator().manual_seed(1))
FACTORS = [1.0, 1.5, 3.0, 8.0]
SAME = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": FACTORS, "long_factor": FACTORS}
SAME |= {"attention_factor": 1.0, "original_max_position_embeddings": 32}


def llama(**settings: Any) -> LlamaForCausalLM:
    """A random one."""
    return randomized(lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | settings)))


def _patch_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.7


def _drop_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def _drop_layers_of_both(model: Any) -> None:
    _drop_layers(model)
    model.config.num_hidden_layers = 2


def _grow(model: Any) -> None:
    model.model.embed_tokens = nn.Embedding(310, 32)


def _one_bias(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.ones(32))


def _query_biases(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.ones(32))


def _all_input_biases(model: Any) -> None:
    _query_biases(model)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = nn.Parameter(torch.ones(16))
        layer.self_attn.v_proj.bias = nn.Parameter(torch.ones(16))


def _set(path: str, value: Any) -> Callable[[Any], None]:
    module, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(module), name, value)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, _patch_frequencies),
        ({}, _drop_layers_of_both),
        ({}, lambda model: model.resize_token_embeddings(310, mean_resizing=False)),
        ({"rope_parameters": SAME}, lambda model: None),
        ({"rope_parameters": LLAMA3, "attention_bias": True}, lambda model: None),
        ({"head_dim": 6}, lambda model: None),
        ({}, _all_input_biases),
        ({}, lambda model: setattr(model, "lm_head", nn.Linear(32, 300, bias=False))),
        ({}, lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight)),
        # Fields of other families, which transformers passes over in a Llama.
        ({"final_logit_softcapping": 5.0, "logits_scaling": 4.0, "sliding_window": 4}, lambda model: None),
        ({"embedding_multiplier": 3.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1}, lambda model: None),
    ],
)
def test_the_original_decides(settings: dict[str, Any], change: Callable[[Any], None]) -> None:
    original = llama(**settings)
    change(original)
    with torch.no_grad():
        torch.testing.assert_close(convert(original, {"a": 4})(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_layers, "the model has 2 layers, and its configuration says 4; correct config.num_hidden_layers"),
        (_grow, "have 300 and 310 rows, and the configuration says 300; use model.resize_token_embeddings"),
        (_set("model.rotary_emb.attention_scaling", 1.2), "scale the attention, by 1.2"),
        (_set("model.rotary_emb.inv_freq", torch.ones(3)), "turn only some channels"),
        (_set("model.layers.2.self_attn.scaling", 0.1), r"layers\.2\.self_attn scales its scores by 0\.1"),
        (_set("model.layers.1.input_layernorm.variance_epsilon", 0.1), r"layers\.1\.input_layernorm adds 0\.1"),
        (_set("model.layers.3.mlp.act_fn", nn.GELU()), r"layers\.3\.mlp has another activation than silu"),
        (_set("lm_head.bias", nn.Parameter(torch.ones(300))), r"not those of its configuration .*lm_head\.bias"),
        (_one_bias, r"not those of its configuration .*blocks\.1\.mixer\.query\.bias"),
        (_query_biases, r"not those of its configuration .*key\.bias"),
        (lambda model: model.to("meta"), "the weights are on meta, where meta means offloaded"),
        (lambda model: model.model.layers[0].to("meta"), "the weights are on cpu, meta"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: Callable[[Any], Any], message: str) -> None:
    model = llama()
    change(model)
    with pytest.raises(ValueError, match=message):
        convert(model, {"a": 4})


@pytest.mark.parametrize(
    "model",
    [
        lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, embedding_multiplier=3.0, logits_scaling=4.0)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0)),
        lambda: type("MyLlamaForCausalLM", (LlamaForCausalLM,), {})(LlamaConfig(**SHAPE)),
    ],
)
def test_relatives_with_scales_of_their_own_are_refused(model: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="cannot be converted; supported are"):
        convert(model(), {"a": 4})


def test_what_stands_around_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a DataParallel cannot be converted; give the transformers model itself"):
        convert(nn.DataParallel(llama()), {"a": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_head_of_its_own_under_a_tied_flag_is_kept_and_told(family: str, tmp_path: Path) -> None:
    original = pretrained(family)
    original.config.tie_word_embeddings = True
    original.lm_head.weight = nn.Parameter(torch.randn(300, 32))
    with pytest.warns(ConversionWarning, match="differs from its embedding, though its configuration says"):
        converted = convert(original, {"a": 4})
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for model in (converted, loaded):
            torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)


def test_equal_heads_under_a_tied_flag_stay_tied() -> None:
    original = llama(tie_word_embeddings=True)
    original.lm_head.weight = nn.Parameter(original.model.embed_tokens.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert(original, {"a": 4})
    assert converted.lm_head.weight is converted.embed_tokens.weight


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_frequencies_rounded_with_the_weights_are_not_taken(kind: torch.dtype) -> None:
    """A model that was cast rounds its table of frequencies too; the configuration has them exactly."""
    plain, cast = (
        convert(llama(rope_parameters=LLAMA3), {"a": 4}),
        convert(llama(rope_parameters=LLAMA3).to(kind), {"a": 4}),
    )
    assert plain.config.blocks == cast.config.blocks and cast.dtype == kind


def test_what_is_converted_can_be_trained_whatever_came_before() -> None:
    """From a frozen model, in train mode, without gradients, in inference mode."""
    for around in (torch.inference_mode, torch.no_grad):
        with around():
            original = llama().train()
            original.requires_grad_(False)
            converted = convert(original, {"a": 4})
        assert converted.training
        converted(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in converted.parameters())
