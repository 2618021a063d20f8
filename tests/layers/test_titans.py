"""Memory as context, gate and layer: equal to loops over tokens, and the order of reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.layers.long_term_memory import LongTermMemory, LongTermState, Retrieval
from nestling.layers.neural_memory_config import MemoryAsContextConfig, MemoryAsGateConfig, MemoryAsLayerConfig
from nestling.layers.sequence import Aligned
from nestling.layers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from tests.layers.battery import noise, weigh
from tests.layers.reference_titans import SlowMemory, slow_context, slow_gate, slow_layer
from tests.layers.test_neural_memory import assert_equals_reference, shake

Combination = MemoryAsContext | MemoryAsGate | MemoryAsLayer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mac": ("mac", {"segment_size": 4}),
    "mac depth 1 no momentum": ("mac", {"segment_size": 4, "depth": 1, "momentum": False, "persistent_tokens": 1}),
    "mac two chunks a segment": ("mac", {"segment_size": 8, "rates": "chunk"}),
    "mac online": ("mac", {"segment_size": 8, "gradient": "online"}),
    "mac one segment": ("mac", {"segment_size": 32, "conv_size": 1}),
    "mac segments of 1": ("mac", {"segment_size": 1, "chunk_size": 1}),
    "mag": ("mag", {"window": 5}),
    "mag window 1 depth 3": ("mag", {"window": 1, "depth": 3, "rates": "chunk"}),
    "mag wide window": ("mag", {"window": 40, "erase": True, "persistent_tokens": 5}),
    "mag online": ("mag", {"window": 5, "gradient": "online", "depth": 1}),
    "mal": ("mal", {"window": 5}),
    "mal online": ("mal", {"window": 5, "gradient": "online", "max_erase": 2.0}),
    "mal depth 1 wide window": ("mal", {"window": 40, "depth": 1, "output_gate": False, "persistent_tokens": 1}),
}
SLOW: dict[str, Callable[[Any, Tensor, SlowMemory], Tensor]] = {
    "mac": slow_context,
    "mag": slow_gate,
    "mal": slow_layer,
}


def make(kind: str, **settings: Any) -> Combination:
    """A float64 layer whose parameters are all away from their first values."""
    torch.manual_seed(0)
    settings = {"hidden_size": 8, "num_heads": 2, "chunk_size": 4, "persistent_tokens": 2} | settings
    made: dict[str, Callable[[], Combination]] = {
        "mac": lambda: MemoryAsContext(MemoryAsContextConfig(**settings)),
        "mag": lambda: MemoryAsGate(MemoryAsGateConfig(**settings)),
        "mal": lambda: MemoryAsLayer(MemoryAsLayerConfig(**settings)),
    }
    layer = made[kind]().double()
    shake(layer)
    return layer


def core(layer: Combination) -> LongTermMemory:
    """The long-term memory inside."""
    return layer.memory.memory if isinstance(layer, MemoryAsLayer) else layer.memory


@pytest.mark.parametrize(
    ("kind", "settings"), [("mac", {"segment_size": 2}), ("mag", {"window": 3}), ("mal", {"window": 3})]
)
def test_gradcheck_of_the_whole_layer(kind: str, settings: dict[str, Any]) -> None:
    layer = make(kind, hidden_size=4, chunk_size=2, conv_size=2, persistent_tokens=1, **settings)
    names = [n for n, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, state = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return (y, *(t for _, t in state.tensors() if t.is_floating_point() and t.requires_grad))

    assert torch.autograd.gradcheck(run, (noise(1, 5, 4).requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_equals_loops_over_tokens(name: str) -> None:
    kind, settings = CASES[name]
    layer = make(kind, **settings)
    x = noise(2, 11, 8).requires_grad_()
    slow = SlowMemory(core(layer), 2)
    expected = SLOW[kind](layer, x, slow)
    y, state = layer(x)
    assert_equals_reference(layer, slow, x, y, expected, state.memory)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["mac", "mag", "mal"])
def test_long_calls_equal_decoding(kind: str) -> None:
    """Lengths at which windows go block by block and segments change several times."""
    settings = {"segment_size": 16} if kind == "mac" else {"window": 20}
    layer = make(kind, chunk_size=16, **settings)
    x = noise(1, 300, 8)
    with torch.no_grad():
        whole, _ = layer(x)
        parts, state = [], None
        for part in x.split([1] * 40 + [260], 1):
            y, state = layer(part, state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-8, atol=1e-10)


def test_mac_retrieves_before_the_segment_writes() -> None:
    """The order of Eq. 21-25: recall, write, recall, write; recall gets the weights the last segment ended with."""
    layer = make("mac", segment_size=4)
    events: list[tuple[str, Tensor]] = []

    def listen(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, LongTermState | Retrieval]) -> None:
        state = output[1]
        recall = isinstance(state, Retrieval)
        events.append(("recall", state.weights[0]) if recall else ("write", state.bank.running[0]))

    core(layer).register_forward_hook(listen)
    first = layer.init_state(1).memory.bank.running[0]  # type: ignore[union-attr]
    layer(noise(1, 12, 8))
    assert [name for name, _ in events] == ["recall", "write"] * 3
    recalled = [w for name, w in events if name == "recall"]
    written = [w for name, w in events if name == "write"]
    for found, wanted in zip(recalled, [first, *written[:2]], strict=True):
        torch.testing.assert_close(found, wanted)


def attention_and_answers(layer: MemoryAsContext, x: Tensor) -> tuple[Tensor, Tensor]:
    """What every token's attention says, and what it reads from the memory, `[N, T, hidden]` each."""
    heard: list[Tensor] = []
    answers: list[Tensor] = []

    def listen(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, LongTermState | Retrieval]) -> None:
        if isinstance(output[1], LongTermState):
            heard.append(args[0])
            answers.append(output[0])

    handle = layer.memory.register_forward_hook(listen)
    layer(x)
    handle.remove()
    return torch.cat(heard, 1), torch.cat(answers, 1)


def test_mac_attention_sees_no_write_of_its_own_segment() -> None:
    """Values are used by writes only. Attention in segment 1 depends on none, later on those of earlier segments; the
    memory's answer to a token depends on the token's own."""
    layer = make("mac", segment_size=4)
    assert isinstance(layer, MemoryAsContext)
    used = layer.memory.in_proj.weight
    heard, answers = attention_and_answers(layer, noise(1, 12, 8))

    def of_values(scalar: Tensor) -> bool:
        (found,) = torch.autograd.grad(scalar, used, retain_graph=True)
        return bool(found[16:].any())

    assert [of_values(weigh(heard[:, t])) for t in range(12)] == [t >= 4 for t in range(12)]
    assert all(of_values(weigh(answers[:, t])) for t in range(12))


def test_mac_writes_what_the_attention_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is written with y_t, which depends on the persistent tokens, and not with x_t (Eq. 24)."""
    layer = make("mac", segment_size=4)
    assert isinstance(layer, MemoryAsContext)
    before = layer.init_state(1).memory.bank.running[0]
    _, state = layer(noise(1, 4, 8))
    learned = state.memory.bank.running[0] - before  # type: ignore[attr-defined]
    (found,) = torch.autograd.grad(weigh(learned), layer.persistent)
    assert bool(found.any())


@pytest.mark.parametrize("kind", ["mac", "mag", "mal"])
def test_everything_that_is_learned_receives_a_gradient(kind: str) -> None:
    layer = make(kind, segment_size=4) if kind == "mac" else make(kind, window=5)
    weigh(layer(noise(2, 20, 8))[0]).backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key


@pytest.mark.parametrize("kind", ["mag", "mal"])
def test_persistent_tokens_are_seen_beyond_the_window(kind: str) -> None:
    """With a memory that says nothing of them: attention alone must reach them from any distance."""
    layer = make(kind, window=3)
    x = noise(1, 30, 8)
    with torch.no_grad():
        _, state = layer(x)
    prefix = layer.persistent if kind == "mag" else state.prefix.requires_grad_()  # type: ignore[attr-defined]
    y, _ = layer(x[:, :1], state)
    (found,) = torch.autograd.grad(weigh(y), prefix)
    assert bool(found.any())


def test_persistent_tokens_mean_the_same_at_any_distance() -> None:
    """A window of constant tokens gives the same attention wherever it stands: prefix scores carry no position."""
    layer = make("mag", window=3)
    assert isinstance(layer, MemoryAsGate)
    x = noise(1, 1, 8).expand(1, 40, 8)
    prefix = layer.persistent.expand(1, -1, -1)
    y, _ = layer.attention(x, layer.attention.first_state(x), Aligned(), prefix)
    torch.testing.assert_close(y[:, 5:], y[:, 5:6].expand(1, 35, 8))


def test_states_are_bounded() -> None:
    """Caches do not grow with the text."""
    x = noise(1, 100, 8)
    for kind, settings in (("mac", {"segment_size": 4}), ("mag", {"window": 5}), ("mal", {"window": 5})):
        layer = make(kind, **settings)
        with torch.no_grad():
            _, state = layer(x)
            assert layer(x, state)[1].nbytes == state.nbytes, kind


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (
            lambda: MemoryAsContextConfig(hidden_size=8, num_heads=2, chunk_size=4, segment_size=6),
            "is not a multiple of",
        ),
        (lambda: MemoryAsContextConfig(hidden_size=6, num_heads=2), "even multiple of num_heads"),
        (lambda: MemoryAsGateConfig(hidden_size=8, num_heads=2, window=0), "window must be at least 1"),
        (lambda: MemoryAsLayerConfig(hidden_size=8, num_heads=2, persistent_tokens=0), "persistent_tokens must be"),
    ],
)
def test_refuses_in_words(make_config: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config()


@pytest.mark.parametrize("kind", ["mac", "mag", "mal"])
def test_a_state_of_another_layer_is_refused(kind: str) -> None:
    layer, other = make(kind), make("mag" if kind == "mac" else "mac")
    x = noise(1, 3, 8)
    with pytest.raises(TypeError, match="continues from a"):
        layer(x, other(x)[1])
