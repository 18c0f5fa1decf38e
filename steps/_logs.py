"""The logs of one attempt: two byte-exact files and one of JSON lines, fed from two pipes by one thread.

    step and its children -> fd 1, 2 -> pipes -> Masker -> stdout.log, stderr.log, structured.jsonl

Memory is bounded: nothing is kept but the unfinished line. A carriage return ends a record, so a progress bar is many
records; a line longer than `LONGEST_RECORD` is cut into partial ones. Best effort: a full disk loses log lines, it does
not end or block the step.
"""

import codecs
import contextlib
import ctypes
import io
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from steps._masking import Masker
from steps._request import StepRequest

STREAMS = ("stdout", "stderr")
LONGEST_RECORD = 16_384
"""Characters of one structured record."""
_CHUNK = 65_536
_DRAIN_S = 5.0
"""Longest time to copy what is in the pipes when the step has ended."""
_LONGEST_WAIT_S = 600.0
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_libc = ctypes.CDLL(None)


class AttemptLogs:
    """Open log files of one attempt. `write` may be called from any thread."""

    def __init__(self, request: StepRequest, attempt_dir: Path, secrets: list[str]) -> None:
        self._files = {stream: _LogFile(attempt_dir / f"{stream}.log") for stream in STREAMS}
        self._structured = _LogFile(attempt_dir / "structured.jsonl")
        self._maskers = {stream: Masker(secrets) for stream in STREAMS}
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in STREAMS}
        self._lines = dict.fromkeys(STREAMS, "")
        self._lock = threading.Lock()
        self._closed = False
        fields = {
            "workflowId": request.workflow_id,
            "runId": request.run_id,
            "stepId": request.step_id,
            "stepName": request.step_name,
            "attempt": request.attempt,
        }
        self._fields = {stream: _as_json({**fields, "stream": stream})[1:-1] for stream in STREAMS}

    def write(self, stream: str, data: bytes) -> None:
        """Append bytes of one stream, secrets masked."""
        with self._lock:
            if not self._closed:
                self._append(stream, self._maskers[stream].feed(data))

    def close(self) -> None:
        """Write what is still held back and close the files; what is written later is dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for stream in STREAMS:
                self._append(stream, self._maskers[stream].flush(), final=True)
                self._files[stream].close()
            self._structured.close()

    def _append(self, stream: str, data: bytes, final: bool = False) -> None:
        if data:
            self._files[stream].write(data)
        elif not final:
            return
        text = self._lines[stream] + self._decoders[stream].decode(data, final)
        # "\r" at the very end may be the first half of "\r\n": wait for what follows.
        held = "\r" if text.endswith("\r") and not final else ""
        text = text.removesuffix("\r") if held else text
        *complete, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        now = datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00")
        start = f'{{"timestamp": "{now}Z", {self._fields[stream]}, "message": '
        records = []
        for number, line in enumerate((*complete, rest)):
            while len(line) > LONGEST_RECORD:
                records.append(f'{start}{_as_json(line[:LONGEST_RECORD])}, "partial": true}}\n')
                line = line[LONGEST_RECORD:]
            if number < len(complete):
                records.append(f'{start}{_as_json(line)}, "partial": false}}\n')
            elif final and line:
                records.append(f'{start}{_as_json(line)}, "partial": true}}\n')
            else:
                self._lines[stream] = line + held
        if records:
            self._structured.write("".join(records).encode())


class _LogFile:
    """Appends to a file; what cannot be written is lost."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        os.close(self._descriptor)


class Capture:
    """While entered, everything this process and its children print (fd 1 and 2, and `sys.stdout`) goes to `logs`.

    The thread that copies also keeps the time: it calls `alarm` once, when `limit_s` is over or `ring` was called. On
    leaving, what is already in the pipes is written; a process that outlives the step and still holds a pipe does not
    keep us waiting.
    """

    def __init__(self, logs: AttemptLogs, limit_s: float, alarm: Callable[[], None]) -> None:
        self._logs = logs
        self._limit_s = limit_s
        self._alarm = alarm
        self._pump = threading.Thread(target=self._copy, name="step-logs", daemon=True)
        self._bell = -1
        # Reentrant, because a signal handler may ring while its thread closes the bell.
        self._bell_lock = threading.RLock()
        self._stopping = False

    def __enter__(self) -> "Capture":
        open_standard_descriptors()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        pipes = [os.pipe() for _ in STREAMS]
        self._read_ends = {read_end: stream for (read_end, _), stream in zip(pipes, STREAMS, strict=True)}
        _flush_standard_streams()
        self._saved = [os.dup(fd) for fd in (1, 2)]
        self._saved_objects = sys.stdout, sys.stderr
        for fd, (_, write_end) in zip((1, 2), pipes, strict=True):
            os.dup2(write_end, fd)
            os.close(write_end)
        # Unbuffered, so that lines keep their order beside those of child processes.
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8", "replace", write_through=True) for fd in (1, 2)
        )
        self._pump.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _flush_standard_streams()
        sys.stdout, sys.stderr = self._saved_objects
        for fd, copy in zip((1, 2), self._saved, strict=True):
            os.dup2(copy, fd)
            os.close(copy)
        self.drain()
        with self._bell_lock:
            bell, self._bell = self._bell, -1
            os.close(bell)
        for fd in self._read_ends:
            os.close(fd)

    def ring(self) -> None:
        """Have the alarm called soon. Safe in any thread and in signal handlers."""
        with self._bell_lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def drain(self) -> None:
        """Write what is in the pipes to the logs and stop copying."""
        self._stopping = True
        self.ring()
        self._pump.join()

    def _copy(self) -> None:
        """Copy until both pipes are closed, or until told to stop and the pipes are empty."""
        poller = select.poll()
        for fd in (*self._read_ends, self._bell):
            os.set_blocking(fd, False)
            poller.register(fd, select.POLLIN)
        still_open, alarm_at, give_up_at = set(self._read_ends), time.monotonic() + self._limit_s, float("inf")
        while still_open or not self._stopping:
            wait_s = min(alarm_at - time.monotonic(), _LONGEST_WAIT_S)
            if self._stopping:
                wait_s = 0
                give_up_at = min(give_up_at, time.monotonic() + _DRAIN_S)
            ready = [fd for fd, _ in poller.poll(max(0, wait_s) * 1000)]
            if self._bell in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
            if alarm_at < float("inf") and not self._stopping and (self._bell in ready or time.monotonic() >= alarm_at):
                alarm_at = float("inf")
                self._alarm()
            if self._stopping and (not still_open.intersection(ready) or time.monotonic() > give_up_at):
                return
            for fd in still_open.intersection(ready):
                data = self._read(fd)
                if data:
                    self._logs.write(self._read_ends[fd], data)
                elif data is not None:
                    still_open.discard(fd)
                    poller.unregister(fd)

    @staticmethod
    def _read(fd: int) -> bytes | None:
        try:
            return os.read(fd, _CHUNK)
        except BlockingIOError:
            return None


def open_standard_descriptors() -> None:
    """Open fd 0, 1 and 2 on /dev/null where they are closed, so that no other file gets such a number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _flush_standard_streams() -> None:
    """Write what C code and the interpreter's own streams hold back; it belongs to where fd 1 and 2 point now."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    _libc.fflush(None)


def tail(path: Path, limit: int) -> tuple[str, bool]:
    """The last `limit` bytes of a log as text, and whether something before them was cut.

    Neither end falls inside a UTF-8 character, also while the log is written. A missing file is an empty log.
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
        # Four such bytes in a row are not UTF-8 at all.
        start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), len(data) if len(data) < 4 else 0)
        data = data[start:]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data), cut
