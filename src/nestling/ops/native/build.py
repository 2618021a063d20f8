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
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from nestling.ops.native.arguments import Structure, declared, sources

logger = logging.getLogger("nestling")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
# The compiled functions, and the structures each takes.
_FUNCTIONS = {
    "chunk": ("ChunkArguments",),
    "delta_rows": ("DeltaRowsArguments",),
    "diagonal": ("DiagonalArguments",),
    "lesson": ("BankArguments", "LessonArguments"),
    "loop": ("LoopArguments",),
    "normalize": ("NormalizeArguments",),
    "rates": ("RatesArguments",),
    "read": ("BankArguments", "ReadArguments"),
    "scan": ("ScanArguments",),
    "short_conv": ("ConvolutionArguments",),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is none; the reason is logged once.

    Raises:
        ImportError: it takes other arguments than the C++ files beside it declare.
    """
    if os.environ.get("NESTLING_NATIVE", "1") == "0" or os.name == "nt":
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.info("no C++ compiler: memories run through torch on the CPU, more slowly (install g++, or set CXX)")
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        logger.warning("the CPU kernel cannot be used, so memories run through torch, more slowly: %s", _reason(error))
        return None
    return _typed(loaded)


def _built(compiler: str) -> Path:
    """The library's file, compiled now unless the cache has it."""
    parts = [compiler.encode(), _processor().encode(), *(s.read_bytes() for s in sources())]
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
            objects = [(source, Path(folder) / f"{source.stem}.o") for source in sources() if source.suffix == ".cpp"]
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


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions, once both sides agree on the size of every structure."""
    for name, structures in _FUNCTIONS.items():
        function = getattr(loaded, f"nestling_{name}")
        function.argtypes = [*[ctypes.c_char_p] * len(structures), *[ctypes.c_int] * 2]
        function.restype = None
    loaded.nestling_loop_room.argtypes = [ctypes.c_char_p, ctypes.c_int]
    loaded.nestling_loop_room.restype = ctypes.c_int64
    for structure in declared().values():
        compiled, ours = getattr(loaded, f"nestling_bytes_of_{structure.name}")(), structure.backward.layout.size
        if compiled != ours:
            raise ImportError(
                f"the compiled {structure.name} has {compiled} bytes, but its declaration is read as {ours}; "
                "install nestling again, and report it if that does not help"
            )
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


@cache
def structures(function: str) -> tuple[Structure, ...]:
    """What a compiled function takes."""
    return tuple(declared()[name] for name in _FUNCTIONS[function])


def call(function: str, dtype: torch.dtype, back: bool, *given: Mapping[str, Any]) -> None:
    """Run a compiled function.

    Args:
        function: its name without "nestling_".
        dtype: float32 or float64.
        back: the backward pass rather than the forward one.
        given: for each of its structures the fields by name; a forward pass leaves the gradients out.

    Raises:
        TypeError: a field is missing or unknown.
        ValueError: a tensor that compiled code cannot read.
    """
    packed = [s.pack(g, dtype, back) for s, g in zip(structures(function), given, strict=True)]
    call_packed(function, dtype, back, *packed)


def call_packed(function: str, dtype: torch.dtype, back: bool, *packed: bytes) -> None:
    """`call` with the memory of its structures."""
    _compiled(function)(*packed, dtype is torch.float64, back)


@cache
def _compiled(function: str) -> Callable[..., None]:
    found: Callable[..., None] = getattr(kernel(), f"nestling_{function}")
    return found


def expect(name: str, tensor: Tensor | None, like: Tensor, *shape: int) -> None:
    """Compiled code reads raw memory, so what does not fit is refused here.

    Raises:
        ValueError: `tensor` has another shape than `shape`, or another dtype than `like`.
    """
    if tensor is not None and (tensor.shape != shape or tensor.dtype != like.dtype):
        found = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise ValueError(f"{name} is {found}, but must be {shape} of {like.dtype}; is the state another layer's?")
