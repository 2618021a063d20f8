"""Padding and packed documents as left-aligned rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.ops.packing import find_rows


def test_nothing_to_do_is_none() -> None:
    assert find_rows((2, 5)) is None
    assert find_rows((2, 5), mask=torch.ones(2, 5)) is None


def test_padding_left_right_and_between() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    x = torch.arange(16.0).reshape(4, 4)
    rows = find_rows((4, 4), mask=mask)
    assert rows is not None
    assert rows.lengths.tolist() == [2, 3, 2, 0]
    assert rows.lengths.dtype == torch.int64
    assert rows.pack(x).tolist() == [[2, 3, 0], [4, 5, 6], [8, 11, 0], [0, 0, 0]]
    assert torch.equal(rows.unpack(rows.pack(x)), x * mask)


def test_packed_documents() -> None:
    x = torch.arange(6.0)[None]
    rows = find_rows((1, 6), cu_seqlens=torch.tensor([0, 2, 2, 6], dtype=torch.int32))
    assert rows is not None
    assert rows.lengths.tolist() == [2, 0, 4]
    assert rows.pack(x).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [2, 3, 4, 5]]
    assert torch.equal(rows.unpack(rows.pack(x)), x)


def test_documents_that_begin_inside_padded_rows() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
    starts = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    x = torch.arange(12.0).reshape(3, 4)
    rows = find_rows((3, 4), mask=mask, starts=starts)
    assert rows is not None
    assert rows.pack(x).tolist() == [[1, 0], [2, 3], [4, 0], [5, 7]]
    assert torch.equal(rows.unpack(rows.pack(x)), x * mask)
    unpadded = find_rows((3, 4), starts=starts)
    assert unpadded is not None
    assert unpadded.lengths.tolist() == [2, 2, 1, 1, 2, 4]


def test_one_document_is_one_row() -> None:
    rows = find_rows((1, 3), cu_seqlens=torch.tensor([0, 3]))
    assert rows is None or rows.lengths.tolist() == [3]


def test_everything_masked_leaves_a_slot() -> None:
    rows = find_rows((2, 3), mask=torch.zeros(2, 3))
    assert rows is not None
    assert rows.pack(torch.ones(2, 3, 2)).abs().sum() == 0
    assert rows.unpack(torch.ones(2, 1, 2)).tolist() == torch.zeros(2, 3, 2).tolist()


def test_padding_that_holds_nan_reaches_neither_values_nor_gradients() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    x = torch.where(mask, torch.ones(2, 3), torch.full((2, 3), float("nan"))).requires_grad_()
    rows = find_rows((2, 3), mask=mask)
    assert rows is not None
    y = rows.unpack(rows.pack(x))
    assert torch.equal(y, mask.float())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, mask.float())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_pack_keeps_the_order_of_every_row(mask: list[list[bool]]) -> None:
    keep = torch.tensor(mask)
    x = torch.arange(keep.numel() * 2.0).reshape(*keep.shape, 2) + 1
    rows = find_rows(tuple(keep.shape), mask=keep)
    if rows is None:
        assert bool(keep.all())
        return
    packed = rows.pack(x)
    for row, length in enumerate(rows.lengths.tolist()):
        assert torch.equal(packed[row, :length], x[row][keep[row]])
        assert packed[row, length:].abs().sum() == 0
    assert torch.equal(rows.unpack(packed), x * keep[..., None])


def test_gradcheck() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    rows = find_rows((2, 3), mask=mask)
    assert rows is not None
    x = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rows.unpack(rows.pack(t).square()), (x,))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="give `mask` or `cu_seqlens`, not both"):
        find_rows((1, 3), mask=torch.ones(1, 3), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\); the input has \(batch, time\) = \(2, 4\)"):
        find_rows((2, 4), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="cu_seqlens describes one packed row; the batch is 2"):
        find_rows((2, 3), cu_seqlens=torch.tensor([0, 3]))
    for bad in ([1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [0]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the row's length 3"):
            find_rows((1, 3), cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        find_rows((1, 3), cu_seqlens=torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        find_rows((1, 3), cu_seqlens=torch.tensor(3))
