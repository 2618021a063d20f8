"""Texts that a memory learned from, kept beside it where that is wanted, so that one of them can be forgotten exactly.

PATH/texts/DIGEST.txt    UTF-8, named by the SHA-256 of the text
PATH/texts/DIGEST.enc    the same, encrypted with a key (Fernet: AES-128-CBC with HMAC-SHA-256)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nestling.continual.store.memory_file import MemoryFileError
from nestling.errors import UserError
from nestling.memory.checked_file import flush, replacing

FOLDER = "texts"
PLAIN, SEALED = ".txt", ".enc"
DIGEST = re.compile(r"[0-9a-f]{64}")


def text_digest(text: str) -> str:
    """SHA-256 of a document's text, by which it is known again."""
    return hashlib.sha256(_bytes(text)).hexdigest()


class KeptTexts:
    """The folder of texts of a memory. Every text is written whole or not at all, and checked when it is read.

    Args:
        memory: the memory's directory.
        key: what `read_key` gives; None writes plain text, and reads no other.

    Raises:
        UserError: a key, and the package `cryptography` is not installed.
        MemoryFileError: a folder that is a link or no folder.
    """

    def __init__(self, memory: Path, key: bytes | None = None) -> None:
        self.folder = memory / FOLDER
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise MemoryFileError(f"{self.folder} must be a folder of its own, not a link or a file")
        self._cipher = None if key is None else _fernet().Fernet(key)

    def exists(self) -> bool:
        """Whether this memory keeps texts."""
        return self.folder.is_dir()

    def sealed(self) -> bool:
        """Whether any of them is encrypted."""
        return any(self.folder.glob(f"*{SEALED}"))

    def digests(self) -> set[str]:
        """Of the texts that are kept."""
        found = (path.stem for path in self.folder.glob("*") if path.suffix in (PLAIN, SEALED))
        return {name for name in found if DIGEST.fullmatch(name)}

    def keep(self, text: str) -> None:
        """Keep a text, unless it is there.

        Raises:
            MemoryFileError: others are encrypted and there is no key, or the disk is full.
        """
        digest = text_digest(text)
        if digest in self.digests():
            return
        if self._cipher is None and self.sealed():
            raise MemoryFileError(f"{self.folder} holds encrypted texts, and this one would not be; give their key")
        content = _bytes(text)
        suffix = PLAIN if self._cipher is None else SEALED
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{digest}{suffix}") as scratch:
                scratch.chmod(0o600)
                scratch.write_bytes(content if self._cipher is None else self._cipher.encrypt(content))
        except OSError as error:
            raise MemoryFileError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def read(self, digest: str) -> str:
        """A text.

        Raises:
            MemoryFileError: it is not kept, it is another one than its name says, or it is encrypted and there is no
                key or another one.
        """
        for suffix in (PLAIN, SEALED):
            path = self.folder / f"{digest}{suffix}"
            if not path.is_file() or path.is_symlink():
                continue
            content = path.read_bytes()
            if suffix == SEALED:
                content = self._opened(path, content)
            if hashlib.sha256(content).hexdigest() != digest:
                raise MemoryFileError(f"{path} is not the text that was kept there; restore it from a copy")
            return content.decode("utf-8", "surrogatepass")
        raise MemoryFileError(f"{self.folder} does not hold the text {digest[:12]}")

    def remove(self, digest: str) -> None:
        """Delete a text, if it is there."""
        for suffix in (PLAIN, SEALED):
            (self.folder / f"{digest}{suffix}").unlink(missing_ok=True)
        if self.folder.is_dir():
            flush(self.folder)

    def keep_only(self, digests: Collection[str]) -> None:
        """Delete all other texts, and what a process left that was killed while it wrote one."""
        for digest in self.digests() - set(digests):
            self.remove(digest)
        for scratch in self.folder.glob(".*.tmp"):
            scratch.unlink(missing_ok=True)

    def is_own(self) -> bool:
        """Whether the folder, if it is there, holds nothing but texts of this kind."""
        names = [path.name for path in self.folder.glob("*")]
        return all(name[:64] in self.digests() and name[64:] in (PLAIN, SEALED) for name in names)

    def copy_to(self, other: Path, digests: Collection[str]) -> None:
        """Keep some of the texts beside another memory too, encrypted or not as they are."""
        target = KeptTexts(other)
        for digest in sorted(self.digests() & set(digests)):
            for suffix in (PLAIN, SEALED):
                path = self.folder / f"{digest}{suffix}"
                if path.is_file() and not path.is_symlink():
                    target.folder.mkdir(parents=True, exist_ok=True)
                    with replacing(target.folder / path.name) as scratch:
                        scratch.chmod(0o600)
                        scratch.write_bytes(path.read_bytes())

    def _opened(self, path: Path, content: bytes) -> bytes:
        if self._cipher is None:
            raise MemoryFileError(f"{path} is encrypted; give its key")
        try:
            return bytes(self._cipher.decrypt(content))
        except _fernet().InvalidToken as error:
            raise MemoryFileError(f"{path} was encrypted with another key, or is damaged") from error


def make_key(path: Path) -> None:
    """Write a new key to a file that only its owner can read.

    Raises:
        UserError: `cryptography` is not installed, there is a file already, or none can be written.
    """
    key = _fernet().Fernet.generate_key()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(key + b"\n")
        flush(path)
    except FileExistsError as error:
        raise UserError(f"there is already something at {path}, and a key that is lost cannot be had again") from error
    except OSError as error:
        raise UserError(f"no key can be written to {path}: {error.strerror or error}") from error


def read_key(path: Path) -> bytes:
    """A key that `make_key` wrote.

    Raises:
        UserError: no such file, or it holds no key.
    """
    try:
        key = path.read_bytes().strip()
        _fernet().Fernet(key)
    except OSError as error:
        raise UserError(f"no key can be read from {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} holds no key; make one with: nestling memory key {path}") from error
    return key


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _fernet() -> Any:
    try:
        from cryptography import fernet
    except ImportError as error:
        raise UserError(
            "encrypted texts need the cryptography package; install it with: pip install 'nestling[encrypt]'"
        ) from error
    return fernet
