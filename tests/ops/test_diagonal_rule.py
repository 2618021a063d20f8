"""The rule with a retention by channel equals itself token by token, and the rule with one where all agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestling.ops import native
from nestling.ops.chunk_rule import chunk_scan
from nestling.ops.diagonal_rule import BOUND, decayed_products, diagonal_scan
from nestling.ops.native import build
from nestling.ops.reference import token_diagonal_rule, token_rule
from tests.oracles import fla_naive, float32_is_float64

KEYS, VALUES = 5, 3
RULES: dict[str, tuple[str, ...]] = {
    "no erase": (),
    "erase along the key": ("recall_key",),
    "erase along a key of its own": ("recall_key", "erase_key"),
    "all rates": ("recall_key", "erase_key", "erase", "inner_lr"),
}
"""By name, the arguments that are given beside keys, values, queries, weights and retentions."""


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs through compiled code, where there is a compiler, and through torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(native, "fits", lambda *_: False)
    elif build.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample(time: int, batch: tuple[int, ...] = (2, 3), forget: float = 0.2) -> dict[str, Tensor]:
    """Leaves in float64: keys of length 1, rates in their ranges, log retentions of the size `forget`."""
    found = {name: noise(*batch, time, KEYS, seed=i) for i, name in enumerate(("k", "q", "recall_key", "erase_key"))}
    found = {name: t / t.norm(dim=-1, keepdim=True) for name, t in found.items()}
    found |= {"v": noise(*batch, time, VALUES, seed=5), "weight": noise(*batch, VALUES, KEYS, seed=6)}
    found["log_retention"] = -forget * noise(*batch, time, KEYS, seed=7).exp()
    found |= {name: torch.sigmoid(noise(*batch, time, seed=8 + i)) for i, name in enumerate(("erase", "inner_lr"))}
    return {name: t.requires_grad_() for name, t in found.items()}


def fast(t: dict[str, Tensor], names: tuple[str, ...], chunk_size: int = 8, **more: Any) -> tuple[Tensor, Tensor]:
    given: dict[str, Any] = {n: t[n] for n in (*names, "weight", "log_retention")} | more
    return diagonal_scan(t["k"], t["v"], t["q"], chunk_size=chunk_size, **given)


def slow(t: dict[str, Tensor], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    given: dict[str, Any] = {n: t[n] for n in (*names, "weight")}
    return token_diagonal_rule(t["k"], t["v"], t["q"], retention=t["log_retention"].exp(), **given)


def assert_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """Values, and the gradients of all leaves."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    grads = []
    for tensors in (found, wanted):
        scalar = sum(((t * noise(*t.shape, seed=20 + i)).sum() for i, t in enumerate(tensors)), torch.zeros(()))
        grads.append(torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None, "something receives no gradient"
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def leaves_of(t: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    return [t[n] for n in ("k", "v", "q", "weight", "log_retention", *names)]


def test_token_rule_by_hand() -> None:
    """W (diag(a) - e b c^T) + l v k^T with numbers."""
    row = [torch.tensor([[x, y]], dtype=torch.float64) for x, y in ((1, 0), (0, 1), (1, 1), (0.5, 0.25), (1, 2))]
    k, b, c, a, q = row
    v, one = torch.tensor([[10.0]]).double(), torch.ones(1).double()
    weight = torch.tensor([[4.0, 8.0]]).double()
    y, after = token_diagonal_rule(
        k, v, q, weight=weight, retention=a, recall_key=b, erase_key=c, erase=0.5 * one, inner_lr=0.1 * one
    )
    # a W = (2, 2); e (W b) c = 0.5 * 8 * (1, 1); l v k = (1, 0).
    assert after.tolist() == [[2 - 4 + 1, 2 - 4]]
    assert y.tolist() == [[-1 - 4]]


@pytest.mark.parametrize("time", [1, 2, 7, 8, 9, 21, 65])
@pytest.mark.parametrize("rule", RULES)
def test_scan_equals_the_reference(rule: str, time: int) -> None:
    t = sample(time)
    assert_equal(fast(t, RULES[rule]), slow(t, RULES[rule]), leaves_of(t, RULES[rule]))


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
@pytest.mark.parametrize("rule", RULES)
def test_chunk_size_changes_nothing(rule: str, chunk_size: int) -> None:
    t = sample(21, batch=())
    assert_equal(fast(t, RULES[rule], chunk_size), slow(t, RULES[rule]), leaves_of(t, RULES[rule]))


@pytest.mark.parametrize("forget", [0.0, 3.0, 300.0])
def test_however_fast_a_channel_forgets(forget: float) -> None:
    """Log retentions of -300 a token: their sums cannot be inverted, and nothing overflows, backward included."""
    names = RULES["all rates"]
    t = sample(40, forget=forget)
    assert_equal(fast(t, names, 32), slow(t, names), leaves_of(t, names))


@pytest.mark.parametrize("floor", [-30.0, -4.0, -1.0])
def test_a_floor_of_the_retention_changes_nothing(floor: float) -> None:
    """In float32 at the floor itself, where one product for a whole chunk comes nearest to overflowing."""
    names = RULES["all rates"]
    t = sample(150, batch=(2,))
    t["log_retention"] = torch.where(noise(2, 150, KEYS, seed=30) > 0.5, 0.01 * floor, floor).requires_grad_()
    wanted = slow(t, names)
    single = {n: s.detach().float().requires_grad_() for n, s in t.items()}
    found = fast(single, names, 64, min_log_retention=floor)
    grads = [
        torch.autograd.grad(y.sum() + weight.sum(), list(leaves.values()))
        for (y, weight), leaves in ((found, single), (wanted, t))
    ]
    for a, b in zip((*found, *grads[0]), (*wanted, *grads[1]), strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-5


def test_a_part_of_a_sequence_goes_on_where_the_last_one_ended() -> None:
    names = RULES["all rates"]
    t = sample(19)
    y, last = fast(t, names)
    rows, numbers = ("k", "v", "q", "recall_key", "erase_key", "log_retention"), ("erase", "inner_lr")
    carried = {n: t[n][..., :6, :] for n in rows} | {n: t[n][..., :6] for n in numbers} | {"weight": t["weight"]}
    first, middle = fast(carried, names)
    rest = {n: t[n][..., 6:, :] for n in rows} | {n: t[n][..., 6:] for n in numbers} | {"weight": middle}
    second, end = fast(rest, names)
    torch.testing.assert_close(torch.cat([first, second], -2), y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("time", [1, 8, 33])
def test_equal_retentions_and_keys_give_the_rule_with_one_retention(time: int) -> None:
    """W_t = a W_{t-1} - e (W_{t-1} x) x^T - l g x^T is the row b = c = k = x, v = -g."""
    t = sample(time)
    log_a = t["log_retention"][..., 0]
    rates: dict[str, Any] = {"erase": t["erase"], "inner_lr": t["inner_lr"], "weight": t["weight"]}
    one = token_rule(t["k"], -t["v"], t["q"], retention=log_a.exp(), **rates)[:2]
    scanned = chunk_scan(t["k"], -t["v"], t["q"], log_retention=log_a, chunk_size=8, **rates)[:2]
    by_channel = log_a[..., None].expand_as(t["k"])
    found = diagonal_scan(t["k"], t["v"], t["q"], log_retention=by_channel, recall_key=t["k"], chunk_size=8, **rates)
    leaves = [t[n] for n in ("k", "v", "q", "weight", "log_retention", "erase", "inner_lr")]
    assert_equal(found, one, leaves)
    assert_equal(found, scanned, leaves)


def test_tokens_that_are_not_there_change_nothing() -> None:
    names = RULES["all rates"]
    t = sample(12)
    there = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1], dtype=torch.float64)
    masked = t | {n: t[n] * there for n in ("erase", "inner_lr")}
    masked["log_retention"] = t["log_retention"] * there[:, None]
    at = there.bool()
    kept = {"weight": t["weight"]}
    kept |= {n: t[n][..., at, :] for n in ("k", "v", "q", "recall_key", "erase_key", "log_retention")}
    kept |= {n: t[n][..., at] for n in ("erase", "inner_lr")}
    y, last = fast(masked, names)
    wanted, end = fast(kept, names)
    torch.testing.assert_close(y[..., at, :], wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("floor", [-torch.inf, -30.0, -15.0, -1.0])
def test_decayed_products_are_what_they_say(floor: float) -> None:
    """Put together from blocks of 1, 2, 4 and 8 tokens."""
    rows, columns = noise(8, 2, KEYS), noise(8, 3, KEYS, seed=1)
    steps = -noise(8, KEYS, seed=2).abs().clamp_max(1)
    found = decayed_products(rows, columns, steps, (False, True), floor)
    falls = steps.cumsum(0)
    at_rows = torch.stack([falls, falls - steps], 1)
    wanted = torch.einsum("tri,sji,trsi->trsj", rows, columns, (at_rows[:, :, None] - falls).exp())
    wanted = wanted * torch.ones(8, 8).tril(-1)[:, None, :, None]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    names = RULES["all rates"]
    t = sample(5, batch=())
    keys = list(t)

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return fast(dict(zip(keys, leaves, strict=True)), names, 4)

    assert torch.autograd.gradcheck(run, tuple(t.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(t.values()), fast_mode=True)


def test_tokens_that_let_the_weights_grow_meet_the_bound() -> None:
    """I - b c^T with |b| = 1, c = s b and s in (0, 1) by channel, two kinds in turn: 1.22 a pair, and still finite."""
    b = torch.tensor([[0.3, 0.95], [0.95, 0.3]]).repeat(2000, 1)
    c = b * torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(2000, 1)
    ones = torch.ones(4000, 1)
    y, weight = diagonal_scan(
        b, ones, b, weight=torch.ones(1, 2), chunk_size=64, log_retention=0 * b, recall_key=b, erase_key=c
    )
    assert bool(y.isfinite().all()) and BOUND < float(weight.abs().max()) < 1e20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
        ({"erase": torch.ones(4)}, "an erase needs recall_key"),
        ({"erase_key": torch.ones(4, 2)}, "an erase needs recall_key"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=message):
        diagonal_scan(x, x, x, **{"weight": torch.ones(2, 2), "chunk_size": 4, "log_retention": 0 * x} | settings)


@pytest.mark.any_shapes
def test_compiled_code_refuses_what_it_cannot_read(code: str) -> None:
    """It reads raw memory."""
    t = sample(4)
    if code == "compiled":
        for name, wrong in (("q", t["q"][..., :3, :]), ("recall_key", t["recall_key"].float())):
            with pytest.raises(ValueError, match=f"{name} is .* but must be"):
                fast(t | {name: wrong}, ("recall_key",))


def theirs(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our leaves under flash-linear-attention's conventions: `[B, T, H, D]`, and a state `[B, H, K, V]`."""
    moved = {n: s.transpose(1, 2) for n, s in t.items() if n != "weight"}
    return moved | {"state": t["weight"].mT}


@pytest.mark.parametrize("time", [1, 63, 130])
def test_kimi_delta_attention(time: int) -> None:
    """Their erase recalls from what was retained: b = a k."""
    t = sample(time)
    their = theirs(t)
    with float32_is_float64():
        o, state = fla_naive("kda").naive_recurrent_kda(
            *(their[n] for n in ("q", "k", "v", "log_retention", "inner_lr")),
            scale=1.0,
            initial_state=their["state"],
            output_final_state=True,
        )
    rates = dict.fromkeys(("erase", "inner_lr"), t["inner_lr"])
    keys = t["log_retention"].exp() * t["k"]
    given: dict[str, Any] = {"weight": t["weight"], "log_retention": t["log_retention"], "chunk_size": 64}
    found = diagonal_scan(t["k"], t["v"], t["q"], recall_key=keys, **rates, **given)
    assert_equal(found, (o.transpose(1, 2), state.mT), leaves_of(t, ("inner_lr",)))


@pytest.mark.parametrize("time", [1, 63, 130])
def test_diagonal_plus_low_rank(time: int) -> None:
    """RWKV-7's transition: their alpha is our -b, their beta our c."""
    t = sample(time)
    with float32_is_float64():
        o, state = fla_naive("generalized_delta_rule/dplr").dplr_recurrence(
            KEYS**0.5 * t["q"],
            t["k"],
            t["v"],
            -t["recall_key"],
            t["erase_key"],
            t["log_retention"],
            initial_state=t["weight"].mT,
        )
    found = fast(t, RULES["erase along a key of its own"], 64)
    assert_equal(found, (o, state.mT), leaves_of(t, ("recall_key", "erase_key")))


@pytest.mark.parametrize("time", [1, 63, 130])
def test_gated_linear_attention(time: int) -> None:
    t = sample(time)
    their = theirs(t)
    with float32_is_float64():
        o, state = fla_naive("gla").naive_recurrent_gla(
            *(their[n] for n in ("q", "k", "v", "log_retention")), initial_state=their["state"], output_final_state=True
        )
    found = fast(t | {"q": KEYS**-0.5 * t["q"]}, (), 64)
    assert_equal(found, (o.transpose(1, 2), state.mT), leaves_of(t, ()))
