from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nestling import NestlingConfig, NestlingForCausalLM
from nestling.layers.attention import AttentionConfig
from nestling.layers.continuum import ContinuumConfig

ATTENTION = {"kind": "attention", "num_heads": 2}
FEED_FORWARD = {"kind": "feed_forward", "intermediate_size": 24}
CONTINUUM = {"kind": "continuum", "intermediate_size": 8, "periods": [4, None]}


def config(mixer: Any = ATTENTION, channel: Any = FEED_FORWARD, **settings: Any) -> NestlingConfig:
    return NestlingConfig(blocks=[{"mixer": mixer, "channel": channel}], hidden_size=16, **settings)


def test_defaults_are_filled_in_and_survive_json() -> None:
    first = config(channel=CONTINUUM)
    assert first.blocks[0]["mixer"] == {
        "kind": "attention",
        "num_heads": 2,
        "num_kv_heads": None,
        "window": None,
        "rope_theta": 10000.0,
    }
    again = NestlingConfig.from_dict(json.loads(first.to_json_string()))
    assert again.blocks == first.blocks
    assert again.to_dict() == first.to_dict()
    assert again.mixer_config(0) == AttentionConfig(16, 2)
    assert again.channel_config(0) == ContinuumConfig(hidden_size=16, intermediate_size=8, periods=(4, None))
    assert again.num_hidden_layers == 1


def test_newer_fields_are_left_out_while_they_change_nothing() -> None:
    assert "rope_frequencies" not in config(mixer=ATTENTION | {"rope_frequencies": None}).blocks[0]["mixer"]
    used = {"head_width": 4, "bias": True, "output_bias": True, "qk_norm_eps": 0.1, "rope_frequencies": [0.5, 0.25]}
    first = config(mixer=ATTENTION | used)
    assert used.items() <= first.blocks[0]["mixer"].items()
    again = NestlingConfig.from_dict(json.loads(first.to_json_string()))
    assert again.blocks == first.blocks
    assert again.mixer_config(0).rope_frequencies == (0.5, 0.25)


def test_the_fingerprint_of_earlier_models_is_what_it_was() -> None:
    made = NestlingForCausalLM(config(vocab_size=20))
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(0.5)
    assert made.fingerprint() == "b081587d4c7becb3"


def test_blocks_may_differ_and_lack_a_channel() -> None:
    mixed = NestlingConfig(
        blocks=[
            {"mixer": {"kind": "self_modifying", "num_heads": 2, "adapt": ["memory", "k"]}, "channel": None},
            {"mixer": ATTENTION | {"hidden_size": 16}},
        ],
        hidden_size=16,
    )
    assert mixed.channel_config(0) is mixed.channel_config(1) is None
    assert mixed.mixer_config(0).adapt == ("memory", "k")


def test_the_callers_specs_are_not_changed() -> None:
    spec = {"mixer": dict(ATTENTION), "channel": dict(FEED_FORWARD)}
    made = NestlingConfig(blocks=[spec], hidden_size=16)
    assert spec == {"mixer": ATTENTION, "channel": FEED_FORWARD}
    made.blocks[0]["mixer"]["window"] = 3
    assert spec["mixer"] == ATTENTION


@pytest.mark.parametrize(
    ("mixer", "channel", "message"),
    [
        ({"kind": "atention"}, None, r"blocks\[0\]\.mixer: unknown kind 'atention'; known kinds: .*attention"),
        ({"num_heads": 2}, None, r"unknown kind None"),
        ("attention", None, r"unknown kind None"),
        (ATTENTION, ATTENTION, r"blocks\[0\]\.channel: unknown kind 'attention'; known kinds: feed_forward"),
        (ATTENTION | {"heads": 2, "dim": 3}, None, r"attention has no field dim, heads; its fields: .*num_kv_heads"),
        ({"kind": "attention"}, None, r"attention needs num_heads"),
        (ATTENTION, {"kind": "feed_forward"}, r"feed_forward needs intermediate_size"),
        (ATTENTION | {"num_heads": 3}, None, r"blocks\[0\]\.mixer: hidden_size 16"),
        (ATTENTION | {"hidden_size": 8}, None, r"hidden_size 8 differs from the model's 16"),
    ],
)
def test_wrong_layers_are_refused(mixer: Any, channel: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(mixer, channel)


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="needs `blocks`"):
        NestlingConfig()
    with pytest.raises(ValueError, match="needs `blocks`"):
        NestlingConfig(blocks=[])
    with pytest.raises(ValueError, match=r"blocks\[0\] must be a dict with the keys mixer and channel; got \['chanel'"):
        NestlingConfig(blocks=[{"mixer": ATTENTION, "chanel": None}])
    with pytest.raises(ValueError, match=r"blocks\[0\] must be a dict .* got str"):
        NestlingConfig(blocks=["attention"])


def test_unknown_fields_and_impossible_values_are_refused() -> None:
    with pytest.raises(TypeError, match="no field hiden_size"):
        config(hiden_size=4)
    for name in ("vocab_size", "initializer_range", "norm_eps", "logit_scale", "loss_chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            config(**{name: -1})
    assert config(dtype="bfloat16", architectures=["NestlingForCausalLM"]).vocab_size == 259
