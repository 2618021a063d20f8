"""Blocks that run several times. What holds for every model holds for these too: the tests that are `LOOPED`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling import NestlingConfig, NestlingForCausalLM
from nestling.layers.sequence import Aligned
from nestling.memory.state import StateFileError
from nestling.models import ModelState, NestlingModel
from tests.models.conftest import FEW, LOOPED, small_config, small_model

Make = Callable[..., NestlingForCausalLM]


def by_hand(model: NestlingForCausalLM, ids: Tensor, loops: int) -> Tensor:
    """Logits of `x <- blocks(x + e)` from x = 0, without a model's forward pass."""
    embedded = model.embed_tokens(ids)
    x = torch.zeros_like(embedded)
    for _ in range(loops):
        x = x + embedded
        for block in model.blocks:
            x, _ = block(x, None, Aligned(None))
    return model.lm_head(model.norm(x) * model.config.logit_scale)


@FEW
@pytest.mark.parametrize("times", [1, 2, 3])
def test_the_input_is_added_before_every_loop(make: Make, ids: Tensor, times: int) -> None:
    """As the configuration says, and as a call says of any model."""
    usual = make(loops=times, tie_word_embeddings=False).double()
    asked = make(loops=2, tie_word_embeddings=False).double()
    with torch.no_grad():
        expected = by_hand(usual, ids, times)
        torch.testing.assert_close(usual(ids).logits, expected)
        torch.testing.assert_close(asked(ids, loops=times).logits, expected)


def test_loops_have_no_parameters(make: Make) -> None:
    once, twice = make(), make(loops=2)
    assert [(n, p.shape) for n, p in once.named_parameters()] == [(n, p.shape) for n, p in twice.named_parameters()]
    assert once.fingerprint() != twice.fingerprint()


@LOOPED
def test_configurations_say_loops_where_there_are_several(preset: str, loops: int) -> None:
    config = small_config(preset, loops=loops)
    assert ("loops" in json.loads(config.to_json_string())) == (loops > 1)
    assert NestlingConfig.from_dict(json.loads(config.to_json_string())).loops == loops
    assert ("loops" in config.to_dict()) == (loops > 1)


@FEW
def test_a_state_has_a_part_for_every_loop(make: Make, ids: Tensor) -> None:
    model = make(loops=3)
    with torch.no_grad():
        once, state = (model(ids, loops=loops).past_key_values for loops in (1, None))
        assert (once.loops, state.loops, model.init_state(3).loops, model.init_state(3, 2).loops) == (1, 3, 3, 2)
    assert state.nbytes - once.nbytes == 2 * sum(layer.nbytes for layer in once.layers)
    assert len(list(state.tensors())) - len(list(once.tensors())) == 2 * len(
        [name for name, _ in once.tensors() if name.startswith("layers.")]
    )
    first = next(name for name, t in state.tensors() if name.startswith("layers.") and t.is_floating_point())
    parts = [dict(state.tensors())[name] for name in (first, *(f"further_loops.{i}{first[6:]}" for i in (0, 1)))]
    assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])


@FEW
def test_the_number_of_a_state_is_kept(make: Make, ids: Tensor, tmp_path: Path) -> None:
    """Through calls, selected rows and files; no other can be asked for."""
    model = make()
    with torch.no_grad():
        state = model(ids[:, :9], loops=2).past_key_values
        state.select([2, 0, 1]).select([1, 2, 0]).save(tmp_path / "twice.state", model)
        read = ModelState.load(tmp_path / "twice.state", model)
        assert read.loops == 2
        whole = model(ids, loops=2).logits[:, 9:]
        for loops in (None, 2):
            torch.testing.assert_close(
                model(ids[:, 9:], past_key_values=read, loops=loops).logits, whole, rtol=1e-4, atol=1e-4
            )
        with pytest.raises(ValueError, match="with loops=2 and cannot be continued with loops=3, since every loop"):
            model(ids, past_key_values=state, loops=3)
        with pytest.raises(ValueError, match="with loops=1 and cannot be continued with loops=2"):
            model(ids, past_key_values=model(ids).past_key_values, loops=2)
    with pytest.raises(StateFileError, match="saved by another model"):
        ModelState.load(tmp_path / "twice.state", make(loops=2))


@FEW
def test_a_state_of_another_depth_is_refused(make: Make, ids: Tensor) -> None:
    """Half as many blocks that run twice have as many states, and are another model."""
    model, flat = make(), make(num_layers=1)
    blocks = len(model.blocks)
    for loops in (None, 2):
        with pytest.raises(ValueError, match=f"the state has {blocks} blocks and the model {blocks // 2}; go on with"):
            flat(ids, past_key_values=model.init_state(3), loops=loops)


def test_a_file_that_lacks_a_block_of_a_loop_is_refused(ids: Tensor, tmp_path: Path) -> None:
    model = small_model("hope_linear")
    state = model(ids, loops=3).past_key_values.detach()
    state.further_loops = [state.layers[:1]]
    state.write_file(tmp_path / "cut.state", model.fingerprint())
    with pytest.raises(StateFileError, match=r"first difference: further_loops\.0\.1\."):
        ModelState.load(tmp_path / "cut.state", model)


@pytest.mark.any_shapes
@pytest.mark.parametrize("loops", [0, -1, True, 1.0, "2"])
def test_what_is_no_number_of_loops_is_refused(loops: Any) -> None:
    model = small_model("transformer")
    for call in (
        lambda: small_config("transformer", loops=loops),
        lambda: model(torch.tensor([[5]]), loops=loops),
        lambda: model.init_state(1, loops),
    ):
        with pytest.raises(ValueError, match=r"loops says how often the blocks run, a whole number from 1, not "):
            call()


@FEW
def test_generate_takes_loops(make: Make, ids: Tensor) -> None:
    model, twice = make(tie_word_embeddings=False).double(), make(tie_word_embeddings=False, loops=2).double()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    asked, usual = model.generate(ids, loops=2, **settings), twice.generate(ids, **settings)
    assert torch.equal(asked.sequences, usual.sequences)
    assert asked.past_key_values.loops == 2
    # Without a mask, transformers leaves out a padding token that was written.
    settings["attention_mask"] = torch.ones_like(asked.sequences)
    more = model.generate(asked.sequences, past_key_values=asked.past_key_values, **settings)
    assert torch.equal(more.sequences, twice.generate(asked.sequences, **settings).sequences)
    settings["attention_mask"] = torch.ones_like(ids)
    beams = [m.generate(ids, num_beams=2, **settings | kw).sequences for m, kw in ((model, {"loops": 2}), (twice, {}))]
    assert torch.equal(*beams)


@FEW
def test_hidden_states_are_those_of_every_loop(make: Make, ids: Tensor) -> None:
    model = make(loops=2)
    found = model(ids, output_hidden_states=True).hidden_states
    blocks = len(model.blocks)
    assert len(found) == 2 * blocks + 1
    embedded = model.embed_tokens(ids)
    last, _ = model.blocks[-1](found[blocks - 1], None, Aligned(None))
    torch.testing.assert_close(found[blocks], last + embedded)
    backbone = model.base_model
    assert isinstance(backbone, NestlingModel)
    torch.testing.assert_close(backbone(ids, loops=2).last_hidden_state, found[-1])
