"""A converted model computes what the original computes, until it learns."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from nestling import NestlingConfig, NestlingForCausalLM
from nestling.layers.feed_forward import FeedForward, FeedForwardConfig, LeveledFeedForward, LeveledFeedForwardConfig
from nestling.levels.assignment import assign_levels, stream_levels
from nestling.models import ModelState, convert
from nestling.models.conversion import ASSIGNMENTS, assign_neurons
from tests.models.pretrained import FAMILIES, LLAMA3, SHAPE, pretrained, truly_double

LEVELS = {"slow": 64, "fast": 4, "mid": 16}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 300, (3, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_originals(family: str, assignment: Any, ids: Tensor) -> None:
    original = truly_double(pretrained(family))
    converted = convert(original, LEVELS, assignment)
    wanted, found = original(ids).logits, converted(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for logits in (wanted, found):
        logits.log_softmax(-1)[..., 5].sum().backward()
    # By what all weights of a kind receive, since the levels part the MLPs.
    for ours, theirs in (("mixer.query.weight", "q_proj.weight"), ("gate.weight", "gate_proj.weight")):
        sums = [
            sum(p.grad.square().sum() for n, p in model.named_parameters() if n.endswith(name))
            for model, name in ((converted, ours), (original, theirs))
        ]
        torch.testing.assert_close(*sums, rtol=1e-8, atol=0)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_padding_and_greedy_text(family: str, assignment: Any, ids: Tensor) -> None:
    original = pretrained(family)
    converted = convert(original, LEVELS, assignment)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :3] = 0, 0
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = original(ids, attention_mask=mask, position_ids=position).logits
        found = converted(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    assert torch.equal(converted.generate(ids, **options), original.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama bias tied llama3", "qwen2 sliding", "qwen3", "mistral window"])
def test_caches_continue_as_the_originals(family: str, ids: Tensor) -> None:
    original = truly_double(pretrained(family))
    converted = convert(original, LEVELS, "split")
    ours, theirs = None, None
    with torch.no_grad():
        for part in ids.split([9, 1, 13], 1):
            a = converted(part, past_key_values=ours)
            b = original(part, past_key_values=theirs, use_cache=True)
            ours, theirs = a.past_key_values, b.past_key_values
            torch.testing.assert_close(a.logits, b.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "llama bias tied llama3", "qwen2 sliding"])
def test_a_converted_model_survives_files(family: str, ids: Tensor, tmp_path: Path) -> None:
    original = pretrained(family)
    original.generation_config.temperature, original.generation_config.do_sample = 0.3, True
    converted = convert(original, LEVELS, "split")
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NestlingForCausalLM)
    assert torch.equal(loaded(ids).logits, converted(ids).logits)
    assert list(loaded.config.levels.items()) == [("fast", 4), ("mid", 16), ("slow", 64)]
    assert loaded.config.blocks == converted.config.blocks
    assert loaded.fingerprint() == converted.fingerprint()
    assert loaded.generation_config.temperature == 0.3 and loaded.generation_config.eos_token_id == 2
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not original.config.tie_word_embeddings
    with torch.no_grad():
        state = converted(ids[:1]).past_key_values
    state.save(tmp_path / "memory.safetensors", converted)
    assert ModelState.load(tmp_path / "memory.safetensors", loaded).get_seq_length() == 23
    assert convert(original, LEVELS, "depth").fingerprint() != converted.fingerprint()


def test_the_original_is_copied_and_left_alone(ids: Tensor) -> None:
    original = pretrained("llama").to(torch.bfloat16)
    before = {n: p.clone() for n, p in original.state_dict().items()}
    converted = convert(original, LEVELS, "split")
    assert converted.dtype == torch.bfloat16 and not converted.training
    with torch.no_grad():
        for p in converted.parameters():
            p.zero_()
    assert all(torch.equal(p, before[n]) for n, p in original.state_dict().items())
    assert all(p.requires_grad for p in converted.parameters())


def test_depth_groups_layers_top_fastest() -> None:
    names = ("fast", "mid", "slow")
    found = [next(iter(share)) for share in assign_neurons(8, 50, names, "depth")]
    assert found == ["slow"] * 2 + ["mid"] * 3 + ["fast"] * 3
    assert [next(iter(s)) for s in assign_neurons(5, 50, names, "interleaved")] == [
        "fast",
        "mid",
        "slow",
        "fast",
        "mid",
    ]
    assert assign_neurons(1, 50, names, "split") == [{"fast": (0, 16), "mid": (16, 33), "slow": (33, 50)}]
    for blocks in range(3, 40):
        shares = [next(iter(s)) for s in assign_neurons(blocks, 9, names, "depth")]
        assert [s for s, after in pairwise([*shares, ""]) if s != after] == ["slow", "mid", "fast"]
        counts = [shares.count(name) for name in names]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_stream_levels_name_every_mlp_weight_once(assignment: Any) -> None:
    converted = convert(pretrained("llama"), LEVELS, assignment)
    found = stream_levels(converted)
    assert list(found) == ["fast", "mid", "slow"]
    named = [n for names in found.values() for n in names]
    assert sorted(named) == sorted(n for n, _ in converted.named_parameters() if ".channel." in n)
    assert all(f".levels.{level}." in n for level, names in found.items() for n in names)
    sizes = dict(converted.named_parameters())
    assert sum(sizes[n].numel() for n in named) == 4 * 3 * 32 * 50
    chosen = assign_levels(converted, {"slow": 8, "blocks.*.mixer.*": 2})
    assert chosen["slow"] == found["slow"] and set(found["fast"]) < set(chosen["rest"])
    assert stream_levels(pretrained("llama")) == {}


def test_a_leveled_network_is_the_sum_of_its_levels() -> None:
    whole = FeedForward(FeedForwardConfig(6, 10)).double()
    parted = LeveledFeedForward(LeveledFeedForwardConfig(6, ("a", "b"), (3, 7))).double()
    cuts = {"a": slice(0, 3), "b": slice(3, 10)}
    for name, own in cuts.items():
        level = parted.levels[name]
        level.gate.weight.data, level.up.weight.data = whole.gate.weight[own], whole.up.weight[own]
        level.down.weight.data = whole.down.weight[:, own]
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(parted(x), whole(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (), "neurons": ()}, "levels are one or more names"),
        ({"levels": ("a", "a"), "neurons": (1, 1)}, "each given once"),
        ({"levels": ("a",), "neurons": (1, 2)}, r"one number from 1 for each of \['a'\]"),
        ({"levels": ("a",), "neurons": (0,)}, "one number from 1"),
        ({"levels": ("a.b",), "neurons": (1,)}, "letters, digits and underscores"),
        ({"levels": ("_a",), "neurons": (1,)}, "letters, digits and underscores"),
        ({"levels": ("type",), "neurons": (1,)}, "means something else already"),
        ({"levels": ("rest",), "neurons": (1,)}, "means something else already"),
        ({"hidden_size": 0, "levels": ("a",), "neurons": (1,)}, "hidden_size must be at least 1"),
    ],
)
def test_wrong_leveled_networks_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeveledFeedForwardConfig(**{"hidden_size": 6} | settings)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({}, "levels maps names to periods in tokens"),
        ({"a": 0}, "the period of level a is a number of tokens, 1 or more, not 0"),
        ({"a": 2.0}, "the period of level a"),
        ({"a": True}, "the period of level a"),
        ({"a": 8, "b": 8}, "the levels a and b both have period 8"),
        ({"a b": 8}, "letters, digits and underscores"),
        ({f"l{i}": i + 1 for i in range(5)}, "5 levels cannot share 4 blocks"),
    ],
)
def test_wrong_levels_are_refused(levels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(pretrained("llama"), levels)


def test_more_levels_than_neurons_and_unknown_assignments_are_refused() -> None:
    with pytest.raises(ValueError, match="51 levels cannot share 50 hidden neurons"):
        convert(pretrained("llama"), {f"l{i}": i + 1 for i in range(51)}, "split")
    with pytest.raises(ValueError, match="assignment is one of depth, interleaved, split; got 'top'"):
        convert(pretrained("llama"), LEVELS, "top")  # type: ignore[arg-type]


def test_levels_of_a_config_are_those_of_its_blocks() -> None:
    channel = {"kind": "leveled_feed_forward", "levels": ["b", "a"], "neurons": [3, 4]}
    blocks = [{"mixer": {"kind": "attention", "num_heads": 2}, "channel": channel}]
    config = NestlingConfig(blocks=blocks, hidden_size=8, levels={"a": 9, "b": 10})
    again = NestlingConfig.from_dict(json.loads(config.to_json_string()))
    assert again.blocks == config.blocks and again.blocks[0]["channel"]["levels"] == ["b", "a"]
    assert list(again.levels) == list(config.levels) == ["a", "b"]
    for levels in (None, {"a": 9}, {"a": 9, "b": 10, "c": 11}):
        with pytest.raises(ValueError, match="they must be the same"):
            NestlingConfig(blocks=blocks, hidden_size=8, levels=levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}}, "rope type 'yarn' is not"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}, "supported are default, l"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
    ],
)
def test_settings_without_a_counterpart_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(LlamaForCausalLM(LlamaConfig(**SHAPE | settings)), LEVELS)


def test_other_models_are_refused() -> None:
    gemma = GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=8))
    message = r"GemmaForCausalLM \(model type gemma\) cannot be converted; supported are .* Llama .*Qwen3"
    with pytest.raises(ValueError, match=message):
        convert(gemma, LEVELS)
    with pytest.raises(ValueError, match="nestling's already"):
        convert(convert(pretrained("llama"), LEVELS), LEVELS)
    with pytest.raises(ValueError, match=r"layer_types has chunked_attention; supported are full and sliding"):
        qwen = pretrained("qwen2")
        qwen.config.layer_types = ["chunked_attention"] * 4
        convert(qwen, LEVELS)
    adapted = pretrained("llama")
    adapted.model.layers[1].mlp.register_module("adapter", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the model holds model\.layers\.1\.mlp\.adapter\.weight, which is no part"):
        convert(adapted, LEVELS)
    quantized = pretrained("llama")
    quantized.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="the weights are quantized"):
        convert(quantized, LEVELS)
