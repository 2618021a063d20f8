"""`fla_scan` against `chunk_scan`; the kernels themselves need a GPU, so on a CPU their naive references stand in."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling.layers.scalar_retention import scan_memory
from nestling.ops import fla_kernels
from nestling.ops.fla_kernels import fla_scan
from tests.fake_fla import KERNELS, FakeKernels, error_ratio, fake_fla, skip_refused_triton
from tests.layers.battery import close, noise, weigh
from tests.oracles import float32_is_float64

BATCH, HEADS = 2, 3
FORMS = {
    "linear attention": (False, False, False),
    "linear attention with rates": (False, False, True),
    "retention": (False, True, False),
    "retention with rates": (False, True, True),
    "delta rule": (True, False, True),
    "gated delta rule": (True, True, True),
}
"""erase, retention, inner_lr."""
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def sample(form: str, time: int, keys: int, values: int) -> dict[str, Tensor]:
    """Leaves; some tokens are not there (l = log a = 0), and rates exceed 1."""
    _, retention, rates = FORMS[form]
    shape, there = (BATCH, HEADS, time), torch.ones(BATCH, 1, time, dtype=torch.float64)
    there[0, :, time // 2 :] = 0
    k, q = noise(*shape, keys, seed=1), noise(*shape, keys, seed=2)
    found = {
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": noise(*shape, values, seed=3),
        "q": q / q.norm(dim=-1, keepdim=True),
        "weight": noise(BATCH, HEADS, values, keys, seed=4),
    }
    if rates:
        found["inner_lr"] = there * 2 * torch.sigmoid(noise(*shape, seed=5))
    if retention:
        found["log_retention"] = -there * torch.nn.functional.softplus(noise(*shape, seed=6) - 2)
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def both(form: str, t: dict[str, Tensor], precision: torch.dtype, gradients: bool = True) -> list[list[Tensor]]:
    """Output, last weights and all gradients, by their kernel and by our code."""
    found = []
    for kernel in ("fla", "nestling"):
        y, last = scan_memory(**t, kernel=kernel, chunk_size=16, erase=FORMS[form][0], precision=precision)
        scalar = weigh(y.double().cpu()) + weigh(last.double().cpu(), seed=8)
        found.append([y, last, *(torch.autograd.grad(scalar, list(t.values())) if gradients else ())])
    return found


@pytest.mark.parametrize("time", [1, 17])
@pytest.mark.parametrize(("keys", "values"), [(4, 6), (5, 3), (3, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_layout_scale_and_state(form: str, keys: int, values: int, time: int) -> None:
    """To rounding in float64, gradients of the initial state and of the rates included."""
    with fake_fla() as fake, float32_is_float64():
        theirs, ours = both(form, sample(form, time, keys, values), torch.float64)
    close(theirs, ours)
    assert theirs[1].is_contiguous()
    assert [name for name, _ in fake.calls] == ["gated_delta_rule" if FORMS[form][0] else "simple_gla"]


@pytest.mark.parametrize("form", FORMS)
def test_precision_of_the_operands(form: str) -> None:
    """bfloat16 in a bfloat16 model, else float32; results keep the state's dtype."""
    for precision in (torch.float32, torch.float16, torch.bfloat16):
        t = {name: tensor.detach().float() for name, tensor in sample(form, 17, 5, 3).items()}
        with fake_fla() as fake:
            y, last = scan_memory(**t, kernel="fla", chunk_size=16, erase=FORMS[form][0], precision=precision)
        narrow = precision == torch.bfloat16
        assert [dtype for _, dtype in fake.calls] == [torch.bfloat16 if narrow else torch.float32]
        assert y.dtype == last.dtype == torch.float32
        assert y.shape == t["v"].shape
        wanted, _ = scan_memory(**t, kernel="nestling", chunk_size=16, erase=FORMS[form][0])
        assert error_ratio(y, wanted) < (2e-2 if narrow else 1e-5)


@pytest.mark.parametrize("package", KERNELS)
def test_the_stand_in_has_the_kernels_signature(package: str) -> None:
    """Same parameters in the same order, as far as they are used, in the installed sources."""
    fla = importlib.util.find_spec("fla")
    if fla is None or fla.origin is None:
        pytest.skip("fla-core is not installed (make setup)")
    tree = ast.parse((Path(fla.origin).parent / "ops" / package / "chunk.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == KERNELS[package])
    theirs = [argument.arg for argument in function.args.args]
    ours = list(inspect.signature(getattr(FakeKernels(), KERNELS[package])).parameters)
    assert [name for name in theirs if name in ours] == ours


def test_what_the_kernels_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    t = {name: tensor.detach().float() for name, tensor in sample("delta rule", 3, 4, 4).items()}
    with pytest.raises(ValueError, match=r"kernel='fla' runs on CUDA GPUs and the memory is on cpu: move .*'nestling'"):
        fla_scan(**t, erase=True)
    monkeypatch.setattr(fla_kernels, "DEVICE", "cpu")
    with pytest.raises(ValueError, match=r"state in float32, not torch\.float64"):
        fla_scan(**{name: tensor.double() for name, tensor in t.items()}, erase=True)
    with pytest.raises(ValueError, match="erase=True needs inner_lr"):
        fla_scan(**t | {"inner_lr": None}, erase=True)
    wide = {name: tensor.detach().float() for name, tensor in sample("delta rule", 1, 257, 2).items()}
    with pytest.raises(ValueError, match="keys of at most 256 channels, not 257: use more heads"):
        fla_scan(**wide, erase=True)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ImportError, match=r"kernel='fla' needs .*Triton \(.*fla.*\): pip install 'nestling\[fla\]'"):
        fla_scan(**t, erase=True)


@pytest.mark.parametrize(("triton", "major", "refused"), [("3.6.0", 9, True), ("3.7.1", 9, False), ("3.6.0", 8, False)])
def test_gradients_that_would_be_wrong_are_refused(
    monkeypatch: pytest.MonkeyPatch, triton: str, major: int, refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    with pytest.raises(RuntimeError, match=r"upgrade Triton to 3\.7\.1") if refused else nullcontext():
        fla_kernels._check_triton(torch.device("cuda"))


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "form", ["linear attention with rates", "retention with rates", "delta rule", "gated delta rule"]
)
def test_kernels(form: str, precision: torch.dtype) -> None:
    """Outputs, last weights and gradients within the rounding of TF32 and bfloat16. The kernels compile for minutes."""
    pytest.importorskip("triton")
    t = {n: x.detach().float().cuda().requires_grad_() for n, x in sample(form, 193, 24, 33).items()}
    limit = 2e-2 if precision == torch.bfloat16 else 4e-3

    def compare(gradients: bool) -> dict[str, float]:
        with torch.set_grad_enabled(gradients):
            pairs = zip(["y", "last weight", *t], *both(form, t, precision, gradients), strict=False)
        return {name: ratio for name, a, b in pairs if not (ratio := error_ratio(a, b)) < limit}

    assert not compare(gradients=False)
    with skip_refused_triton():
        assert not compare(gradients=True)
