"""The worker's side of the spawner: start it, and ask it for one process per attempt."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path


class Spawner:
    """Owns the spawner process; `spawn` forks one attempt. Restarted when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start the process now, so that the first step does not wait for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "steps._spawner", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control = ours

    def spawn(self, request_file: Path) -> "Child":
        """Fork a process for the attempt in `request_file`'s folder. Raises `OSError` when no process can be made."""
        for last_try in (False, True):
            if self._process is None or self._process.poll() is not None:
                self.close()
                self.start()
            assert self._control is not None
            read_end, write_end = os.pipe()
            try:
                socket.send_fds(self._control, [str(request_file).encode()], [write_end])
                return Child(read_end)
            except OSError:
                os.close(read_end)
                if last_try:
                    raise
                self.close()
            finally:
                os.close(write_end)
        raise AssertionError

    def close(self) -> None:
        """Let the spawner go; attempts that run stay."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._process = None


class Child:
    """A forked attempt: `wait` returns when its process has ended."""

    def __init__(self, read_end: int) -> None:
        self._read_end = read_end
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(read_end, self._end)

    async def wait(self) -> None:
        """Wait for the end of the process."""
        await self._ended.wait()

    def close(self) -> None:
        """Stop watching."""
        if not self._ended.is_set():
            self._end()

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._read_end)
        os.close(self._read_end)
        self._ended.set()


class Adopted(Child):
    """An attempt that somebody else forked, watched by its pid."""

    def __init__(self, pid: int) -> None:
        super().__init__(os.pidfd_open(pid))
