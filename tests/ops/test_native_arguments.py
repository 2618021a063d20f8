"""What the compiled functions are called with: one declaration, and an error where something does not fit it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingTitans
from nestling.ops import native
from nestling.ops.native import arguments, build
from nestling.ops.native.arguments import Field, declared, enumerators
from nestling.ops.short_conv import short_conv

compiled = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


def rows() -> dict[str, object]:
    """The arguments of a call of the smallest function."""
    m = torch.ones(2, 3)
    numbers = {"rows": 2, "width": 3, "threads": 1, "scale": "literal", "kept": 0.5, "delta": 0.0}
    return {**numbers, "m": m, "keys": torch.ones(2, 3), "values": torch.zeros(2, 3)}


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_what_is_declared_compiles() -> None:
    """Where there is a compiler the other tests must not be left out in silence."""
    assert build.library() is not None


def test_every_structure_is_some_functions() -> None:
    """What no function takes is read for nothing."""
    taken = {name for names in build._FUNCTIONS.values() for name in names}
    assert taken == set(declared())


def test_names_come_from_the_declaration() -> None:
    """A few fields of every form, in their order."""
    fields = {field.name: field for field in declared()["LoopArguments"].fields}
    assert list(fields)[:3] == ["problems", "heads", "tokens"]
    assert fields["start"] == Field("start", "P", native.MAX_LAYERS)
    assert fields["given"].names == enumerators("Role") == ("k_role", "v_role", "q_role", "eta_role", "alpha_role")
    assert fields["kind"].names == ("online", "erase", "free", "dot", "split") and fields["kind"].count is None
    assert fields["clip"].code == "d" and fields["d_start"].backward and not fields["dot"].backward
    assert {f.name for f in declared()["ChunkArguments"].fields if f.bytes} == {"valid"}


@pytest.mark.parametrize(
    "member",
    ["int32_t n", "T clip", "float x", "const T **lr", "T* y[8]", "std::vector<T> room", "T& y", "Unknown kind"],
)
def test_a_member_that_python_cannot_lay_out_is_refused(member: str) -> None:
    """Rather than skipped, which would move every field after it."""
    with pytest.raises(ValueError):
        arguments._fields("here.h", f"    int64_t n;\n    {member};\n")


@pytest.mark.parametrize("change", [{"kept": None}, {"width_": 3}], ids=["missing", "unknown"])
def test_fields_are_named(change: dict[str, object]) -> None:
    """A field that was forgotten, or one that there is not, is an error that names it."""
    given = {name: value for name, value in (rows() | change).items() if value is not None}
    with pytest.raises(TypeError, match=next(iter(change))):
        build.call("delta_rows", torch.float32, False, given)


def test_results_are_never_left_out() -> None:
    """Only the gradients of a forward pass may be: whatever else is missing would be written through a null."""
    chunk = declared()["ChunkArguments"]
    given = {f.name: 1 if f.code == "q" else None for f in chunk.fields if not f.backward}
    chunk.pack(given, torch.float32, back=False)
    with pytest.raises(TypeError, match="dW"):
        chunk.pack(given, torch.float32, back=True)
    with pytest.raises(TypeError, match="W2"):
        chunk.pack({n: v for n, v in given.items() if n != "W2"}, torch.float32, back=False)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 3, device="meta"), "on the device 'meta'"),
        (torch.ones(2, 3, dtype=torch.float64), "float64"),
        (torch.ones(3, 2).T, "not contiguous"),
    ],
    ids=["elsewhere", "dtype", "order"],
)
def test_tensors_that_compiled_code_cannot_read(tensor: torch.Tensor, words: str) -> None:
    """Their address says nothing of that."""
    with pytest.raises(ValueError, match=words):
        build.call("delta_rows", torch.float32, False, rows() | {"keys": tensor})


def test_arrays_have_room_for_the_layers_of_the_declaration() -> None:
    """One more would overwrite the next field."""
    field = Field("start", "P", native.MAX_LAYERS)
    assert field.values([None], torch.float32) == [0] * native.MAX_LAYERS
    with pytest.raises(ValueError, match="room for 8 layers"):
        field.values([None] * 9, torch.float32)
    with pytest.raises(TypeError, match="needs k_role"):
        Field("made", "q", 5, enumerators("Role")).values({"k_role": 0}, torch.float32)


@compiled
def test_a_library_of_another_declaration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not called, and not left for torch in silence."""
    loop = declared()["LoopArguments"]
    other = {**declared(), "LoopArguments": replace(loop, fields=loop.fields[1:])}
    monkeypatch.setattr(build, "declared", lambda: other)
    build.library.cache_clear()
    try:
        with pytest.raises(ImportError, match="LoopArguments has"):
            build.library()
    finally:
        build.library.cache_clear()


@compiled
@pytest.mark.parametrize("settings", [{}, {"self_chunk_size": 14}, {"memory": "matrix"}], ids=str)
@pytest.mark.parametrize("what", ["weights", "state"])
def test_what_is_elsewhere_is_said(settings: dict, what: str) -> None:
    """Weights that were offloaded, or a state that was left behind, end in a sentence, whichever way the layer runs."""
    layer = SelfModifyingTitans(SelfModifyingConfig(**{"hidden_size": 8, "num_heads": 1, "chunk_size": 7} | settings))
    x = torch.randn(1, 6, 8)
    _, state = layer(x)
    if what == "weights":
        layer.main.to("meta")
        state = None
    else:
        state = replace(state, main=state.main.to(torch.device("meta")))
    with pytest.raises(ValueError, match="is on the device 'meta', but compiled memories read the CPU's memory"):
        layer(x, state)


@compiled
def test_a_filter_that_is_elsewhere_is_said() -> None:
    """The short convolution has a weight too."""
    with pytest.raises(ValueError, match="weight is on the device 'meta'"):
        short_conv(torch.randn(1, 5, 3), torch.ones(3, 2, device="meta"), torch.zeros(1, 1, 3))
