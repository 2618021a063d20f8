"""Compile the C++ beside this file for this processor, keep it in the user's cache, and load it."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from filelock import FileLock
from torch import Tensor

logger = logging.getLogger("nestling")
_HERE = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is none; the reason is logged once."""
    if os.environ.get("NESTLING_NATIVE", "1") == "0" or os.name == "nt":
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.info("no C++ compiler: memories run through torch on the CPU, more slowly (install g++, or set CXX)")
        return None
    try:
        return _load(_built(compiler))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        logger.warning("the CPU kernel cannot be used, so memories run through torch, more slowly: %s", _reason(error))
        return None


def _built(compiler: str) -> Path:
    """The library's file, compiled now unless the cache has it."""
    sources = sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")])
    parts = [compiler.encode(), _processor().encode(), *(s.read_bytes() for s in sources)]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache_home / "nestling" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    file = folder / "kernel.so"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(folder / "lock"):
        if not file.exists():
            logger.warning("compiling nestling's CPU kernel (once, about 20 seconds)")
            _compile(compiler, file)
    return file


def _compile(compiler: str, file: Path) -> None:
    """Into a temporary folder, from which the library then takes its place: a killed compiler leaves nothing behind."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        for threads in (["-fopenmp"], []):  # Apple's clang has no OpenMP: one thread there
            objects = [(source, Path(folder) / f"{source.stem}.o") for source in _HERE.glob("*.cpp")]
            commands = [[compiler, *_FLAGS, *threads, "-c", str(s), "-o", str(o)] for s, o in objects]
            running = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
            errors = [process.communicate(timeout=300)[1] for process in running]
            made = Path(folder) / file.name
            link = [compiler, *_FLAGS, *threads, *(str(o) for _, o in objects), "-shared", "-o", str(made)]
            if not any(process.returncode for process in running):
                subprocess.run(link, check=True, capture_output=True, text=True, timeout=300)
                os.replace(made, file)
                return
    raise subprocess.CalledProcessError(1, compiler, stderr="\n".join(errors))


def _load(file: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(file))
    loaded.nestling_chunk.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 2]
    loaded.nestling_memories.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p, *[ctypes.c_int] * 3]
    loaded.nestling_normalize.argtypes = [ctypes.c_void_p, *[ctypes.c_double] * 2, ctypes.c_void_p, *[ctypes.c_int] * 2]
    loaded.nestling_rates.argtypes = loaded.nestling_normalize.argtypes
    loaded.nestling_scan.argtypes = loaded.nestling_short_conv.argtypes = loaded.nestling_chunk.argtypes
    loaded.nestling_loop.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2]
    loaded.nestling_loop_room.argtypes, loaded.nestling_loop_room.restype = (
        [ctypes.c_void_p, ctypes.c_int],
        ctypes.c_int64,
    )
    for name in ("chunk", "loop", "memories", "normalize", "rates", "scan", "short_conv"):
        getattr(loaded, f"nestling_{name}").restype = None
    return loaded


def _processor() -> str:
    """What `-march=native` depends on: home directories are shared between machines."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.platform() + platform.processor()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line]
        return lines[0] if lines else "the compiler failed"
    return str(error)


def kernel() -> ctypes.CDLL:
    """The compiled kernel, where `native.fits` has said that there is one."""
    found = library()
    assert found is not None
    return found


def expect(name: str, tensor: Tensor | None, like: Tensor, *shape: int) -> None:
    """Compiled code reads raw memory, so what does not fit is refused here.

    Raises:
        ValueError: `tensor` has another shape than `shape`, or another dtype than `like`.
    """
    if tensor is not None and (tensor.shape != shape or tensor.dtype != like.dtype):
        found = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise ValueError(f"{name} is {found}, but must be {shape} of {like.dtype}; is the state another layer's?")


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of contiguous tensors, null for None."""
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def sizes(*numbers: int) -> ctypes.Array[ctypes.c_int64]:
    """Whole numbers as the kernel takes them."""
    return (ctypes.c_int64 * len(numbers))(*map(int, numbers))
