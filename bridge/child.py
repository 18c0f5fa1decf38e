"""One process of the local services, in a session of its own: started, adopted, watched and ended by the supervisor.

A pidfd is what is watched: it works alike for a process we started and for one that an earlier supervisor did.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.state import append_private

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
GOOD_LIFE_S = 30.0
"""A process that lived this long was started well: the next crash is its first."""

LOG_LIMIT_BYTES = 8 * 1024 * 1024
"""A longer log keeps its last quarter."""

TAIL_BYTES = 3000


class Child:
    """A service process and what is needed to start it again."""

    def __init__(self, name: str, log: Path, command: Callable[[], tuple[list[str], dict[str, str]]]) -> None:
        """`command` gives the argument list and the whole environment, anew for each start."""
        self.name = name
        self.log = log
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.created = 0
        """Start time in kernel ticks since boot: with the pid it names the process for ever."""
        self.since = 0.0
        self.pidfd = -1
        self.crashes = 0
        """Times it ended unasked since it last lived well."""

    @property
    def alive(self) -> bool:
        """Whether it is being watched."""
        return self.pidfd >= 0

    @property
    def record(self) -> dict[str, Any]:
        """What a later supervisor needs to adopt it."""
        return {"pid": self.pid, "created": self.created, "since": self.since}

    def start(self) -> None:
        """Start it; `OSError` when the program is not there."""
        argv, environment = self._command()
        with append_private(self.log) as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        self._process = process
        self._watch(process.pid, time.time())

    def adopt(self, record: Any) -> bool:
        """Watch the process of an earlier supervisor; False when it is gone."""
        try:
            pid, created, since = int(record["pid"]), int(record["created"]), float(record["since"])
        except (KeyError, TypeError, ValueError):
            return False
        if pid <= 0 or start_ticks(pid) != created:
            return False
        self._process = None
        try:
            self._watch(pid, since)
        except ProcessLookupError:
            return False
        if self.created != created:
            self.forget()
            return False
        return True

    def _watch(self, pid: int, since: float) -> None:
        self.pid, self.since = pid, since
        self.pidfd = os.pidfd_open(pid)
        self.created = start_ticks(pid)

    def forget(self) -> None:
        """Stop watching, after it ended."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            self._process = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1

    def backoff_s(self) -> float:
        """Count a crash; how long to wait before the next start."""
        self.crashes = 1 if time.time() - self.since >= GOOD_LIFE_S else self.crashes + 1
        return 0.0 if self.crashes == 1 else min(FIRST_BACKOFF_S * 2.0 ** (self.crashes - 2), LONGEST_BACKOFF_S)

    def ask_to_end(self) -> None:
        """SIGTERM to the process, which ends its own children."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)

    def kill_group(self) -> None:
        """SIGKILL to everything of its session's first group; what it started elsewhere stays."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def start_ticks(pid: int) -> int:
    """Start time of a living process in kernel ticks since boot; 0 when there is none, or only its exit status."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def tail(path: Path) -> str:
    """The end of a log, from a line's start."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return "(no log)"
    return (text.partition("\n")[2] if size > TAIL_BYTES else text).strip() or "(its log is empty)"


def trim(log: Path) -> None:
    """Keep a log from growing for ever; its writer appends, so it goes on behind what is kept."""
    with contextlib.suppress(FileNotFoundError), log.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size > LOG_LIMIT_BYTES:
            file.seek(size - LOG_LIMIT_BYTES // 4)
            kept = file.read()
            file.truncate(0)
            file.seek(0)
            file.write(kept)
