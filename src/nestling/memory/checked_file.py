"""Files of tensors, whole or not at all: safetensors with a checksum, replaced in one step, read with distrust."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Parsing a header takes some twenty times its bytes of memory, so a hostile one must not be as long as it likes.
MAX_HEADER = 16 << 20
MAX_DIMENSION = 1 << 48


class CheckedFileError(ValueError):
    """A file that is damaged, or is not safetensors at all."""


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's strings and of the names, types, shapes and bytes of contiguous CPU tensors."""
    shapes = {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}
    digest = hashlib.sha256(json.dumps([header, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checked(path: str | Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically: a failure leaves an earlier file intact.

    Args:
        path: the file to write.
        header: strings to keep; `sha256` is added, the checksum of everything else.
        tensors: on any device, in any layout.

    Returns:
        the checksum.

    Raises:
        ValueError: a header of more than 16 MiB, which `read_checked` would refuse.
    """
    if sum(map(len, header.values())) > MAX_HEADER // 2:
        raise ValueError(
            f"{path}: a header of more than {MAX_HEADER >> 21} MiB cannot be read back; keep fewer records"
        )
    payload = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    digest = checksum(header, payload)
    with replacing(Path(path)) as scratch:
        save_file(payload, scratch, metadata={**header, "sha256": digest})
    return digest


def read_checked(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's strings, `sha256` among them, and the tensors. The caller compares the checksum.

    The tensors are mapped from the file, not copied: what a header claims costs no memory.

    Raises:
        CheckedFileError: not a safetensors file, truncated, or with a header that says a thing twice or absurdly.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OSError, OverflowError) as error:
        raise CheckedFileError(f"{path} is damaged or not a safetensors file: {str(error)[:200]}") from error


def read_json(text: bytes | str) -> Any:
    """JSON of unknown origin.

    Raises:
        ValueError: not JSON, not UTF-8, nested deeper than Python recurses, or an object that names a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A scratch file beside `target` to write into; it takes the target's place when the block ends well.

    Both the file and the directory are flushed, so after this a power cut finds the old file or the new one.
    """
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    scratch.touch(exist_ok=False)  # a place that cannot be written to is found before the work
    try:
        yield scratch
        flush(scratch)
        os.replace(scratch, target)
        flush(target.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_header(path: Path) -> None:
    """What the safetensors library leaves open: length, repeated names, and shapes that torch cannot count."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise ValueError(f"a header of {length} bytes")
        header = read_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if name != "__metadata__" and not (isinstance(shape, list) and all(_is_length(n) for n in shape)):
            raise ValueError(f"{name[:80]!r} has no usable shape")


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_DIMENSION


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object that names a key twice")
    return found
