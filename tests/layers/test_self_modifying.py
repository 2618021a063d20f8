"""Self-modifying Titans: equal to the token-by-token reference, and settings that must equal one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.self_modifying import SelfModifyingConfig, SelfModifyingState, SelfModifyingTitans
from tests.layers.reference_self_modifying import reference, state_memories

MATRIX: dict[str, Any] = {"memory": "matrix"}
MLP: dict[str, Any] = {"memory": "mlp"}

WHOLE: dict[str, Any] = {
    "gradient": "online",
    "share_of": "rate",
    "own_streams": True,
    "anchored": True,
    "identity": True,
    "others_scale": 0.3,
    "generation_gain": 0.6,
    "hidden_lr_scale": 0.2,
    "rate_stretch": 1.3,
    "gate_bias": 1.0,
    "value_length": 1.4,
}

CASES: dict[str, dict[str, Any]] = {
    "matrix": MATRIX,
    "matrix no erase": MATRIX | {"erase": False},
    "matrix momentum": MATRIX | {"momentum": True},
    "matrix momentum no erase": MATRIX | {"momentum": True, "erase": False},
    "matrix online": MATRIX | {"gradient": "online"},
    "matrix online momentum": MATRIX | {"gradient": "online", "momentum": True},
    "matrix online no erase": MATRIX | {"gradient": "online", "erase": False},
    "matrix online dot": MATRIX | {"gradient": "online", "objective": "dot"},
    "matrix dot no erase no retention": MATRIX | {"objective": "dot", "erase": False, "use_retention": False},
    "matrix lp": MATRIX | {"objective": "lp"},
    "matrix huber": MATRIX | {"objective": "huber", "delta": 0.4},
    "matrix chunk read": MATRIX | {"read": "chunk"},
    "matrix read before momentum": MATRIX | {"read_before": True, "momentum": True},
    "matrix self chunk momentum": MATRIX | {"self_chunk_size": 8, "momentum": True},
    "matrix self chunk online": MATRIX | {"self_chunk_size": 8, "gradient": "online"},
    "matrix self chunk no erase": MATRIX | {"self_chunk_size": 8, "erase": False},
    "matrix chunk 1": MATRIX | {"chunk_size": 1, "momentum": True},
    "matrix one chunk": MATRIX | {"chunk_size": 64, "momentum": True},
    "matrix no self targets": MATRIX | {"self_targets": False},
    "matrix memory only": MATRIX | {"adapt": ("memory",), "gradient": "online", "self_targets": False},
    "matrix adaptive q": MATRIX | {"adapt": ("memory", "k", "v", "q", "eta", "alpha"), "momentum": True},
    "mlp": MLP,
    "mlp no erase": MLP | {"erase": False},
    "mlp momentum": MLP | {"momentum": True, "activation": "gelu"},
    "mlp momentum no erase": MLP | {"momentum": True, "erase": False},
    "mlp online": MLP | {"gradient": "online", "activation": "relu"},
    "mlp online momentum": MLP | {"gradient": "online", "momentum": True},
    "mlp online no erase": MLP | {"gradient": "online", "erase": False},
    "mlp online dot": MLP | {"gradient": "online", "objective": "dot"},
    "mlp dot momentum": MLP | {"objective": "dot", "momentum": True},
    "mlp lp": MLP | {"objective": "lp", "p": 2.5},
    "mlp huber momentum": MLP | {"objective": "huber", "delta": 0.4, "momentum": True},
    "mlp clipped": MLP | {"clip": 0.2, "momentum": True},
    "mlp clipped online": MLP | {"clip": 0.2, "gradient": "online"},
    "mlp chunk read": MLP | {"read": "chunk", "momentum": True},
    "mlp read before": MLP | {"read_before": True},
    "mlp self chunk momentum": MLP | {"self_chunk_size": 8, "momentum": True},
    "mlp self chunk 1 in 8": MLP | {"chunk_size": 1, "self_chunk_size": 8},
    "mlp chunk 1": MLP | {"chunk_size": 1, "momentum": True},
    "mlp no self targets": MLP | {"self_targets": False, "momentum": True},
    "mlp memory and k": MLP | {"adapt": ("memory", "k"), "self_chunk_size": 8},
    "mlp adaptive q": MLP | {"adapt": ("memory", "q", "v"), "momentum": True},
    "mlp no retention": MLP | {"use_retention": False, "momentum": True},
    "mlp depth 3 expansion 2": MLP | {"depth": 3, "expansion": 2, "momentum": True},
    "mlp depth 3 online self chunk": MLP | {"depth": 3, "gradient": "online", "self_chunk_size": 8},
    "matrix share of rate": MATRIX | {"gradient": "online", "share_of": "rate"},
    "matrix anchored momentum": MATRIX | {"anchored": True, "momentum": True},
    "matrix other rates": MATRIX | {"anchored": True, "others_scale": 0.3},
    "matrix own streams": MATRIX | {"own_streams": True, "adapt": ("memory", "k", "q", "eta")},
    "matrix whole": MATRIX | WHOLE,
    "matrix whole self chunk": MATRIX | WHOLE | {"self_chunk_size": 8},
    "matrix whole chunk read": MATRIX | WHOLE | {"read": "chunk"},
    "mlp share of rate": MLP | {"gradient": "online", "share_of": "rate"},
    "mlp online no self targets": MLP | {"gradient": "online", "self_targets": False},
    "mlp anchored momentum": MLP | {"anchored": True, "momentum": True},
    "mlp other rates momentum": MLP | {"anchored": True, "others_scale": 0.3, "momentum": True},
    "mlp own streams": MLP | {"own_streams": True, "adapt": ("memory", "v", "alpha")},
    "mlp whole": MLP | WHOLE,
    "mlp whole self chunk": MLP | WHOLE | {"self_chunk_size": 8, "activation": "gelu"},
    "mlp whole depth 3": MLP | WHOLE | {"depth": 3, "expansion": 2, "adapt": ("memory", "k", "v", "q", "eta", "alpha")},
    "mlp whole no self targets": MLP | WHOLE | {"self_targets": False},
    "mlp whole memory only": MLP | WHOLE | {"adapt": ("memory",), "read_before": True},
    "mlp plain face": MLP | {"conv_size": 1, "output_gate": False, "max_erase": 1.0, "inner_lr_scale": 0.7},
}


def make_layer(seed: int = 0, **settings: Any) -> SelfModifyingTitans:
    """A float64 layer whose parameters are all away from their first values, so that no gradient is zero by luck."""
    torch.manual_seed(seed)
    config = SelfModifyingConfig(**{"hidden_size": 8, "num_heads": 2, "chunk_size": 4} | settings)
    layer = SelfModifyingTitans(config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def sample(*shape: int, seed: int = 1) -> Tensor:
    """Seeded float64 noise."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weigh(tensors: list[Tensor]) -> Tensor:
    """A scalar that depends on every entry of every tensor, with weights of its own for each."""
    return torch.stack([(t * sample(*t.shape, seed=7 + i)).sum() for i, t in enumerate(tensors)]).sum()


def gradients(scalar: Tensor, x: Tensor, layer: SelfModifyingTitans) -> dict[str, Tensor]:
    """Gradients of the input and of every parameter; zeros where nothing depends on one."""
    wanted = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(scalar, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(wanted.items(), found, strict=True)}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-8, atol: float = 1e-10) -> None:
    """Equal names and values."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def run_layer(layer: SelfModifyingTitans, x: Tensor, of: str = "") -> dict[str, Tensor]:
    """Output, the tensors of the final state that have `of` in their name, and gradients through all of these."""
    y, state = layer(x)
    tensors = {n: t for n, t in state.tensors() if t.is_floating_point() and of in n}
    return {"y": y, **tensors, **gradients(weigh([y, *tensors.values()]), x, layer)}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_token_by_token_reference(name: str) -> None:
    layer = make_layer(**CASES[name])
    time = 13 if layer.config.outer_chunk == 8 else 9
    x = sample(2, time, 8).requires_grad_()
    found, wanted = [], []
    y, state = layer(x)
    expected, memories = reference(layer, x)
    assert isinstance(state, SelfModifyingState)
    for key, memory in state_memories(layer, state).items():
        found += [*memory.start, *memory.running, *(memory.surprise if layer.config.momentum else [])]
        slow = memories[key]
        wanted += [*slow.start, *slow.running, *(slow.surprise if layer.config.momentum else [])]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    assert len(found) == len(wanted)
    for fast, slow_tensor in zip(found, wanted, strict=True):
        torch.testing.assert_close(fast, slow_tensor, rtol=1e-9, atol=1e-11)
    assert_same(gradients(weigh([y, *found]), x, layer), gradients(weigh([expected, *wanted]), x, layer))


@pytest.mark.parametrize(
    "name", ["matrix", "mlp momentum", "mlp self chunk momentum", "mlp adaptive q", "matrix whole", "mlp whole"]
)
def test_everything_that_is_learned_receives_a_gradient(name: str) -> None:
    """Every parameter, every head, and every memory's initial weights apart, for a loss of the output alone."""
    layer = make_layer(**CASES[name])
    y, _ = layer(sample(2, 20, 8))
    layer.zero_grad()
    weigh([y]).backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key
    for bank in (layer.main, layer.own, layer.fixed):
        for weight in [] if bank is None else bank.initial:
            assert weight.grad is not None
            rows = weight.grad.abs().sum(-1)
            assert bool((rows > 0).all()), "some row of some memory's initial weights learns nothing"


@pytest.mark.parametrize(
    "settings",
    [
        MATRIX | {"momentum": True},
        MATRIX | {"gradient": "online", "self_chunk_size": 4},
        MLP | {"momentum": True},
        MLP | {"erase": False, "self_chunk_size": 4},
        MATRIX | WHOLE,
        MLP | WHOLE | {"self_chunk_size": 4},
    ],
    ids=str,
)
def test_gradcheck_of_the_whole_layer(settings: dict[str, Any]) -> None:
    layer = make_layer(hidden_size=4, chunk_size=2, conv_size=2, **settings)
    names = [n for n, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    x = sample(1, 3, 4).requires_grad_()

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        # The zero: a difference to the first weights that has not begun to change depends on nothing.
        return (y, *(t + 0 * y.sum() for _, t in state.tensors() if t.is_floating_point()))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", ["matrix online", "mlp momentum", "mlp self chunk momentum"])
def test_checkpointing_changes_nothing(name: str, stride: int) -> None:
    plain, thrifty = make_layer(**CASES[name]), make_layer(**CASES[name], checkpoint_chunks=stride)
    x = sample(2, 23, 8).requires_grad_()
    assert_same(run_layer(thrifty, x), run_layer(plain, x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matrix", "mlp momentum"])
def test_compiled_chunks_change_nothing(name: str) -> None:
    plain, compiled = make_layer(**CASES[name]), make_layer(**CASES[name], compile_chunks=True)
    x = sample(2, 11, 8).requires_grad_()
    assert_same(run_layer(compiled, x), run_layer(plain, x))
