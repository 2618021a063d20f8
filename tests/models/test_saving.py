from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nestling import NestlingConfig, NestlingForCausalLM
from nestling.memory.state import StateFileError
from nestling.models import ModelState
from tests.models.conftest import FEW, FEW_LOOPED, LOOPED, small_model

Make = Callable[..., NestlingForCausalLM]

READER = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import nestling
from nestling.models import ModelState
from tests.models.conftest import small_model
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = ModelState.load(folder / "memory.safetensors", model)
    with torch.no_grad():
        out = model(torch.load(folder / "ids.pt"), past_key_values=state)
    torch.save((model.fingerprint(), out.logits), folder / "found.pt")
"""


def test_a_new_process_continues_from_files(
    all_models: dict[str, NestlingForCausalLM], ids: Tensor, tmp_path: Path
) -> None:
    expected = {}
    for name, model in all_models.items():
        with torch.no_grad():
            state = model(ids).past_key_values
            expected[name] = model(ids, past_key_values=state).logits
        model.save_pretrained(tmp_path / name)
        state.save(tmp_path / name / "memory.safetensors", model)
        torch.save(ids, tmp_path / name / "ids.pt")
    # One process for all: importing takes longer than everything else.
    subprocess.run([sys.executable, "-c", READER, *(str(tmp_path / name) for name in all_models)], check=True)
    for name, model in all_models.items():
        fingerprint, logits = torch.load(tmp_path / name / "found.pt")
        assert fingerprint == model.fingerprint()
        assert torch.equal(logits, expected[name])


@LOOPED
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_and_load_a_model(make: Make, ids: Tensor, tmp_path: Path, tied: bool) -> None:
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NestlingForCausalLM)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) is tied
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.fingerprint() == model.fingerprint()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, NestlingConfig)
    assert {k: v for k, v in config.to_dict().items() if not k.startswith("_")} == {
        k: v for k, v in loaded.config.to_dict().items() if not k.startswith("_")
    }
    assert config.blocks == model.config.blocks


@pytest.mark.parametrize("lost", ["blocks.1.", "blocks.0.mixer.", "norm."])
def test_weights_a_checkpoint_lacks_are_drawn(make: Make, tmp_path: Path, lost: str) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = [k for k in tensors if k.startswith(lost)][::2]
    save_file({k: t for k, t in tensors.items() if k not in dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = NestlingForCausalLM.from_pretrained(tmp_path)
    # What starts without chance, as constants and RWKV-7's mixes of channels, is the same in every new model.
    drawn = dict(NestlingForCausalLM(model.config).named_parameters())
    assert dropped
    for name, parameter in loaded.named_parameters():
        found, first = parameter.detach(), tensors[name]
        if name not in dropped or torch.equal(drawn[name], first):
            assert torch.equal(found, first), name
        elif found.numel() > 30:
            assert not torch.equal(found, first), name
            assert 0.5 < float(found.std() / first.std()) < 2, name


@pytest.fixture
def saved(make: Make, ids: Tensor, tmp_path: Path) -> tuple[NestlingForCausalLM, ModelState, Path]:
    model = make()
    with torch.no_grad():
        state = model(ids).past_key_values
    path = tmp_path / "memory.safetensors"
    state.save(path, model)
    return model, state, path


@LOOPED
def test_a_state_file_holds_the_state(saved: tuple[NestlingForCausalLM, ModelState, Path]) -> None:
    model, state, path = saved
    for (name, a), (_, b) in zip(ModelState.load(path, model).tensors(), state.tensors(), strict=True):
        assert torch.equal(a, b), name
        assert not a.requires_grad
        assert a.dtype == b.dtype
    one = state.select([1])
    one.save(path, model)
    assert ModelState.load(path, model).position.tolist() == [21]


def test_a_file_of_version_0_1_is_read(ids: Tensor, tmp_path: Path) -> None:
    """It holds the same tensors but for the digest of what was read."""
    model, path = small_model("hope"), tmp_path / "state.safetensors"
    state = model(ids).past_key_values
    replace(state, digest=None).save(path, model)
    assert "digest" not in load_file(path)
    found = ModelState.load(path, model)
    assert found.digest is None
    assert torch.equal(found.position, state.position)


@FEW_LOOPED
def test_another_models_state_is_refused(saved: tuple[NestlingForCausalLM, ModelState, Path], make: Make) -> None:
    model, state, path = saved
    with pytest.raises(StateFileError, match="saved by another model"):
        ModelState.load(path, make(num_layers=1))
    with torch.no_grad():
        model.norm.weight[3] += 0.5
    with pytest.raises(StateFileError, match="saved by another model"):
        ModelState.load(path, model)
    blocks = len(model.blocks)
    with pytest.raises(ValueError, match=f"{blocks} blocks and the model {blocks // 2}"):
        state.save(path, make(num_layers=1))


@FEW
def test_damaged_state_files_are_refused(saved: tuple[NestlingForCausalLM, ModelState, Path]) -> None:
    model, _, path = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 5, 8, header // 2, header, header + 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StateFileError, match=r"memory\.safetensors"):
            ModelState.load(path, model)
    path.write_bytes(b"not a memory at all")
    with pytest.raises(StateFileError, match="damaged or not a safetensors file"):
        ModelState.load(path, model)
    with pytest.raises(FileNotFoundError, match="no state file"):
        ModelState.load(path.with_name("absent"), model)
    path.write_bytes(whole)
    ModelState.load(path, model)


@FEW
def test_a_flipped_bit_in_the_header_is_refused_or_harmless(
    saved: tuple[NestlingForCausalLM, ModelState, Path],
) -> None:
    model, state, path = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    positions = torch.randint(0, header, (120,), generator=torch.Generator().manual_seed(3)).tolist()
    refused = 0
    for i, position in enumerate([*range(8), *positions]):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (i % 7)
        path.write_bytes(damaged)
        try:
            found = ModelState.load(path, model)
        except StateFileError:
            refused += 1
        else:
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found.tensors(), state.tensors(), strict=True))
    assert refused > 64


@FEW
def test_broken_states_are_named_and_not_saved(saved: tuple[NestlingForCausalLM, ModelState, Path]) -> None:
    model, state, path = saved
    before = path.read_bytes()
    name = next(n for n, t in state.tensors() if n.startswith("layers.1.") and t.is_floating_point())
    broken = state.clone()
    dict(broken.tensors())[name].view(-1)[0] = torch.nan
    assert broken.first_nonfinite() == name
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        broken.save(path, model)
    assert path.read_bytes() == before


@FEW_LOOPED
def test_a_file_of_the_right_model_with_wrong_tensors_is_refused(
    saved: tuple[NestlingForCausalLM, ModelState, Path],
) -> None:
    model, _, path = saved
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)

    def write(changed: dict[str, Tensor]) -> None:
        save_file(changed, path, header)

    name = next(n for n, t in tensors.items() if t.dim() > 2)
    for changed, message in [
        ({k: t for k, t in tensors.items() if k != name}, "first difference"),
        (tensors | {name: tensors[name][..., :-1].contiguous()}, "has shape"),
        (tensors | {name: tensors[name].double()}, "float64"),
        (tensors | {name: torch.full_like(tensors[name], torch.inf)}, "NaN or infinity"),
        (tensors | {"position": tensors["position"][:1].clone()}, "batch sizes"),
        (tensors | {"position": -tensors["position"]}, "negative"),
    ]:
        write(changed)
        with pytest.raises(StateFileError, match=message):
            ModelState.load(path, model)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StateFileError, match="not a nestling state"):
        ModelState.load(path, model)
