from __future__ import annotations

import dataclasses

import pytest
import torch

from nestling import NestlingForCausalLM, presets


def parameters(preset: str, size: str) -> tuple[int, int]:
    """Parameters of a preset, with and without the embedding."""
    with torch.device("meta"):
        model = NestlingForCausalLM(presets.PRESETS[preset](size))
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.embed_tokens.weight.numel()


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=() if s in ("tiny", "1.3b") else pytest.mark.slow) for s in presets.SIZES]
)
def test_all_presets_of_a_size_have_equal_parameters(size: str) -> None:
    counts = {name: parameters(name, size)[0] for name in presets.PRESETS}
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


@pytest.mark.parametrize(
    ("size", "expected"), [("tiny", 1.0e6), ("340m", 340e6), ("760m", 760e6), ("1.3b", 1.3e9)], ids=presets.SIZES
)
def test_sizes_are_what_their_names_say(size: str, expected: float) -> None:
    total, inner = parameters("transformer", size)
    assert (inner if size == "tiny" else total) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("hidden_size", [64, 96, 256])
def test_other_widths_stay_equal_too(hidden_size: int) -> None:
    counts = {}
    for name, preset in presets.PRESETS.items():
        with torch.device("meta"):
            counts[name] = NestlingForCausalLM(preset(hidden_size=hidden_size, num_layers=1)).num_parameters()
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


def test_overrides_reach_the_blocks() -> None:
    config = presets.hope(
        "tiny", vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, chunk_size=8, periods=(8, None)
    )
    assert (config.vocab_size, config.hidden_size, len(config.blocks)) == (512, 64, 3)
    assert config.mixer_config(2).chunk_size == 8
    assert config.mixer_config(2).num_heads == 4
    assert config.channel_config(2).periods == (8, None)
    assert presets.hope_linear().mixer_config(0).memory == "matrix"
    assert presets.hope_attention(window=32).mixer_config(0).window == 32
    assert presets.transformer(intermediate_size=40).channel_config(0).intermediate_size == 40
    assert presets.transformer("340m").mixer_config(0).head_dim == 64


@pytest.mark.parametrize("name", presets.PRESETS)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunksize'"):
        presets.PRESETS[name](chunksize=8)
    with pytest.raises(ValueError, match=r"unknown size '7b'; sizes: tiny, 340m, 760m, 1\.3b"):
        presets.PRESETS[name]("7b")


def test_a_preset_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    presets.hope()
    assert torch.equal(before, torch.get_rng_state())


def test_samba_alternates_mamba_and_a_window() -> None:
    config = presets.samba("340m", num_heads=8)
    mixers = [b["mixer"] for b in config.blocks]
    assert [m["kind"] for m in mixers] == ["mamba2", "attention"] * 12
    assert [mixers[0]["num_heads"], mixers[1]["num_heads"], mixers[1]["window"]] == [16, 8, 2048]
    assert len({str(b["channel"]) for b in config.blocks}) == 1
    assert presets.samba(window=16).mixer_config(3).window == 16


def test_mamba2_has_two_blocks_without_a_channel_for_one_with() -> None:
    config = presets.mamba2("340m")
    assert len(config.blocks) == 48
    assert all(b["channel"] is None for b in config.blocks)
    assert config.mixer_config(0).head_dim == 64
    assert presets.mamba2(state_size=24, num_layers=1).mixer_config(1).state_size == 24


def test_the_linear_presets_are_what_their_papers_say() -> None:
    made = {name: presets.PRESETS[name]("1.3b").mixer_config(0) for name in ("retnet", "gated_deltanet")}
    assert (made["retnet"].num_heads, made["retnet"].key_width, made["retnet"].value_width) == (8, 256, 512)
    gated = made["gated_deltanet"]
    assert gated.num_heads * gated.key_width == 1536
    assert gated.num_heads * gated.value_width == 3072
    assert presets.deltanet(allow_neg_eigval=True).mixer_config(0).allow_neg_eigval


@pytest.mark.parametrize("size", presets.SIZES)
def test_the_ada_transformer_has_the_parameters_of_a_transformer(size: str) -> None:
    """But for the norm of the keys it shares, and the rate at which it writes."""
    config = presets.ada_transformer(size)
    assert config.mixer_config(0).intermediate_size == presets.transformer(size).channel_config(0).intermediate_size
    more = parameters("ada_transformer", size)[0] - parameters("transformer", size)[0]
    assert more == len(config.blocks) * (config.hidden_size + 1)


def test_linear_attention_pp_is_linear_attention_from_a_learned_start() -> None:
    plain, learned = (
        preset("340m").mixer_config(0) for preset in (presets.linear_attention, presets.linear_attention_pp)
    )
    assert not plain.initial and learned == dataclasses.replace(plain, initial=True)


@pytest.mark.parametrize("name", ["hope", "hope_attention", "hope_linear"])
def test_levels_that_were_never_trained_change_nothing(name: str) -> None:
    """After 10^4 tokens a model as it is made says what it says without updates of its continuum."""
    overrides = {"vocab_size": 50, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    updated = NestlingForCausalLM(presets.PRESETS[name](**overrides)).eval()
    levels = len(updated.config.channel_config(0).periods)
    still = NestlingForCausalLM(presets.PRESETS[name](**overrides, periods=[None] * levels)).eval()
    still.load_state_dict(updated.state_dict(), strict=False)
    ids = torch.randint(3, 50, (1, 10_050), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (model(ids, logits_to_keep=50, use_cache=False).logits for model in (updated, still))
    torch.testing.assert_close(found, wanted)
