"""Hashes of file contents; a large file that has not changed since it was hashed is not read again."""

import hashlib
import os
import time
from io import FileIO
from pathlib import Path
from typing import Protocol

REMEMBERED_FROM_BYTES = 128 * 1024
"""Smaller files are read every time: that costs no more than looking up what was remembered."""
_FRESH_S = 2.0
"""A file changed this recently may change again within one tick of its clock, so its hash is not remembered."""


class HashMemory(Protocol):
    """Remembers hashes by path and stamp. Best effort: it may forget."""

    def recall(self, path: str, stamp: str) -> str | None:
        """The hash of `path` when it had this `stamp`."""

    def remember(self, path: str, stamp: str, content_hash: str) -> None:
        """Keep the hash for later."""


class FileHasher:
    """Hashes files by content, with the help of a memory."""

    def __init__(self, memory: HashMemory | None = None) -> None:
        self._memory = memory

    def hash(self, path: Path) -> str:
        """`sha256:` and 64 hex digits. Raises `OSError` when the file cannot be read."""
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size < REMEMBERED_FROM_BYTES:
                return "sha256:" + hashlib.sha256(file.readall()).hexdigest()
            if self._memory is None:
                return _digest(file)
            name, stamp = str(path.absolute()), _stamp(status)
            known = self._memory.recall(name, stamp)
            if known is not None:
                return known
            content_hash = _digest(file)
            settled = time.time() - max(status.st_mtime, status.st_ctime) > _FRESH_S
            if settled and _stamp(os.fstat(file.fileno())) == stamp:
                self._memory.remember(name, stamp, content_hash)
            return content_hash


def text_hash(text: str) -> str:
    """`sha256:` and 64 hex digits of a text."""
    return "sha256:" + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _digest(file: FileIO) -> str:
    return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(status: os.stat_result) -> str:
    # The change time sees a file that was rewritten in place and given its old modification time back.
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_dev}:{status.st_ino}"
