"""The worker's side of the spawner: start it, and ask it for one process per attempt."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steps._process import is_alive

_SEND_LIMIT_S = 10.0
"""A spawner that takes no request for so long is replaced."""
_LEAVE_LIMIT_S = 0.3
"""How long `close` waits for a spawner that has nothing left to do."""


class Spawner:
    """Owns the spawner process; `spawn` forks one attempt. Restarted when it has died."""

    def __init__(self) -> None:
        self._process: _Detached | None = None
        self._control: socket.socket | None = None
        self._children: dict[Path, Child] = {}
        self._sending = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Pid of the process, None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process now, so that the first step does not wait for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self._process = _Detached([sys.executable, "-m", "steps._spawner"], theirs.fileno())
        self._control = ours

    def find(self, request_file: Path) -> "Child | None":
        """The attempt in `request_file`'s folder, None when it was not started here or has ended."""
        return self._children.get(request_file)

    async def spawn(self, request_file: Path) -> "Child":
        """Start the attempt in `request_file`'s folder in a forked process, unless it is under way already.

        Waits for its turn when many are started at once. Raises `OSError` when no process can be made.
        """
        async with self._sending:
            if (child := self.find(request_file)) is not None:
                return child
            read_end = await self._send(request_file)
        child = Child(read_end, lambda: self._children.pop(request_file, None))
        self._children[request_file] = child
        return child

    async def _send(self, request_file: Path) -> int:
        """Give the request to the spawner; our end of the attempt's pipe."""
        for last_try in (False, True):
            if self._process is None or self._control is None or self._process.poll() is not None:
                self._let_go()
                self.start()
            assert self._control is not None
            read_end, write_end = os.pipe()
            try:
                await self._send_when_taken(self._control, request_file, write_end)
                return read_end
            except asyncio.CancelledError:
                os.close(read_end)
                raise
            except OSError:
                os.close(read_end)
                self._let_go()
                if last_try:
                    raise
            finally:
                os.close(write_end)
        raise AssertionError

    async def _send_when_taken(self, control: socket.socket, request_file: Path, write_end: int) -> None:
        """Send as soon as the spawner has room: it takes one request at a time, and the worker has other work."""
        async with asyncio.timeout(_SEND_LIMIT_S):
            while True:
                try:
                    socket.send_fds(control, [os.fsencode(request_file)], [write_end])
                    return
                except BlockingIOError:
                    await _writable(control)

    def close(self) -> None:
        """Let the spawner go; it stays for the attempts that run, and they stay in any case."""
        for child in list(self._children.values()):
            child.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            deadline = time.monotonic() + _LEAVE_LIMIT_S
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            self._process = None


async def _writable(control: socket.socket) -> None:
    loop, room = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(control, room.set)
    try:
        await room.wait()
    finally:
        loop.remove_writer(control)


class _Detached(subprocess.Popen[bytes]):
    """A process that may outlive its owner: letting go of it while it runs is not a mistake."""

    def __init__(self, argv: list[str], stdin: int) -> None:
        super().__init__(argv, stdin=stdin, start_new_session=True)

    def __del__(self) -> None:
        if self.returncode is None:
            self.poll()


class Child:
    """A forked attempt: `wait` returns when it has written its result, or its process has ended.

    The process may go on with another attempt, so an attempt that was started here is never watched by its pid.
    """

    def __init__(self, read_end: int, on_end: Callable[[], object] = lambda: None) -> None:
        self._read_end = read_end
        self._on_end = on_end
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(read_end, self.close)

    async def wait(self) -> None:
        """Wait for the end."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop watching."""
        if not self._ended.is_set():
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)
            self._ended.set()
            self._on_end()


class Adopted(Child):
    """An attempt that somebody else forked, watched by its pid.

    A process whose worker is gone ends with its attempt. One whose worker lives may go on with another: who waits
    looks for the result now and then too.
    """

    def __init__(self, host: Mapping[str, Any]) -> None:
        """Raises `ProcessLookupError` when the process that claimed the attempt is gone."""
        descriptor = os.pidfd_open(host["pid"])
        if not is_alive(host):
            os.close(descriptor)
            raise ProcessLookupError(host["pid"])
        super().__init__(descriptor)

    def signal(self, number: int) -> None:
        """Send a signal to that process, and to no later one with its pid."""
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._read_end, number)
