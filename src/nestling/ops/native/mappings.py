"""Large buffers outside the allocator's heap, used again and again."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_free: list[mmap.mmap] = []
_lock = threading.RLock()  # while it is held a collection of garbage may give a mapping back


def block(numbers: int, like: Tensor) -> Tensor:
    """`[numbers]` of `like`'s dtype, uninitialised, in a mapping of its own where it is large.

    In an allocator's heap a large block between small ones leaves holes. The pages of a new mapping are cleared when
    they are first touched, a tenth of a training step, so a mapping whose tensor is gone waits for the next of its
    size. One of another size lets all that wait go back to the system: there are never more than were in use at once.
    """
    size = numbers * like.element_size()
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(numbers)
    mapping = _take(size)
    view = (ctypes.c_char * size).from_buffer(mapping)
    weakref.finalize(view, _give_back, mapping)
    return torch.frombuffer(view, dtype=like.dtype)


def _take(size: int) -> mmap.mmap:
    with _lock:
        fits = [m for m in _free if len(m) == size]
        if fits:
            _free.remove(fits[0])
            return fits[0]
        _free.clear()
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _give_back(mapping: mmap.mmap) -> None:
    with _lock:
        _free.append(mapping)
