"""The output of a container, copied line by line; a copy that was interrupted goes on where it stopped.

engine's log --(one thread per stream)--> lines --> write(line, stream), then position += bytes of the line
"""

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docker.models.containers import Container

STREAMS = ("stdout", "stderr")
LONGEST_LINE = 65_536
"""Bytes after which a line without an end is cut, so that memory stays bounded."""
_LAYOUT = struct.Struct("<QQ")

Write = Callable[[str, str], None]
"""Takes a line and the name of its stream."""


class Position:
    """How many bytes of each stream are copied, in a file that outlives this process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        stored = os.pread(self._file, _LAYOUT.size, 0)
        sizes: tuple[int, ...] = _LAYOUT.unpack(stored) if len(stored) == _LAYOUT.size else (0, 0)
        self._bytes = dict(zip(STREAMS, sizes, strict=True))

    def __getitem__(self, stream: str) -> int:
        """Bytes of `stream` that are copied."""
        return self._bytes[stream]

    def advance(self, stream: str, size: int) -> None:
        """Count `size` more bytes. Sixteen bytes in one write: whole whatever happens to this process."""
        with self._lock:
            self._bytes[stream] += size
            os.pwrite(self._file, _LAYOUT.pack(*(self._bytes[each] for each in STREAMS)), 0)

    def close(self) -> None:
        """Close the file; the position stays in it."""
        os.close(self._file)


class Follower:
    """Copies both streams while the container runs."""

    def __init__(self, container: "Container", position: Position, write: Write) -> None:
        self._container = container
        self._position = position
        self._write = write
        self._threads = [threading.Thread(target=self._follow, args=(stream,), daemon=True) for stream in STREAMS]
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until both streams have ended; False when they have not after about `timeout_s`."""
        for thread in self._threads:
            thread.join(timeout_s / len(self._threads))
        return not any(thread.is_alive() for thread in self._threads)

    def _follow(self, stream: str) -> None:
        import docker.errors
        import requests
        import urllib3

        try:
            copy(self._container, stream, self._position, self._write, follow=True)
        except (docker.errors.APIError, requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError):
            # The container or the connection has ended; whoever waits for the container sees which and copies the rest.
            return


def copy(container: "Container", stream: str, position: Position, write: Write, *, follow: bool) -> None:
    """Copy one stream from where `position` says; to the container's end with `follow`, else what is there now."""
    chunks = container.logs(stdout=stream == "stdout", stderr=stream == "stderr", stream=True, follow=follow)
    skip, rest = position[stream], b""

    def emit(line: bytes, size: int) -> None:
        write(line.decode(errors="replace"), stream)
        position.advance(stream, size)

    for chunk in chunks:
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        *lines, rest = (rest + chunk[skip:]).split(b"\n")
        skip = 0
        for line in lines:
            emit(line, len(line) + 1)
        while len(rest) > LONGEST_LINE:
            emit(rest[:LONGEST_LINE], LONGEST_LINE)
            rest = rest[LONGEST_LINE:]
    if rest and not follow:
        emit(rest, len(rest))
