"""The logs of one attempt: two byte-exact files and one of JSON lines, fed from two pipes by one thread.

    step and its children -> fd 1, 2 -> pipes -> Masker -> stdout.log, stderr.log, structured.jsonl

Memory is bounded: nothing is kept but the unfinished line. A carriage return ends a record, so a progress bar is many
records; a line longer than `LONGEST_RECORD` is cut into partial ones.
"""

import codecs
import contextlib
import io
import json
import os
import selectors
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from steps._masking import Masker
from steps._request import StepRequest

STREAMS = ("stdout", "stderr")
LONGEST_RECORD = 16_384
"""Characters of one structured record."""
_CHUNK = 65_536
_DRAIN_S = 5.0
"""Longest time to copy what is in the pipes when the step has ended."""


class AttemptLogs:
    """Open log files of one attempt. `write` may be called from any thread."""

    def __init__(self, request: StepRequest, attempt_dir: Path, secrets: list[str]) -> None:
        self._files = {stream: (attempt_dir / f"{stream}.log").open("ab", buffering=0) for stream in STREAMS}
        self._structured = (attempt_dir / "structured.jsonl").open("ab", buffering=0)
        self._maskers = {stream: Masker(secrets) for stream in STREAMS}
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in STREAMS}
        self._lines = dict.fromkeys(STREAMS, "")
        self._lock = threading.Lock()
        self._fields = {
            "workflowId": request.workflow_id,
            "runId": request.run_id,
            "stepId": request.step_id,
            "stepName": request.step_name,
            "attempt": request.attempt,
        }

    def write(self, stream: str, data: bytes) -> None:
        """Append bytes of one stream, secrets masked."""
        with self._lock:
            if not self._structured.closed:
                self._append(stream, self._maskers[stream].feed(data))

    def close(self) -> None:
        """Write what is still held back and close the files; what is written later is dropped."""
        with self._lock:
            if self._structured.closed:
                return
            for stream in STREAMS:
                self._append(stream, self._maskers[stream].flush(), final=True)
                self._files[stream].close()
            self._structured.close()

    def _append(self, stream: str, data: bytes, final: bool = False) -> None:
        if data:
            self._files[stream].write(data)
        text = self._lines[stream] + self._decoders[stream].decode(data, final)
        # "\r" at the very end may be the first half of "\r\n": wait for what follows.
        held = "\r" if text.endswith("\r") and not final else ""
        text = text.removesuffix("\r") if held else text
        *complete, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        records = [self._record(stream, line, partial=False) for line in complete]
        while len(rest) > LONGEST_RECORD or (final and rest):
            records.append(self._record(stream, rest[:LONGEST_RECORD], partial=True))
            rest = rest[LONGEST_RECORD:]
        self._lines[stream] = rest + held
        if records:
            self._structured.write("".join(records).encode())

    def _record(self, stream: str, message: str, *, partial: bool) -> str:
        fields = {
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            **self._fields,
            "stream": stream,
            "message": message,
            "partial": partial,
        }
        return json.dumps(fields, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def captured(logs: AttemptLogs) -> Iterator[None]:
    """Send everything this process and its children print (fd 1 and 2, and `sys.stdout`) to `logs`.

    On leaving, what is already in the pipes is written; a process that outlives the step and still holds a pipe does
    not keep us waiting.
    """
    pipes = [os.pipe() for _ in STREAMS]
    saved = [os.dup(fd) for fd in (1, 2)]
    saved_objects = sys.stdout, sys.stderr
    stop_read, stop_write = os.pipe()
    for fd, (_, write_end) in zip((1, 2), pipes, strict=True):
        os.dup2(write_end, fd)
        os.close(write_end)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8", "replace", write_through=True) for fd in (1, 2)
    )
    read_ends = {read_end: stream for (read_end, _), stream in zip(pipes, STREAMS, strict=True)}
    pump = threading.Thread(target=_pump, args=(read_ends, stop_read, logs), name="step-logs", daemon=True)
    pump.start()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = saved_objects
        for fd, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(stop_write)
        pump.join()
        for fd in (*read_ends, stop_read):
            os.close(fd)


def _pump(read_ends: dict[int, str], stop_fd: int, logs: AttemptLogs) -> None:
    """Copy until both pipes are closed, or until told to stop and the pipes are empty."""
    with selectors.PollSelector() as selector:
        for fd in read_ends:
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        selector.register(stop_fd, selectors.EVENT_READ)
        stopping, still_open, deadline = False, set(read_ends), float("inf")
        while still_open and time.monotonic() < deadline:
            ready = [key.fd for key, _ in selector.select(0 if stopping else None)]
            if stop_fd in ready:
                stopping, deadline = True, time.monotonic() + _DRAIN_S
                selector.unregister(stop_fd)
            elif not ready:
                return
            for fd in still_open.intersection(ready):
                try:
                    data = os.read(fd, _CHUNK)
                except BlockingIOError:
                    continue
                if data:
                    logs.write(read_ends[fd], data)
                else:
                    still_open.discard(fd)
                    selector.unregister(fd)


def tail(path: Path, limit: int) -> tuple[str, bool]:
    """The last `limit` bytes of a log as text, and whether something before them was cut.

    The cut never falls inside a UTF-8 character. A missing file is an empty log.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except FileNotFoundError:
        return "", False
    cut = size > limit
    if cut:
        start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
        data = data[start:]
    return data.decode(errors="replace"), cut
