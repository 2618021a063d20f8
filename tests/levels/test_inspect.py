from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nestling import NestlingForCausalLM, presets
from nestling.levels import Component, NestedSystem, inspect
from nestling.levels.assignment import multi_frequency
from nestling.memory.description import DescribesMemories
from nestling.optim import build
from tests.levels.optimizers import Rigid, TwoSpeeds


def shape_of(system: NestedSystem) -> list[tuple[str, set[str]]]:
    return [(str(level.frequency), {c.name for c in level.components}) for level in system.levels]


def moves(system: NestedSystem, kind: str) -> set[tuple[str, str]]:
    return {(t.source, t.target) for t in system.transfers if t.kind == kind}


def component(system: NestedSystem, name: str) -> Component:
    return next(c for c in system.components if c.name == name)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))


def tiny_llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def tiny(preset: str, **overrides: Any) -> NestlingForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    return NestlingForCausalLM(presets.PRESETS[preset](**sizes | overrides))


def test_gradient_descent_is_one_level_and_momentum_makes_it_two() -> None:
    """The examples of NL section 3.1: Eq. 8, and Eq. 10-13."""
    model = mlp()
    system = inspect(model, SGD(model.parameters(), lr=0.1))
    assert shape_of(system) == [("1 / step", {"0 (Linear)", "2 (Linear)"})] and not system.transfers
    assert sum(c.parameters for c in system.components) == 5 * 7 + 7 + 7 * 2 + 2
    assert component(system, "0 (Linear)").parameter_bytes == 4 * 42

    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    system = inspect(model, optimizer)
    assert shape_of(system) == [
        ("1 / step", {"SGD momentum_buffer"}),
        ("1 / step", {"0 (Linear)", "2 (Linear)"}),
    ]
    momentum = component(system, "SGD momentum_buffer")
    assert (momentum.rule, momentum.context, momentum.state) == ("m ← 0.9 m + g", "gradients", 58)
    assert ("0 (Linear)", "SGD momentum_buffer") in moves(system, "generation")
    assert ("SGD momentum_buffer", "0 (Linear)") in moves(system, "parametric")


def test_adam_has_two_memories_in_one_level() -> None:
    """NL section 3.2: they are updated equally often and do not wait for each other."""
    model = tiny_llama()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    before = inspect(model, optimizer)
    optimizer.step()
    system = inspect(model, optimizer)
    assert shape_of(system) == shape_of(before)
    attention, states, parameters = system.levels
    assert (str(attention.frequency), attention.components[0].growth) == ("∞", 3 * 2 * 2 * 4)
    assert {c.name for c in states.components} == {"AdamW exp_avg", "AdamW exp_avg_sq"}
    assert {c.objective for c in states.components} == {"½|m − g|²", "½|m − g²|²"}
    count = sum(p.numel() for p in model.parameters())
    assert [c.state for c in states.components] == [count] * 2 == [c.state for c in before.levels[1].components]
    assert {c.objective for c in parameters.components} == {"next-token cross entropy"}
    assert sum(c.parameters for c in parameters.components) == count
    names = {"model.embed_tokens", "model.layers.*.self_attn", "model.layers.*.mlp", "lm_head"}
    assert {c.name for c in parameters.components} == names | {"norms, biases and other vectors"}
    assert moves(system, "non-parametric") == {("model.layers.*.self_attn attention", "model.layers.*.self_attn")}


def test_attention_and_recurrence_of_others_are_found() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    found = inspect(encoder).levels[0].components[0]
    assert (found.kind, found.copies, found.growth) == ("attention", 3, 3 * 16)
    sizes: dict[str, Any] = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    found = inspect(GPT2LMHeadModel(GPT2Config(**sizes))).levels[0].components[0]
    assert (found.kind, found.copies, found.growth) == ("attention", 2, 2 * 16)
    recurrent = inspect(nn.Sequential(nn.LSTM(4, 6, num_layers=2))).levels[0].components[0]
    assert (str(recurrent.frequency), recurrent.state) == ("1 / token", 2 * 2 * 6)

    class LinearAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    assert {c.kind for c in inspect(LinearAttention()).components} == {"parameters"}


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_every_loop_has_levels_of_its_own(preset: str) -> None:
    """Blocks that run three times have three times the fast levels, each loop's behind those of the loop before."""
    once, thrice = inspect(tiny(preset)), inspect(tiny(preset, loops=3))
    fast, memories = (
        {c.name: s.level_of(c.name) for c in s.components if c.kind in ("attention", "fast weights")}
        for s in (once, thrice)
    )
    assert set(memories) == {f"{name} (loop {i})" for name in fast for i in (1, 2, 3)}
    for name, other in itertools.product(fast, fast):
        first, second = f"{name} (loop 1)", f"{other} (loop 2)"
        if component(once, name).frequency == component(once, other).frequency:
            assert memories[first] < memories[second] < memories[f"{name} (loop 3)"]
    read = {name for name in fast if not component(once, name).feeds}
    for place in (1, 2):
        pairs = {(f"{a} (loop {place})", f"{b} (loop {place + 1})") for a in read for b in fast}
        assert pairs <= moves(thrice, "parametric")
    assert component(thrice, f"{name} (loop 2)").state == component(once, name).state
    parameters = [sum(c.parameters for c in s.components) for s in (once, thrice)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_layers_of_this_package_describe_all_they_hold(preset: str) -> None:
    """The fast weights they declare are tensors of their state, and their initial parameters exist."""
    model = tiny(preset)
    state = {name: t.shape[1:].numel() for name, t in model.init_state(1).tensors() if t.is_floating_point()}
    weights = {n: size for n, size in state.items() if not n.endswith(("conv", "tail")) and ".start" not in n}
    described = 0
    for path, module in model.named_modules():
        if isinstance(module, DescribesMemories):
            names = dict(module.named_parameters())
            for memory in module.describe_memories():
                assert set(memory.initial) <= set(names), path
                described += memory.state
    caches = {
        n for n in weights if n.endswith((".k", ".v", ".keys", ".values", ".window")) or ".before" in n or "prefix" in n
    }
    assert described == sum(size for n, size in weights.items() if n not in caches)


def test_hope_with_levels() -> None:
    model = tiny("hope", momentum=True, periods=(8, 32, None))
    optimizer = multi_frequency(model, {"cms.1": 8, "cms.2": 64}, partial(build, "adamw", model, lr=1e-3))
    system = inspect(model, optimizer)
    memory, others, surprise = (f"blocks.*.mixer {n}" for n in ("memory", "k, v, eta, alpha", "surprise"))
    fast, slow = "blocks.*.channel level 0", "blocks.*.channel level 1"
    assert [f for f, _ in shape_of(system)] == [
        "1 / token",
        "1 / token",
        "1 / 8 tokens",
        "1 / 32 tokens",
        "1 / 64 tokens",
        "1 / step",
        "1 / step",
        "1 / 8 steps",
        "1 / 8 steps",
        "1 / 64 steps",
        "1 / 64 steps",
    ]
    places = {c.name: system.level_of(c.name) for c in system.components}
    assert places[surprise] < places[memory] < places[fast] < places[slow] < places[others]
    assert places["cms.1: AdamW exp_avg"] < places["blocks.*.channel.levels.1"] < places["cms.2: AdamW exp_avg"]
    assert places["cms.1: gradient sum"] == places["blocks.*.mixer"]
    assert component(system, "cms.2: gradient sum").rule == "A ← A + g; emptied every 64 steps"
    assert sum(c.parameters for c in system.components) == sum(p.numel() for p in model.parameters())
    assert moves(system, "initialisation") >= {("blocks.*.mixer", memory), ("blocks.*.channel.levels.0", fast)}
    assert ("blocks.*.channel.levels.2", "blocks.*.channel.levels.1") in moves(system, "backpropagation")
    assert (surprise, "blocks.*.mixer") not in moves(system, "parametric")  # nobody reads it
    assert (others, memory) in moves(system, "generation") and (surprise, memory) in moves(system, "parametric")
    assert ("cms.2: gradient sum", "cms.2: AdamW exp_avg") in moves(system, "generation")


def test_hope_on_the_clock_of_a_training() -> None:
    """A state that is carried on makes slow memories slower than the weights (NL Definition 2)."""
    model = tiny("hope", periods=(8, 64, None))
    optimizer = multi_frequency(model, {"cms.1": 4}, partial(build, "sgd", model, lr=1e-3))
    fast, slow = "blocks.*.channel level 0", "blocks.*.channel level 1"

    def places(tokens: int | None, restart: int | None = None) -> tuple[dict[str, int], tuple[str, ...]]:
        system = inspect(model, optimizer, tokens_per_step=tokens, restart=restart)
        return {c.name: system.level_of(c.name) for c in system.components}, system.notes

    found, notes = places(256)
    assert found[fast] < found[slow] < found["blocks.*.mixer"] and not notes
    found, notes = places(32)
    assert found[fast] < found["blocks.*.mixer"] < found[slow] < found["blocks.*.channel.levels.1"]
    assert not notes
    found, _ = places(64)  # the gradient of a step has read the memory
    assert found[slow] < found["blocks.*.mixer"] and found[slow] == found[fast] + 1
    _, notes = places(None)
    assert len(notes) == 1 and "which is so from 65 tokens a step" in notes[0]
    _, notes = places(64, restart=64)
    assert {note.partition(" is updated every 64 tokens")[0] for note in notes} == {
        slow,
        "blocks.*.mixer k, v, eta, alpha",
    }
    with pytest.raises(ValueError, match="tokens_per_step must be at least 1, or None if it is not known; got 0"):
        inspect(model, optimizer, tokens_per_step=0)


def test_the_nested_continuum_restarts_from_the_level_above() -> None:
    system = inspect(tiny("hope", variant="nested", periods=(8, 32, None)))
    assert ("blocks.*.channel level 1", "blocks.*.channel level 0") in moves(system, "initialisation")
    assert system.levels[-1].components[0].rule == "no optimizer" and str(system.levels[-1].frequency) == "0"


def test_any_optimizer_inside_any_level() -> None:
    model = mlp()
    optimizer: Optimizer = TwoSpeeds(model.parameters())
    assert shape_of(inspect(model, optimizer)) == [
        ("1 / step", {"TwoSpeeds fast"}),
        ("1 / step", {"TwoSpeeds waiting", "TwoSpeeds filtered"}),
        ("1 / step", {"0 (Linear)", "2 (Linear)"}),
        ("1 / 5 steps", {"TwoSpeeds slow"}),
    ]
    slow = multi_frequency(model, {"2.*": 3}, lambda only: TwoSpeeds(only))
    places = {c.name: str(c.frequency) for c in inspect(model, slow).components}
    assert places["2.*: TwoSpeeds slow"] == "1 / 15 steps" and places["2.*: TwoSpeeds fast"] == "1 / 3 steps"


def test_what_is_not_known_is_said() -> None:
    model = mlp()
    rigid = Rigid(model[0].parameters())
    for p in model[0].parameters():
        p.grad = torch.zeros_like(p)
    rigid.step()
    system = inspect(model, rigid)
    assert component(system, "Rigid trace").objective == "unknown" and component(system, "Rigid trace").state == 42
    assert "could not be tried on a small matrix (RuntimeError: not my parameter)" in system.notes[0]
    assert component(system, "2 (Linear)").rule == "not in the optimizer"
    with pytest.raises(ValueError, match=r"2 parameters that are not this model's, the first of shape \(7, 5\)"):
        inspect(model[2], SGD(model[0].parameters(), lr=0.1))


def test_many_modules_make_few_components() -> None:
    deep = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(20)], nn.Linear(3, 3))
    body = nn.ModuleDict({"body": deep, "head": nn.Linear(3, 2)})
    assert {c.name for c in inspect(body).components} == {"body", "head"}


def test_output_for_people_and_programs(tmp_path: Path) -> None:
    model = tiny("hope")
    system = inspect(model, multi_frequency(model, {"cms.1": 8}, partial(build, "adamw", model, lr=1e-3)))
    text = str(system)
    assert "1 / 8 steps" in text and "cms.1: gradient sum" in text and "knowledge transfers" in text
    values = json.loads(json.dumps(system.to_dict()))
    assert [level["level"] for level in values["levels"]] == list(range(1, len(system.levels) + 1))
    assert values["levels"][0]["unit"] == "token" and values["transfers"][0]["kind"] == "generation"
    for name in ("a.svg", "b.svg", "c.png"):
        system.plot(tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text() and "Level 1" in svg and "backpropagation" in svg
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match=r"NestedSystem\.define makes one to run"):
        system.step(None)
