"""The linear family with `kernel="fla"`: the wiring by a stand-in on any machine, the kernels where there is a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling import NestlingConfig, NestlingForCausalLM, presets
from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.mamba2 import Mamba2, Mamba2Config
from nestling.layers.sequence import SequenceLayer
from tests.fake_fla import error_ratio, fake_fla, skip_refused_triton
from tests.layers.battery import close, noise, weigh
from tests.layers.reference_linear import ROWS
from tests.oracles import float32_is_float64

LAYERS = [row for row in ROWS if row not in ("comba", "kimi delta")] + ["mamba2"]
FAMILY = ("linear_attention", "linear_attention_pp", "retnet", "deltanet", "gated_deltanet", "gated_deltaproduct")
FAMILY += ("mamba2", "samba")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make(layer: str, kernel: str, hidden_size: int = 12, **settings: Any) -> SequenceLayer:
    """The layer with the weights of a fixed seed."""
    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": hidden_size, "num_heads": 3, "chunk_size": 16, "kernel": kernel}
    if layer == "mamba2":
        return Mamba2(Mamba2Config(**shape | {"state_size": 6, "num_groups": 3} | settings))
    return LinearMemory(LinearMemoryConfig(**shape | ROWS[layer] | settings))


def run(layer: SequenceLayer, x: Tensor, mask: Tensor | None, gradients: bool = True) -> list[Tensor]:
    """Two calls that carry the state, its fast weights, and the gradients of the input and of every parameter."""
    cut = x.shape[1] // 3
    first, state = layer(x[:, :cut], None, None if mask is None else mask[:, :cut])
    last, state = layer(x[:, cut:], state, None if mask is None else mask[:, cut:])
    y, weight = torch.cat([first, last], 1), state.weight  # type: ignore[attr-defined]
    scalar = weigh(y.double().cpu()) + weigh(weight.double().cpu(), seed=6)
    return [y, weight, *(torch.autograd.grad(scalar, [x, *layer.parameters()]) if gradients else ())]


def padding(rows: int, time: int) -> Tensor:
    """A mask that pads the first row on the left and the last on the right."""
    mask = torch.ones(rows, time, dtype=torch.int64)
    mask[0, : time // 2] = 0
    mask[-1, time - time // 4 :] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_layers_hand_over_the_same_memory(layer: str, padded: bool) -> None:
    """To rounding in float64: outputs, fast weights and gradients, over a carried state and ragged rows."""
    x = noise(3, 25, 12).requires_grad_()
    mask = padding(3, 25) if padded else None
    wanted = run(make(layer, "nestling").double(), x, mask)
    with fake_fla() as fake, float32_is_float64():
        found = run(make(layer, "fla").double(), x, mask)
    close(found, wanted)
    assert [name for name, _ in fake.calls] == ["gated_delta_rule" if "delta" in layer else "simple_gla"] * 2


@pytest.mark.parametrize("layer", ["retnet", "gated deltanet", "mamba2"])
def test_autocast_and_the_models_dtype_set_the_precision(layer: str) -> None:
    x = noise(2, 9, 12).float()
    with fake_fla() as fake:
        made = make(layer, "fla")
        made(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, state = made(x)
        y, _ = made.bfloat16()(x.bfloat16())
    assert [dtype for _, dtype in fake.calls] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert state.weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("layer", LAYERS)
def test_without_a_gpu_the_first_forward_pass_says_so(layer: str) -> None:
    made = make(layer, "fla")
    with pytest.raises(ValueError, match=r"kernel='fla' runs on CUDA GPUs and the memory is on cpu"):
        made(noise(1, 3, 12).float())


@pytest.mark.parametrize("config", [LinearMemoryConfig, Mamba2Config])
def test_unknown_kernels_are_refused(config: type[LinearMemoryConfig] | type[Mamba2Config]) -> None:
    with pytest.raises(ValueError, match="kernel is one of 'nestling', 'fla', not 'triton'"):
        config(hidden_size=8, num_heads=2, kernel="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILY)
def test_a_config_with_their_kernels_loads_anywhere(name: str, tmp_path: Path) -> None:
    """The choice survives saving; another one reads the same weights."""
    shape = {"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = NestlingForCausalLM(presets.PRESETS[name](kernel="fla", **shape))
    model.save_pretrained(tmp_path)
    again = NestlingConfig.from_pretrained(tmp_path)
    assert again.blocks == model.config.blocks
    kernels = {block["mixer"].get("kernel") for block in again.blocks}
    assert kernels - {None} == {"fla"}
    ids = torch.arange(5, 12)[None]
    with pytest.raises(ValueError, match="runs on CUDA GPUs"):
        NestlingForCausalLM.from_pretrained(tmp_path)(ids)
    ours = presets.PRESETS[name](**shape)
    assert {block["mixer"].get("kernel") for block in ours.blocks} - {None} == {"nestling"}
    assert torch.isfinite(NestlingForCausalLM.from_pretrained(tmp_path, config=ours)(ids).logits).all()


def test_nothing_imports_flash_linear_attention_unasked() -> None:
    code = (
        "import sys, torch, nestling\n"
        f"for name in {FAMILY}:\n"
        "    config = nestling.presets.PRESETS[name](hidden_size=16, num_layers=2, num_heads=2)\n"
        "    nestling.NestlingForCausalLM(config)(torch.arange(5)[None]).logits.sum().backward()\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'fla'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("layer", LAYERS)
def test_kernels(layer: str, autocast: bool) -> None:
    """Their kernels and our code: error ratios within the rounding of TF32 and bfloat16, gradients too."""
    pytest.importorskip("triton")
    wide = {"state_size": 64} if layer == "mamba2" else {"key_dim": 32}
    x = noise(3, 193, 96).float().cuda().requires_grad_()
    mask = padding(3, 193).cuda()
    theirs, ours = (make(layer, kernel, 96, **wide).cuda() for kernel in ("fla", "nestling"))
    names = ["y", "weight", "x", *(name for name, _ in ours.named_parameters())]
    limit = 4e-2 if autocast else 5e-3

    def compare(gradients: bool) -> dict[str, float]:
        precision = torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast)
        with precision, torch.set_grad_enabled(gradients):
            pairs = zip(names, *(run(made, x, mask, gradients) for made in (theirs, ours)), strict=False)
        return {name: ratio for name, a, b in pairs if not (ratio := error_ratio(a, b)) < limit}

    assert not compare(gradients=False)
    with skip_refused_triton():
        assert not compare(gradients=True)
