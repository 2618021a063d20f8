"""The rule, configured by each row of the linear family, and the layers against flash-linear-attention's references.

Their code casts to float32; it runs in float64 here (`tests.oracles.float32_is_float64`), but for the functions that do
not cast. Their queries are scaled by K^-0.5 and their state is `[K, V]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.layers.linear import LinearMemory
from nestling.layers.linear_config import LinearMemoryConfig
from nestling.layers.scalar_retention import fixed_log_retention
from nestling.ops.chunk_rule import chunk_scan
from tests.layers.battery import close, noise, weigh
from tests.layers.reference_linear import ROWS, Tokens, finish, tokens_of
from tests.oracles import fla_naive, float32_is_float64

BATCH, HEADS, KEYS, VALUES = 2, 3, 5, 4
LENGTHS = (1, 63, 65, 130)
Found = tuple[Tensor, Tensor | None]


def sample(time: int) -> dict[str, Tensor]:
    """Inputs `[B, T, H, D]`, rates `[B, T, H]`, a first state `[B, H, K, V]` and a first sum of keys, all leaves."""
    shape = (BATCH, time, HEADS)
    keys, queries = noise(*shape, KEYS, seed=1), noise(*shape, KEYS, seed=2)
    found = {
        "q": queries / queries.norm(dim=-1, keepdim=True),
        "k": keys / keys.norm(dim=-1, keepdim=True),
        "v": noise(*shape, VALUES, seed=3),
        "beta": 2 * torch.sigmoid(noise(*shape, seed=4)),
        "log_a": -torch.nn.functional.softplus(noise(*shape, seed=5) - 2),
        "state": noise(BATCH, HEADS, KEYS, VALUES, seed=6),
        "sum": noise(BATCH, 1, HEADS, KEYS, seed=7).abs(),
    }
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def scan(t: dict[str, Tensor], chunk_size: int = 64, **rates: Tensor) -> tuple[Tensor, Tensor]:
    """`chunk_scan` under flash-linear-attention's conventions; rates `[B, T, H]`."""
    q, k, v = (t[name].transpose(1, 2) for name in "qkv")
    moved = {name: rate.transpose(1, 2) for name, rate in rates.items()}
    y, weight, _ = chunk_scan(k, -v, q * KEYS**-0.5, weight=t["state"].mT, chunk_size=chunk_size, **moved)
    return y.transpose(1, 2), weight.mT


def assert_equal(inputs: dict[str, Tensor], ours: Callable[[], Found], theirs: Callable[[], Found]) -> None:
    """Outputs, final states and the gradients of all inputs; a state of None is not compared."""
    with float32_is_float64():
        wanted = theirs()
        found = ours()
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
        assert all(b.dtype == torch.float64 for _, b in pairs)
        close([a for a, _ in pairs], [b for _, b in pairs])
        for pair in pairs:
            close(*(gradients(weigh(tensor), list(inputs.values())) for tensor in pair))


def gradients(scalar: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Zeros where nothing depends on a leaf."""
    found = torch.autograd.grad(scalar, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_linear_attention(time: int, chunk_size: int) -> None:
    t, fla = sample(time), fla_naive("linear_attn")
    recurrent = partial(fla.naive_recurrent_linear_attn, t["q"], t["k"], t["v"], output_final_state=True)
    assert_equal(t, lambda: scan(t, chunk_size), lambda: recurrent(initial_state=t["state"]))


@pytest.mark.parametrize("time", LENGTHS)
def test_linear_attention_with_its_denominator_as_a_value_of_ones(time: int) -> None:
    t, fla = sample(time), fla_naive("linear_attn")
    t |= {n: t[n].detach().abs().requires_grad_() for n in "qk"}

    def ours() -> Found:
        more = torch.nn.functional.pad(t["v"], (0, 1), value=1.0)
        first = torch.cat([t["state"], t["sum"].transpose(1, 2).mT], -1)
        y, state = scan(t | {"v": more, "state": first})
        return y[..., :-1] / (y[..., -1:] + 1e-10), state

    def theirs() -> Found:
        first = (t["state"], t["sum"])
        y, (state, total) = fla.naive_recurrent_linear_attn(t["q"], t["k"], t["v"], None, first, True, True)
        return y, torch.cat([state, total.transpose(1, 2).mT], -1)

    assert_equal(t, ours, theirs)


@pytest.mark.parametrize("time", LENGTHS)
def test_retention(time: int) -> None:
    t, fla = sample(time), fla_naive("retention")
    t["state"] = torch.zeros_like(t["state"])
    rows = fixed_log_retention(HEADS, t["q"]).T.expand(BATCH, time, HEADS)

    def theirs() -> Found:
        return fla.naive_retention(*(t[n].transpose(1, 2) for n in "qkv")).transpose(1, 2), None

    leaves = {n: t[n] for n in "qkv"}
    assert_equal(leaves, lambda: scan(t, log_retention=rows), theirs)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_delta_rule(time: int, chunk_size: int) -> None:
    t, fla = sample(time), fla_naive("delta_rule")

    def theirs() -> Found:
        moved = [t[n].transpose(1, 2) for n in ("q", "k", "v", "beta")]
        y, state = fla.delta_rule_recurrence(*moved, initial_state=t["state"])
        return y.transpose(1, 2), state

    assert_equal(t, lambda: scan(t, chunk_size, erase=t["beta"], inner_lr=t["beta"]), theirs)


def test_delta_rule_against_their_chunks_which_cast_nothing() -> None:
    t, fla = sample(128), fla_naive("delta_rule")
    zero = t | {"state": torch.zeros_like(t["state"])}
    y, state = fla.delta_rule_chunkwise(*(t[n].transpose(1, 2) for n in ("q", "k", "v", "beta")))
    close(scan(zero, erase=t["beta"], inner_lr=t["beta"]), [y.transpose(1, 2), state])


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("form", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_gated_delta_rule(time: int, form: str) -> None:
    """e = a beta: they scale the state before they recall from it."""
    t, fla = sample(time), fla_naive("gated_delta_rule")

    def ours() -> Found:
        return scan(t, log_retention=t["log_a"], erase=t["log_a"].exp() * t["beta"], inner_lr=t["beta"])

    def theirs() -> Found:
        rates = {"beta": t["beta"], "g": t["log_a"], "initial_state": t["state"], "output_final_state": True}
        return getattr(fla, form)(t["q"], t["k"], t["v"], **rates)

    assert_equal(t, ours, theirs)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("writes", [1, 2, 3])
def test_gated_delta_product(time: int, writes: int) -> None:
    """A token's writes are tokens: the first alone retains, the last alone reads."""
    t, fla = sample(writes * time), fla_naive("gated_delta_product")
    first = (torch.arange(writes * time) % writes == 0).double()[:, None]
    last = slice(writes - 1, None, writes)

    def ours() -> Found:
        log_a = first * t["log_a"]
        y, state = scan(t, log_retention=log_a, erase=log_a.exp() * t["beta"], inner_lr=t["beta"])
        return y[:, last], state

    def theirs() -> Found:
        rest = {"scale": KEYS**-0.5, "initial_state": t["state"], "num_householder": writes}
        g = t["log_a"][:, ::writes]
        return fla.naive_recurrent_gated_delta_product(t["q"][:, last], t["k"], t["v"], g, t["beta"], **rest)

    assert_equal(t, ours, theirs)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_comba(time: int, form: str) -> None:
    """The paper's factor of the state is a - b beta k k^T, as in their chunks; their recurrence keeps a part first."""
    t, fla = sample(time), fla_naive("comba")
    t["share"] = torch.sigmoid(noise(HEADS, seed=8)).requires_grad_()

    def ours() -> Found:
        erase = t["share"] * t["beta"] * (t["log_a"].exp() if form == "recurrent" else 1)
        return scan(t, log_retention=t["log_a"], erase=erase, inner_lr=t["beta"])

    def theirs() -> Found:
        names = {"q": t["q"], "k": t["k"], "v": t["v"], "p": t["share"][:, None] * t["k"], "beta": t["beta"]}
        rest = {"g": t["log_a"], "initial_state": t["state"], "output_final_state": True}
        return getattr(fla, f"naive_{form}_comba")(**names, **rest)

    assert_equal(t, ours, theirs)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_state_space_duality(time: int, form: str) -> None:
    """Mamba-2 as linear attention with a scalar retention: values dt x, keys B, log a = -A dt, here A = 1.5."""
    t, fla = sample(time), fla_naive("simple_gla")

    def ours() -> Found:
        return scan(t, log_retention=-1.5 * t["beta"], inner_lr=t["beta"])

    def theirs() -> Found:
        values = t["beta"][..., None] * t["v"]
        rest = {"g": -1.5 * t["beta"], "initial_state": t["state"], "output_final_state": True}
        return getattr(fla, f"naive_{form}_simple_gla")(t["q"], t["k"], values, **rest)

    assert_equal(t, ours, theirs)


def core(row: str, t: Tokens, layer: LinearMemory) -> Tensor:
    """Their reference in the place of the layer's memory."""
    width = t.q.shape[-1]
    q = t.q * width**0.5
    if row.startswith("linear attention"):
        first = None
        if layer.initial is not None and layer.initial_sum is not None:
            first = layer.initial.mT, torch.nn.functional.softplus(layer.initial_sum)
        linear = fla_naive("linear_attn").naive_recurrent_linear_attn
        return linear(q, t.k, t.v, initial_state=first, normalize=True)[0]
    if row == "retnet":
        return fla_naive("retention").naive_retention(*(s.transpose(1, 2) for s in (q, t.k, t.v))).transpose(1, 2)
    if row == "deltanet":
        moved = [s.transpose(1, 2) for s in (q, t.k, t.v, t.strength)]
        return fla_naive("delta_rule").delta_rule_recurrence(*moved)[0].transpose(1, 2)
    if row == "gated deltaproduct":
        product = fla_naive("gated_delta_product").naive_recurrent_gated_delta_product
        return product(t.q, t.k, t.v, t.a.log(), t.strength, scale=1.0, num_householder=2)[0]
    if row == "comba":
        assert t.share is not None
        return fla_naive("comba").naive_chunk_comba(q, t.k, t.v, t.share[:, None] * t.k, t.a.log(), t.strength)[0]
    if row == "kimi delta":
        return fla_naive("kda").naive_recurrent_kda(q, t.k, t.v, t.a.log(), t.strength)[0]
    gated = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return gated(q, t.k, t.v, t.strength, t.a.log())[0]


@pytest.mark.parametrize("time", [1, 65, 130])
@pytest.mark.parametrize("row", ROWS)
def test_layers(row: str, time: int) -> None:
    """Their memory between our projections gives our layer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 12, "num_heads": 3, "norm_eps": 1e-12}
    layer = LinearMemory(LinearMemoryConfig(**settings | ROWS[row])).double()
    x = noise(2, time, 12).requires_grad_()

    def theirs() -> Found:
        t = tokens_of(layer, x)
        return finish(layer, core(row, t, layer), t.gate), None

    assert_equal({"x": x, **dict(layer.named_parameters())}, lambda: (layer(x)[0], None), theirs)
