"""Buffers that are used again."""

from __future__ import annotations

import gc
import mmap
import threading

import pytest
import torch

from nestling.ops.native import mappings

NUMBERS = (2 << 20) // 4 + 3
LIKE = torch.zeros(1)

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no mappings with large pages here")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "_free", [])


def test_what_is_in_use_is_not_given_twice() -> None:
    one, two = mappings.block(NUMBERS, LIKE), mappings.block(NUMBERS, LIKE)
    one.fill_(1.0), two.fill_(2.0)
    assert one.shape == (NUMBERS,) and bool((one == 1.0).all()) and bool((two == 2.0).all())


def test_a_block_comes_back_when_its_last_tensor_is_gone() -> None:
    block = mappings.block(NUMBERS, LIKE)
    address, view = block.data_ptr(), block[5:]
    del block
    assert mappings.block(NUMBERS, LIKE).data_ptr() != address  # a view holds it
    del view
    gc.collect()
    assert {len(m) for m in mappings._free} == {4 * NUMBERS}
    again = [mappings.block(NUMBERS, LIKE) for _ in range(2)]
    assert address in {b.data_ptr() for b in again}
    assert mappings._free == []


def test_another_size_sends_what_waits_back_to_the_system() -> None:
    del_me = mappings.block(NUMBERS, LIKE)
    del del_me
    assert len(mappings._free) == 1
    other = mappings.block(2 * NUMBERS, LIKE)
    assert mappings._free == [] and other.numel() == 2 * NUMBERS


def test_small_blocks_and_dtypes() -> None:
    assert mappings.block(10, LIKE).shape == (10,)
    double = mappings.block(NUMBERS, LIKE.double())
    assert double.dtype == torch.float64 and double.shape == (NUMBERS,)


def test_a_block_may_come_back_while_one_is_taken() -> None:
    """As when garbage is collected inside: the same thread must not wait for itself."""
    mapping = mmap.mmap(-1, 10)

    def inside() -> None:
        with mappings._lock:
            mappings._give_back(mapping)

    thread = threading.Thread(target=inside, daemon=True)
    thread.start()
    thread.join(5.0)
    assert mappings._free == [mapping]
