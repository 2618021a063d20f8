"""The state contract as tests that any sequence layer goes through.

`CHECKS` maps a name to a function of a float64 layer and its hidden size; `tests/layers/test_contract.py` runs every
check on every layer. Checks know nothing of a state's layout: two states are equal when the layer continues from them
equally, so every scenario also reads `PROBE` tokens from the state it ends with, and gradients of the input and of
every parameter run through the probe too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nestling.layers.sequence import SequenceLayer
from nestling.memory.state import State

TIME = 17
PROBE = 6
SPLITS: tuple[tuple[int, ...], ...] = ((1,) * TIME, (5, 12), (8, 8, 1), (3, 0, 14))

IMPLIED = ("padding", "packed documents", "row independence", "causality")
"""Checks that others imply as long as a layer leaves rows and documents to `SequenceLayer`: "ragged positions" compares
padded rows with rows alone, and "split" a whole text with its tokens one by one."""

Check = Callable[[SequenceLayer, int], None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float64 normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weigh(y: Tensor, seed: int = 5) -> Tensor:
    """A scalar that depends on every entry of `y`."""
    return (y * noise(*y.shape, seed=seed)).sum()


def probe(layer: SequenceLayer, state: State, rows: Sequence[int] | None = None) -> Tensor:
    """What the layer says to fixed further tokens; row n of the state reads the tokens of `rows[n]`."""
    index = list(range(state.batch_size)) if rows is None else list(rows)
    x = noise(max(index, default=0) + 1, PROBE, hidden_of(layer), seed=11)[index]
    return layer(x, state)[0]


def hidden_of(layer: SequenceLayer) -> int:
    """Width of the layer's input."""
    return int(layer.config.hidden_size)  # type: ignore[union-attr,arg-type]


def gradients(scalar: Tensor, inputs: Sequence[Tensor], layer: SequenceLayer) -> list[Tensor]:
    """Gradients of the inputs, then of every parameter; zeros where nothing depends on one."""
    wanted = [*inputs, *layer.parameters()]
    found = torch.autograd.grad(scalar, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Equal to rounding in float64."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def run_pieces(
    layer: SequenceLayer, x: Tensor, sizes: Sequence[int], state: State | None = None
) -> tuple[Tensor, State]:
    """Calls of `sizes` tokens that carry the state."""
    outputs = []
    for part in x.split(list(sizes), 1):
        y, state = layer(part, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def whole(layer: SequenceLayer, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """One call on `x`, then the probe: `[N, T + PROBE, hidden]`."""
    y, state = layer(x)
    return torch.cat([y, probe(layer, state, rows)], 1)


def check_split(layer: SequenceLayer, hidden: int) -> None:
    """One call = any calls that carry the state = token by token; also with gradients through the carried state."""
    x = noise(2, TIME, hidden).requires_grad_()
    y = whole(layer, x)
    wanted = gradients(weigh(y), [x], layer)
    for sizes in SPLITS:
        parts, state = run_pieces(layer, x, sizes)
        found = torch.cat([parts, probe(layer, state)], 1)
        close([found], [y])
        close(gradients(weigh(found), [x], layer), wanted)


def check_initial_state(layer: SequenceLayer, hidden: int) -> None:
    """No state = the initial state, and no tokens leave it as it is."""
    x = noise(2, 5, hidden)
    start = layer.init_state(2)
    y, state = layer(x, start)
    close([whole(layer, x)], [torch.cat([y, probe(layer, state)], 1)])
    empty, state = layer(x[:, :0], start)
    assert empty.shape == (2, 0, hidden)
    close([probe(layer, state)], [probe(layer, layer.init_state(2))])


MASKS = {
    "left": [[0] * 7 + [1] * 10, [0] * 2 + [1] * 15, [1] * 17],
    "right": [[1] * 9 + [0] * 8, [1] * 17, [1] * 12 + [0] * 5],
    "holes": [[1, 1, 0] * 5 + [1, 1], [0, 1, 1, 1, 0, 0, 1] * 2 + [0, 0, 1], [0] * 17],
}


def check_padding(layer: SequenceLayer, hidden: int) -> None:
    """Padding anywhere = the same rows without it, one by one; it may hold anything, and its output is zero."""
    for rows in MASKS.values():
        mask = torch.tensor(rows, dtype=torch.bool)
        x = torch.where(mask[..., None], noise(3, TIME, hidden), torch.full((), 1e6).double()).requires_grad_()
        y, state = layer(x, mask=mask)
        assert not bool(y[~mask].any())
        after = probe(layer, state)
        found, wanted = [], []
        for n in range(3):
            alone = whole(layer, x[n : n + 1, mask[n]], [n])[0]
            found.append(torch.cat([y[n, mask[n]], after[n]]))
            wanted.append(alone)
        close(found, wanted)
        expected = gradients(sum(map(weigh, wanted), torch.zeros(())), [x], layer)
        actual = gradients(sum(map(weigh, found), torch.zeros(())), [x], layer)
        assert not bool(actual[0][~mask].any())
        close(actual, expected)


def check_padding_holds_anything(layer: SequenceLayer, hidden: int) -> None:
    """NaN in the padding reaches neither output, state nor gradients."""
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool)
    x = torch.where(mask[..., None], noise(3, TIME, hidden), torch.full((), float("nan")).double()).requires_grad_()
    y, state = layer(x, mask=mask)
    after = probe(layer, state)
    for tensor in (y, after, *gradients(weigh(y) + weigh(after), [x], layer)):
        assert bool(torch.isfinite(tensor).all())


def check_packed(layer: SequenceLayer, hidden: int) -> None:
    """Packed documents = the documents alone, carried over a second packed call, with an empty document between."""
    first, second = (5, 0, 9, 7), (4, 6, 0, 3)
    x, later = noise(1, sum(first), hidden).requires_grad_(), noise(1, sum(second), hidden, seed=1).requires_grad_()

    def bounds(sizes: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0)

    y, state = layer(x, cu_seqlens=bounds(first))
    z, state = layer(later, state, cu_seqlens=bounds(second))
    after = probe(layer, state)
    found = [torch.cat(parts) for parts in zip(y[0].split(first), z[0].split(second), after, strict=True)]
    documents = zip(x[0].split(first), later[0].split(second), strict=True)
    wanted = [whole(layer, torch.cat(parts)[None], [n])[0] for n, parts in enumerate(documents)]
    close(found, wanted)
    expected = gradients(sum(map(weigh, wanted), torch.zeros(())), [x, later], layer)
    close(gradients(sum(map(weigh, found), torch.zeros(())), [x, later], layer), expected)


def check_rows(layer: SequenceLayer, hidden: int) -> None:
    """Row i does not depend on row j, whatever j holds: values, and gradients exactly zero."""
    x = noise(3, TIME, hidden)
    other = x.clone()
    other[1] = 100 * noise(TIME, hidden, seed=2)
    a, b = whole(layer, x), whole(layer, other)
    close([a[[0, 2]]], [b[[0, 2]]])
    close([a[:1]], [whole(layer, x[:1])])
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(weigh(whole(layer, leaf)[0]), leaf)
    assert bool(found[0].any())
    assert not bool(found[1:].any())


def check_causality(layer: SequenceLayer, hidden: int) -> None:
    """No output depends on a later token, also inside a chunk and with every row at a position of its own."""
    started = layer(noise(2, 7, hidden, seed=3), mask=torch.tensor([[1] * 7, [1] * 3 + [0] * 4]))[1]
    for state, tokens in ((None, (0, 1, 2, 5, 10)), (started.detach(), (0, 3, 4, 9))):
        x = noise(2, TIME, hidden).requires_grad_()
        y, _ = layer(x, state)
        for t in tokens:
            (found,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
            assert not bool(found[:, t + 1 :].any()), f"output {t} depends on a later token"
            assert bool(found[:, t].any()), f"output {t} does not depend on its own token"
        for cut in (1, 6, 13):
            changed = torch.cat([x[:, :cut], 50 * noise(2, TIME - cut, hidden, seed=4)], 1)
            close([layer(changed, state)[0][:, :cut]], [y[:, :cut]])


def check_ragged(layer: SequenceLayer, hidden: int) -> None:
    """Rows that read different numbers of tokens in every call = each row alone in one call."""
    calls = ((5, 2, 8), (0, 7, 1), (9, 5, 3), (6, 1, 10))
    totals = [sum(c) for c in zip(*calls, strict=True)]
    texts = [noise(total, hidden, seed=20 + n).requires_grad_() for n, total in enumerate(totals)]
    found: list[list[Tensor]] = [[] for _ in texts]
    state, at = None, [0] * len(texts)
    for i, lengths in enumerate(calls):
        width = max(lengths)
        pads = [(width - n) * (i % 2) for n in lengths]  # left padding in every other call
        slot = torch.arange(width)
        mask = torch.stack([(slot >= p) & (slot < p + n) for p, n in zip(pads, lengths, strict=True)])
        rows = []
        for text, start, length, pad in zip(texts, at, lengths, pads, strict=True):
            fill = text.new_zeros(width - length, hidden)
            rows.append(torch.cat([fill[:pad], text[start : start + length], fill[pad:]]))
        y, state = layer(torch.stack(rows), state, mask=mask)
        for n, length in enumerate(lengths):
            found[n].append(y[n, mask[n]])
            at[n] += length
    assert state is not None
    after = probe(layer, state)
    outputs = [torch.cat([*parts, end]) for parts, end in zip(found, after, strict=True)]
    wanted = [whole(layer, text[None], [n])[0] for n, text in enumerate(texts)]
    close(outputs, wanted)
    expected = gradients(sum(map(weigh, wanted), torch.zeros(())), texts, layer)
    close(gradients(sum(map(weigh, outputs), torch.zeros(())), texts, layer), expected)


def check_state_is_a_value(layer: SequenceLayer, hidden: int) -> None:
    """A call leaves the state it was given as it was, and training the state it gave; a clone shares nothing; select
    picks, orders and repeats rows.
    """
    x = noise(3, 10, hidden)
    with torch.no_grad():
        _, state = layer(x)
        before = [t.clone() for _, t in state.tensors()]
        expected = probe(layer, state)
        unchanged = [torch.equal(a, b) for a, (_, b) in zip(before, state.tensors(), strict=True)]
        assert all(unchanged), "a call changed the state it was given"
        close([probe(layer, state)], [expected])

        copy = state.clone()
        for _, tensor in copy.tensors():
            tensor.zero_()
        close([probe(layer, state)], [expected])

        chosen = state.select([2, 0, 2])
        assert chosen.batch_size == 3
        close([probe(layer, chosen, [2, 0, 2])], [expected[[2, 0, 2]]])
        close([probe(layer, state.select(torch.tensor([1])), [1])], [expected[1:2]])
        assert state.nbytes == sum(t.numel() * t.element_size() for t in before)
        assert state.first_nonfinite() is None
        assert all(t.shape[0] == 3 for _, t in state.tensors()), "a tensor of the state is not batch first"

        begun = layer(x[:, :1])[1].detach()
        before = [t.clone() for _, t in begun.tensors()]
        for parameter in layer.parameters():
            parameter.add_(1.0)
        for old, (name, new) in zip(before, begun.tensors(), strict=True):
            assert torch.equal(old, new), f"{name} of a state changes when an optimizer changes the parameters"


def check_detach(layer: SequenceLayer, hidden: int) -> None:
    """detach cuts the graph: later outputs give earlier tokens no gradient, and values stay."""
    x = noise(2, 9, hidden).requires_grad_()
    _, state = layer(x)
    cut = state.detach()
    assert not any(t.requires_grad for _, t in cut.tensors())
    y = probe(layer, cut)
    close([y], [probe(layer, state)])
    assert torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None


def check_save(layer: SequenceLayer, hidden: int) -> None:
    """A state read from a file continues like the one that was written, also into a template of another batch size."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        _, state = layer(noise(3, 13, hidden), mask=torch.tensor([[1] * 13, [1] * 5 + [0] * 8, [0] * 12 + [1]]))
        state.write_file(path, "this model")
        loaded = layer.init_state(1).read_file(path, "this model")
        assert type(loaded) is type(state)
        for (name, a), (_, b) in zip(loaded.tensors(), state.tensors(), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype, name
        close([probe(layer, loaded)], [probe(layer, state)])


def check_wrong_rows(layer: SequenceLayer, hidden: int) -> None:
    """A state of another number of rows is refused in words."""
    _, state = layer(noise(3, 4, hidden))
    for kwargs in ({}, {"mask": torch.tensor([[1, 1, 1, 0]])}, {"cu_seqlens": torch.tensor([0, 1, 4])}):
        try:
            layer(noise(1, 4, hidden), state, **kwargs)
        except ValueError as error:
            assert "the state has 3 rows" in str(error)
            continue
        raise AssertionError(f"a state of 3 rows was accepted with {kwargs or 'a batch of 1'}")


def check_modes(layer: SequenceLayer, hidden: int) -> None:
    """train() = eval() = no_grad(), and one call = the same call again."""
    x = noise(2, TIME, hidden)
    y = whole(layer.train(), x)
    assert torch.equal(whole(layer, x), y)
    assert torch.equal(whole(layer.eval(), x), y)
    with torch.no_grad():
        close([whole(layer, x)], [y])
    layer.train()


def check_higher_order(layer: SequenceLayer, hidden: int) -> None:
    """Gradients that can be differentiated again are the same gradients."""
    x = noise(2, TIME, hidden).requires_grad_()
    total = weigh(whole(layer, x))
    wanted = [x, *layer.parameters()]
    again = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
    found = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, again, strict=True)]
    close(found, gradients(weigh(whole(layer, x)), [x], layer))


def check_empty_batch(layer: SequenceLayer, hidden: int) -> None:
    """No rows in, no rows out, and a state of none."""
    y, state = layer(noise(0, 5, hidden))
    assert y.shape == (0, 5, hidden) and state.batch_size == 0
    assert layer(noise(0, 3, hidden), state)[0].shape == (0, 3, hidden)


def check_enormous_tokens(layer: SequenceLayer, hidden: int) -> None:
    """One token near the end of float32 leaves outputs, state and gradients finite."""
    x = noise(1, TIME, hidden)
    x[:, 4] = 3e38
    x.requires_grad_()
    y, state = layer(x)
    assert bool(y.isfinite().all()) and state.first_nonfinite() is None
    assert all(bool(g.isfinite().all()) for g in gradients(weigh(y), [x], layer))


CHECKS: dict[str, Check] = {
    "split": check_split,
    "initial state": check_initial_state,
    "padding": check_padding,
    "padding holds anything": check_padding_holds_anything,
    "packed documents": check_packed,
    "row independence": check_rows,
    "causality": check_causality,
    "ragged positions": check_ragged,
    "state is a value": check_state_is_a_value,
    "detach": check_detach,
    "save": check_save,
    "wrong rows": check_wrong_rows,
    "modes": check_modes,
    "higher order": check_higher_order,
    "empty batch": check_empty_batch,
    "enormous tokens": check_enormous_tokens,
}
