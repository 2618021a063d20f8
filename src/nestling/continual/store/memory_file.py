"""A memory as one file: safetensors, with everything that is no tensor as the bytes of a JSON text in a tensor.

Every file is read as if a stranger had made it: the format, the checksum, and the type of every value are checked
before anything is used, and nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestling.continual.store.adapters import adapters_of
from nestling.continual.store.records import DocumentRecord, LowRank
from nestling.errors import UserError
from nestling.memory.checked_file import CheckedFileError, checksum, read_checked, read_json, write_checked

FORMAT = "nestling-memory"
FORMAT_VERSION = "2"
CONTENT = "content"
# Bytes, some 100,000 documents. JSON's parser takes up to thirty times as much, for a stranger's file as well.
MAX_CONTENT = 24 << 20
MAX_NESTING = 32
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DENSE, LEFT, RIGHT, OTHER = "difference/", "left/", "right/", "learner/"
SMALLEST_EXPONENT = -100  # of a scale, whose inverse must be a float32


class MemoryFileError(UserError, ValueError):
    """A memory that cannot be read or written: missing, damaged, foreign, or locked by another process."""


def write_fields(path: str | Path, memory: Mapping[str, Any], dtype: str = "float32") -> str:
    """Write the fields of a `Memory`; returns the checksum in the file's header.

    Raises:
        ValueError: an unknown dtype.
        MemoryFileError: a difference with NaN or infinity, values that JSON cannot hold, or a place not writable.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose one of: {', '.join(DTYPES)}")
    scales: dict[str, float] = {}
    tensors = {OTHER + name: t for name, t in memory["tensors"].items()}
    for name, difference in memory["differences"].items():
        low = isinstance(difference, LowRank)
        parts = {LEFT: difference.left, RIGHT: difference.right} if low else {DENSE: difference}
        for prefix, tensor in parts.items():
            if not bool(torch.isfinite(tensor).all()):
                raise MemoryFileError(f"the memory is not written to {path}: {name} holds NaN or infinity")
            tensors[prefix + name], scale = _narrow(tensor.detach(), DTYPES[dtype])
            if scale != 1.0:
                scales[prefix + name] = scale
    header = {"format": FORMAT, "version": FORMAT_VERSION}
    try:
        content = json.dumps(_content(memory) | {"dtype": dtype, "scales": scales}).encode("ascii")
        if len(content) > MAX_CONTENT:
            raise ValueError(
                f"its {len(memory['documents']):,} documents' records and its settings are longer than "
                f"{MAX_CONTENT >> 20} MiB; begin a new memory"
            )
        tensors[CONTENT] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return write_checked(path, header, tensors)
    except (TypeError, ValueError, RecursionError) as error:
        raise MemoryFileError(f"the memory cannot be written to {path}: {error}") from error
    except OSError as error:
        raise MemoryFileError(f"the memory cannot be written to {path}: {error.strerror or error}") from error


def read_fields(path: Path) -> tuple[dict[str, Any], str]:
    """The fields of the `Memory` in a file, differences in float32, and the file's checksum.

    Raises:
        MemoryFileError: no such file, damaged, or of another format.
    """
    if not path.is_file():
        raise MemoryFileError(f"no memory file at {path}; check the path")
    try:
        header, tensors = read_checked(path)
    except CheckedFileError as error:
        raise MemoryFileError(str(error)) from error
    if header.get("format") != FORMAT:
        raise MemoryFileError(f"{path} is a safetensors file but not a memory of nestling learn")
    if header.get("version") != FORMAT_VERSION:
        raise MemoryFileError(
            f"{path} has memory format version {header.get('version', 'missing')[:20]}; this release reads "
            f"{FORMAT_VERSION}"
        )
    digest = header.pop("sha256", None)
    if digest is None or digest != checksum(header, tensors):
        raise MemoryFileError(f"{path} is damaged: its content does not have the checksum in its header")
    try:
        fields = _fields(read_json(_text(tensors.pop(CONTENT))), tensors)
        adapters_of(fields["settings"], fields["differences"])
        return fields, digest
    except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise MemoryFileError(f"{path} is not a usable memory: {str(error)[:200]}") from error


def is_memory_file(path: Path) -> bool:
    """Whether a file says that it is a memory of this format. Damage is for `read_fields` to find."""
    try:
        return path.is_file() and read_checked(path)[0].get("format") == FORMAT
    except CheckedFileError:
        return False


def _content(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is no tensor. JSON has no NaN: a loss that was never measured is null."""
    documents = [asdict(d) | {"loss": d.loss if math.isfinite(d.loss) else None} for d in memory["documents"]]
    plain = {key: memory[key] for key in ("fingerprint", "periods", "parameters", "settings")}
    return plain | {"documents": documents}


def _narrow(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A tensor in the file's dtype, and the power of two it was divided by so that float16 does not underflow."""
    if dtype != torch.float16 or not bool(tensor.any()):
        return tensor.to(dtype), 1.0
    exponent = math.frexp(float(tensor.abs().max()))[1] - 15
    scale = 2.0 ** max(exponent, SMALLEST_EXPONENT)
    return (tensor.float() / scale).to(dtype), scale


def _text(content: Tensor) -> bytes:
    """The JSON text in a tensor; ValueError where it holds none."""
    _expect(content.dtype == torch.uint8 and content.dim() == 1, "its content is no text")
    _expect(len(content) <= MAX_CONTENT, f"its content is longer than {MAX_CONTENT >> 20} MiB")
    return content.numpy().tobytes()


def _fields(content: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `Memory`; KeyError, TypeError or ValueError where a value is missing or of a wrong kind."""
    _expect(isinstance(content, dict), "its content is no JSON object")
    scales = content["scales"]
    _expect(_is_map(scales, float), "scales are not numbers by name")
    _expect(all(math.isfinite(s) and s > 0 for s in scales.values()), "a scale is not positive")
    _expect(isinstance(content["fingerprint"], str), "the fingerprint is no text")
    _expect(_is_map(content["periods"], int), "the periods are not whole numbers by level")
    _expect(all(p > 0 for p in content["periods"].values()), "a period is not positive")
    levels = content["parameters"]
    _expect(_is_map(levels, list) and levels.keys() == content["periods"].keys(), "levels without their parameters")
    _expect(all(isinstance(n, str) for names in levels.values() for n in names), "a parameter's name is no text")
    _check_settings(content["settings"])
    _expect(isinstance(content["documents"], list), "the documents are no list")
    return {
        "fingerprint": content["fingerprint"],
        "periods": content["periods"],
        "parameters": levels,
        "differences": _differences(tensors, scales),
        "documents": [_document(d) for d in content["documents"]],
        "settings": content["settings"],
        "tensors": {n.removeprefix(OTHER): t for n, t in tensors.items() if n.startswith(OTHER)},
    }


def _check_settings(settings: Any) -> None:
    """As far as the commands use them; the rest is for the learner to refuse."""
    _expect(isinstance(settings, dict), "the settings are no JSON object")
    layer: list[Any] = [settings]
    for _ in range(MAX_NESTING):
        layer = [v for x in layer for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    _expect(not layer, f"the settings are nested more than {MAX_NESTING} deep")
    learner = settings.get("learner")
    if learner is not None:
        _expect(isinstance(learner, dict) and _is_map(learner.get("levels"), dict), "the learner has no levels")
        made = [*learner["levels"].values(), learner.get("options")]
        kept = all(isinstance(m, dict) and isinstance(m.get("rank", ""), int | None) for m in made)
        _expect(kept, "the learner's ranks are no numbers")


def _differences(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor | LowRank]:
    widened: dict[str, dict[str, Tensor]] = {DENSE: {}, LEFT: {}, RIGHT: {}}
    for name, tensor in tensors.items():
        prefix = next((p for p in (*widened, OTHER) if name.startswith(p)), None)
        _expect(prefix is not None, f"tensor {name[:80]!r} has no meaning here")
        if prefix is None or prefix == OTHER:
            continue
        _expect(tensor.dtype in DTYPES.values(), f"{name[:80]!r} is {tensor.dtype}")
        wide = tensor.to(torch.float32) * scales.get(name, 1.0)
        _expect(bool(torch.isfinite(wide).all()), f"{name[:80]!r} holds NaN or infinity")
        widened[prefix][name.removeprefix(prefix)] = wide
    found: dict[str, Tensor | LowRank] = dict(widened[DENSE])
    left, right = widened[LEFT], widened[RIGHT]
    _expect(left.keys() == right.keys() and not (left.keys() & found.keys()), "half of a low-rank difference")
    for name in left:
        fits = left[name].dim() == right[name].dim() == 2 and left[name].shape[1] == right[name].shape[0]
        _expect(fits, f"the halves of {name[:80]!r} do not fit together")
        found[name] = LowRank(left[name], right[name])
    return found


def _document(record: Any) -> DocumentRecord:
    _expect(isinstance(record, dict), "a document is no JSON object")
    _expect(record.keys() == {f.name for f in fields(DocumentRecord)}, "a document has other fields")
    texts = all(isinstance(record[key], str) for key in ("name", "digest", "started"))
    counted = type(record["tokens"]) is int and 0 <= record["tokens"] < 1 << 63
    _expect(texts and counted, "a document's fields are of wrong kinds")
    _expect(isinstance(record["finished"], bool), "a document is neither finished nor not")
    loss = record["loss"]
    _expect(loss is None or type(loss) in (int, float), "a document's loss is no number")
    return DocumentRecord(**(record | {"loss": math.nan if loss is None else float(loss)}))


def _is_map(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(v) is kind for v in value.values())


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
