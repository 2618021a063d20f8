"""Mamba-2: equal to its token-by-token reference and, weight by weight, to the model of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config as TheirConfig
from transformers import Mamba2ForCausalLM as TheirModel

from nestling import NestlingForCausalLM, presets
from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config, Mamba2State
from tests.layers.battery import close, gradients, noise, weigh
from tests.layers.reference_linear import reference_mamba2
from tests.oracles import float32_is_float64

CASES: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups": {"num_groups": 2},
    "a group a head": {"num_groups": 4, "expand": 1},
    "chunk 1": {"chunk_size": 1},
    "one chunk": {"chunk_size": 64, "state_size": 1},
}


def make_layer(**settings: Any) -> Mamba2:
    """A float64 layer whose parameters are all away from their first values."""
    torch.manual_seed(0)
    config = Mamba2Config(**{"hidden_size": 8, "num_heads": 4, "state_size": 6, "chunk_size": 4} | settings)
    layer = Mamba2(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", CASES)
def test_equals_the_token_by_token_reference(name: str) -> None:
    layer = make_layer(**CASES[name])
    x = noise(2, 11, 8).requires_grad_()
    y, state = layer(x)
    assert isinstance(state, Mamba2State)
    expected, weight = reference_mamba2(layer, x)
    close([y, state.weight], [expected, weight])
    found = gradients(weigh(y) + weigh(state.weight, 6), [x], layer)
    close(found, gradients(weigh(expected) + weigh(weight, 6), [x], layer))
    assert all(bool(g.any()) for g in found)


def test_gradcheck() -> None:
    layer = make_layer(hidden_size=2, num_heads=2, state_size=2, num_groups=2, chunk_size=2)
    names = [n for n, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, state.weight

    leaves = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (noise(1, 3, 2).requires_grad_(), *leaves), fast_mode=True)


def test_chunk_size_changes_nothing() -> None:
    x = noise(2, 21, 8)
    close([make_layer(chunk_size=3)(x)[0]], [make_layer(chunk_size=64)(x)[0]])


def test_is_a_linear_memory_with_data_retention_when_dt_is_one_and_nothing_is_around_it() -> None:
    """Where softplus(dt) = 1, B, C and x are q, k and v of linear attention with retention exp(-A)."""
    layer = make_layer(num_heads=1, expand=1)
    with torch.no_grad():
        layer.in_proj.weight[-1].zero_()
        layer.dt_bias.fill_(torch.tensor(1.0).double().expm1().log())
        layer.D.zero_()
        layer.conv_bias.zero_()
    settings: dict[str, Any] = {"normalise_qk": False, "erase": False, "output_gate": "none", "output_norm": "none"}
    other = LinearMemory(LinearMemoryConfig(8, 1, key_dim=6, **settings)).double()
    _, values, keys, queries, _ = layer.in_proj.weight.split((8, 8, 6, 6, 1))
    filters = dict(zip("vkq", layer.conv.split((8, 6, 6)), strict=True))
    with torch.no_grad():
        # Values of the other layer are as wide as its keys: six of our eight.
        other.in_proj.weight.copy_(torch.cat([queries, keys, values[:6], torch.zeros(1, 8)]))
        other.conv.copy_(torch.cat([filters["q"], filters["k"], filters["v"][:6]]))
        other.dt_bias.copy_(layer.dt_bias)
        other.A_log.copy_(layer.A_log)
    x = noise(2, 13, 8)
    close([layer(x)[1].weight[:, :, :6]], [other(x)[1].weight])


def their_model(groups: int) -> tuple[TheirModel, NestlingForCausalLM]:
    """A small random Mamba-2 of transformers in float64, and ours with its weights."""
    torch.manual_seed(3)
    config = TheirConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=4,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=groups,
        chunk_size=8,
        expand=2,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    theirs = TheirModel(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    settings = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "state_size": 6}
    made = presets.mamba2(num_groups=groups, chunk_size=5, tie_word_embeddings=False, **settings)
    made.logit_scale = 1.0
    ours = NestlingForCausalLM(made).double().eval()
    ours.load_state_dict(our_names(theirs.state_dict()))
    return theirs, ours


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names."""
    renamed = {
        "backbone.layers": "blocks",
        "backbone.embeddings": "embed_tokens",
        "backbone.norm_f": "norm",
        ".mixer.norm.weight": ".mixer.norm_weight",
        ".norm.weight": ".mixer_norm.weight",
        "conv1d.weight": "conv",
        "conv1d.bias": "conv_bias",
    }
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        found[name] = tensor.squeeze(1) if name.endswith(".conv") else tensor
    return found


@pytest.mark.parametrize("time", [1, 3, 17, 65])
@pytest.mark.parametrize("groups", [1, 2])
def test_logits_and_gradients_of_transformers(groups: int, time: int) -> None:
    """To 1e-8 in float64, and to 1e-4 in float32."""
    theirs, ours = their_model(groups)
    ids = torch.randint(3, 61, (2, time), generator=torch.Generator().manual_seed(time))
    with float32_is_float64():
        wanted = theirs(ids, use_cache=False).logits
        assert wanted.dtype == torch.float64
        (weigh(wanted)).backward()
    found = ours(ids).logits
    close([found], [wanted])
    weigh(found).backward()
    expected = our_names({n: p.grad for n, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9, msg=name)
    single = theirs.float()(ids, use_cache=False).logits
    torch.testing.assert_close(ours.float()(ids).logits, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_generation_of_transformers(groups: int) -> None:
    """Greedy, with their cache: the same tokens for as long as both go on."""
    theirs, ours = their_model(groups)
    nn.init.normal_(theirs.lm_head.weight)
    ours.lm_head.weight.data.copy_(theirs.lm_head.weight)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "use_cache": True}
    with float32_is_float64():
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    found = ours.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert found.shape == (2, 29)
    assert torch.equal(found, wanted)
    assert len(found[:, 9:].unique()) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_size": 0}, "state_size must be at least 1, not 0"),
        ({"num_heads": 3}, r"inner width 16 \(expand \* hidden_size\) is not a multiple of num_heads 3"),
        ({"num_groups": 3}, "num_groups 3 must divide num_heads 4"),
        ({"conv_size": 1}, "conv_size must be at least 2, not 1"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**settings)


def test_another_layers_state_is_refused() -> None:
    state = LinearMemory(LinearMemoryConfig(8, 2)).init_state(2)
    with pytest.raises(TypeError, match="continues from a Mamba2State, not from LinearMemoryState"):
        make_layer()(noise(2, 3, 8), state)
