"""A thousand damaged and hostile files: every one is refused with a sentence, or loads as what was saved."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestling.continual.store.memory import Memory, MemoryFileError
from nestling.continual.store.store import MemoryStore
from nestling.memory.checked_file import checksum
from tests.continual.models import assert_same, make_memory
from tests.llamas import random_llama


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Memory, bytes]:
    """A memory and the bytes of its file."""
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    memory = make_memory(random_llama(layers=2))
    keep = dict(list(memory.differences.items())[-2:])
    memory = Memory(memory.fingerprint, memory.periods, memory.parameters, keep, memory.documents, memory.settings)
    memory.tensors["average"] = torch.arange(20.0)
    memory.save(path)
    return memory, path.read_bytes()


def pack(header: str | bytes, body: bytes) -> bytes:
    """A safetensors file of these parts, whatever is in them."""
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


def edits(whole: bytes, chance: random.Random) -> bytes:
    """One of the mutations that need no understanding, or of the header's JSON."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:end]), whole[end:]
    names = [n for n in header if n != "__metadata__"]
    name = chance.choice(names)
    huge = [2**31, 2**48, 2**62, 2**63, 2**64, 10**30]

    def flip() -> bytes:
        place, data = chance.randrange(len(whole)), bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        return bytes(data)

    def flip_header() -> bytes:
        place, data = chance.randrange(end), bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        return bytes(data)

    def shape() -> bytes:
        header[name]["shape"] = chance.choice([[chance.choice(huge)], [chance.choice(huge), 0], [-1], [], ["a"], None])
        return pack(json.dumps(header), body)

    def dtype() -> bytes:
        header[name]["dtype"] = chance.choice(["F64", "I8", "BOOL", "C64", "F8_E4M3", "object", "", 7])
        return pack(json.dumps(header), body)

    def offsets() -> bytes:
        header[name]["data_offsets"] = chance.choice([[-8, 0], [0, chance.choice(huge)], [8, 0], [0], None, "ab"])
        return pack(json.dumps(header), body)

    def twice() -> bytes:
        text = json.dumps(header)
        key = json.dumps(chance.choice([name, "__metadata__"]))
        return pack(text[:-1] + f", {key}: {json.dumps(header[json.loads(key)])}}}", body)

    def length() -> bytes:
        return chance.choice([*huge[:4], 0, end, len(whole)]).to_bytes(8, "little") + whole[8:]

    def deep() -> bytes:
        return pack("[" * chance.choice([10, 10**4, 10**6]), body)

    def strings() -> bytes:
        header["__metadata__"][chance.choice(["format", "version", "sha256", "more"])] = "x" * 50
        return pack(json.dumps(header), body)

    def cut() -> bytes:
        return whole[: chance.randrange(len(whole))]

    def more() -> bytes:
        return whole + chance.randbytes(chance.randrange(1, 99))

    def noise() -> bytes:
        return chance.randbytes(chance.randrange(200))

    kinds = [
        flip,
        flip,
        flip_header,
        flip_header,
        shape,
        dtype,
        offsets,
        twice,
        length,
        deep,
        strings,
        cut,
        more,
        noise,
    ]
    return chance.choice(kinds)()


def test_a_thousand_mutated_files(written: tuple[Memory, bytes], tmp_path: Path) -> None:
    memory, whole = written
    path, chance, began = tmp_path / "m.safetensors", random.Random(0), time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(1000):
        data = edits(whole, chance)
        path.write_bytes(data)
        try:
            found = Memory.load(path)
        except MemoryFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)[:60]
            refused += 1
        else:
            assert_same(found, memory)  # a flipped bit of JSON's white space, at most
    assert refused > 980
    assert time.monotonic() - began < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # kB
    path.write_bytes(whole)
    assert_same(Memory.load(path), memory)


Content = dict[str, Any]
SIGNED: dict[str, tuple[Callable[[Content, dict[str, Tensor]], Any], str]] = {
    "deep": (lambda c, t: c.update(raw="[" * 100_000), "nested too deeply|Expecting"),
    "twice": (lambda c, t: c.update(raw='{"periods": {}, "periods": {}}'), "names a key twice"),
    "list": (lambda c, t: c.update(raw="[]"), "no JSON object"),
    "huge number": (lambda c, t: c.update(raw="9" * 10_000), "."),
    "no text": (lambda c, t: t.update(content=torch.ones(9)), "no text"),
    "long": (lambda c, t: t.update(content=torch.zeros((24 << 20) + 1, dtype=torch.uint8)), "longer than 24 MiB"),
    "many tokens": (lambda c, t: c["documents"][0].update(tokens=2**63), "wrong kinds"),
    "deep settings": (lambda c, t: c["settings"].update(x=json.loads("[" * 40 + "]" * 40)), "nested more than 32"),
    "learner kind": (lambda c, t: c["settings"].update(learner=5), "no levels"),
    "learner": (lambda c, t: c["settings"].update(learner={"x": 1}), "no levels"),
    "learner's levels": (lambda c, t: c["settings"].update(learner={"levels": [1]}), "no levels"),
    "learner's level": (lambda c, t: c["settings"].update(learner={"levels": {"a": {}}, "options": {}}), "ranks"),
    "no levels": (lambda c, t: c.pop("parameters"), "parameters"),
    "levels apart": (lambda c, t: c["periods"].update(more=3), "levels without their parameters"),
    "period": (lambda c, t: c["periods"].update(fast=-1), "period is not positive"),
    "period kind": (lambda c, t: c["periods"].update(fast=True), "whole numbers"),
    "names": (lambda c, t: c["parameters"].update(fast=[1]), "name is no text"),
    "settings": (lambda c, t: c.update(settings=[]), "settings"),
    "documents": (lambda c, t: c.update(documents=[{}]), "other fields"),
    "loss": (lambda c, t: c["documents"][0].update(loss="1"), "no number"),
    "tokens": (lambda c, t: c["documents"][0].update(tokens=-5), "wrong kinds"),
    "scale": (lambda c, t: c["scales"].update({next(iter(t)): -1.0}), "not positive"),
    "infinite scale": (lambda c, t: c["scales"].update(dict.fromkeys(t, 1e300)), "NaN or infinity"),
    "NaN": (lambda c, t: t.update({n: v * torch.nan for n, v in t.items()}), "NaN or infinity"),
    "integers": (lambda c, t: t.update({n: v.to(torch.int64) for n, v in t.items()}), "torch.int64"),
    "half": (lambda c, t: t.update({"left/a": torch.ones(2, 3)}), "half of a low-rank"),
    "ranks": (lambda c, t: t.update({"left/a": torch.ones(2, 3), "right/a": torch.ones(2, 3)}), "do not fit"),
    "vector": (lambda c, t: t.update({"left/a": torch.ones(2), "right/a": torch.ones(2)}), "do not fit"),
    "other": (lambda c, t: t.update({"../../a": torch.ones(2)}), "no meaning"),
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_valid_checksum_does_not_make_content_usable(
    written: tuple[Memory, bytes], tmp_path: Path, kind: str
) -> None:
    """A hostile writer can compute checksums as well."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(written[1])
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    content = json.loads(tensors.pop("content").numpy().tobytes())
    change, message = SIGNED[kind]
    change(content, tensors)
    text = content.get("raw", json.dumps(content)).encode()
    tensors.setdefault("content", torch.frombuffer(bytearray(text), dtype=torch.uint8))
    del header["sha256"]
    header["sha256"] = checksum(header, tensors)
    save_file(tensors, path, header)
    with pytest.raises(MemoryFileError, match=message):
        Memory.load(path)


INDEX_EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "traversal": lambda i: i["snapshots"][0].update(file="../../secret.safetensors"),
    "absolute": lambda i: i["snapshots"][0].update(file="/etc/passwd"),
    "other snapshot": lambda i: i["snapshots"][0].update(file="snapshot-0002.safetensors"),
    "number": lambda i: i["snapshots"][0].update(number=-1),
    "huge number": lambda i: i["snapshots"][0].update(number=10**30),
    "cycle": lambda i: i["snapshots"][0].update(parent=1),
    "later parent": lambda i: i["snapshots"][0].update(parent=2),
    "twice": lambda i: i["snapshots"].append(i["snapshots"][0]),
    "head": lambda i: i.update(head=77),
    "head kind": lambda i: i.update(head="1"),
    "kind": lambda i: i["snapshots"][1].update(note=None),
    "more": lambda i: i["snapshots"][1].update(more=1),
    "size": lambda i: i["snapshots"][1].update(bytes=-1),
    "digest": lambda i: i["snapshots"][1].update(sha256="0" * 64),
    "version": lambda i: i.update(version=2),
    "format": lambda i: i.update(format="x"),
    "no list": lambda i: i.update(snapshots={}),
}


@pytest.fixture
def store(written: tuple[Memory, bytes], tmp_path: Path) -> MemoryStore:
    """Two snapshots."""
    found = MemoryStore(tmp_path / "memory")
    found.save(written[0], "one")
    found.save(written[0], "two")
    return found


@pytest.mark.parametrize("edit", INDEX_EDITS)
def test_a_hostile_index_is_refused(store: MemoryStore, edit: str) -> None:
    path = store.path / "memory.json"
    index = json.loads(path.read_text())
    INDEX_EDITS[edit](index)
    path.write_text(json.dumps(index))
    with pytest.raises(MemoryFileError, match=r"memory\.json"):
        store.load()


def test_a_damaged_index_is_refused(store: MemoryStore) -> None:
    path, chance = store.path / "memory.json", random.Random(1)
    whole = path.read_bytes()
    texts = [b"", b"[" * 10**6, b"null", b"\xff\xfe", b'{"format": "nestling-memory", "format": 1}', b" " * (17 << 20)]
    for data in [*texts, *(whole[: chance.randrange(len(whole) - 3)] for _ in range(50))]:
        path.write_bytes(data)
        with pytest.raises(MemoryFileError, match=r"memory\.json"):
            store.load()


def test_links_are_refused(store: MemoryStore, written: tuple[Memory, bytes], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    file = store.path / "snapshot-0002.safetensors"
    os.rename(file, elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(MemoryFileError, match="symbolic link"):
        store.load()
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(MemoryFileError, match="symbolic link"):
        store.load()
    index = store.path / "memory.json"
    os.rename(index, tmp_path / "index")
    index.symlink_to(tmp_path / "index")
    with pytest.raises(MemoryFileError, match="not a link"):
        store.load()
    with pytest.raises(MemoryFileError, match="no memory file at"):
        Memory.load(Path("/dev/zero"))


def test_snapshots_that_trade_places_are_noticed(store: MemoryStore, written: tuple[Memory, bytes]) -> None:
    other = Memory(**vars(written[0]) | {"settings": {"other": 1}})
    store.save(other, "three")
    one, three = (store.path / f"snapshot-000{n}.safetensors" for n in (1, 3))
    one.replace(three)
    with pytest.raises(MemoryFileError, match=r"is not the file that memory\.json names"):
        store.load()
