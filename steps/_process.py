"""Processes a step starts: one group each, every descendant found again, the whole tree ended within a grace period."""

import contextlib
import ctypes
import functools
import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

STEP_KEY_VARIABLE = "ORCHESTRATE_STEP_KEY"
"""Environment variable that every program of a step carries: `workflow/run/step/attempt`."""

TOLD_TO_END = 128 + signal.SIGTERM
"""Exit code of an attempt whose process got SIGTERM though nobody had cancelled it."""

_MOST_ATTEMPTS = 1000
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 16, 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Make this process the parent of orphaned descendants, so that a daemonized grandchild is still found (Linux)."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextlib.contextmanager
def marked(key: str) -> Iterator[None]:
    """Name this thread after the attempt: what is forked from it and never calls `exec` keeps the name."""
    before = ctypes.create_string_buffer(16)
    _libc.prctl(_PR_GET_NAME, before, 0, 0, 0)
    _libc.prctl(_PR_SET_NAME, _mark(key), 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_NAME, before, 0, 0, 0)


def identity() -> dict[str, Any]:
    """What tells this process from a later one with its pid, whatever happens to the clock or the machine."""
    return identity_of(os.getpid())


def identity_of(pid: int) -> dict[str, Any]:
    """The same for another process; one that has ended is never alive."""
    return {"pid": pid, "start_ticks": _start_ticks(pid), "boot_id": _boot_id()}


def is_alive(identity: Mapping[str, Any]) -> bool:
    """True while the process that `identity` describes runs on this machine."""
    start_ticks = _start_ticks(identity["pid"])
    return start_ticks is not None and (start_ticks, _boot_id()) == (identity["start_ticks"], identity["boot_id"])


def descendants(pid: int) -> list[psutil.Process]:
    """All living descendants of `pid`, nearest first; empty when it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM, then SIGKILL for what is left after `grace_s` seconds."""
    alive = list(processes)
    for process in alive:
        _signal(process, signal.SIGTERM)
    if alive and grace_s > 0:
        _, alive = psutil.wait_procs(alive, timeout=grace_s)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=2)


def end_children(grace_s: float, spared: Callable[[], set[int]] = set) -> bool:
    """End every descendant of this process, those that are born meanwhile too; True when none is left.

    `spared` gives the pids of those that stay, and do not count.
    """
    for _ in range(20):
        if not _reap():
            return True
        kept = spared()
        rest = [process for process in descendants(os.getpid()) if process.pid not in kept]
        if kept and not rest:
            return True
        end(rest, grace_s)
        grace_s = 0
    return not _reap()


def kill_leftovers(step_key: str, *, before_attempt: int = _MOST_ATTEMPTS + 1) -> list[int]:
    """Kill what attempts of the step, those before `before_attempt`, left on this machine; returns the pids.

    Programs are found by `STEP_KEY_VARIABLE` in their environment, children that were forked and never called `exec` by
    the name of `marked`, and what hides both by the session of a process so found.
    """
    keys = [f"{step_key}/{attempt}" for attempt in range(1, before_attempt)]
    variables = {f"{STEP_KEY_VARIABLE}={key}".encode() for key in keys}
    names = {_mark(key) for key in keys}
    killed: list[int] = []
    for _ in range(5):
        found = _carriers(variables, names)
        if not found:
            break
        end(found, 0)
        killed += [process.pid for process in found]
    return killed


def reap_exited() -> Iterator[tuple[int, int]]:
    """Collect children of this process that have ended: pid and wait status of each."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, status


def _reap() -> bool:
    """Collect ended children, orphans adopted by `become_subreaper` too; True when others are left."""
    for _ in reap_exited():
        pass
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _carriers(variables: set[bytes], names: set[bytes]) -> list[psutil.Process]:
    """Living processes with one of these variables or names, and the rest of their sessions; never this process."""
    pids = [pid for pid in psutil.pids() if pid != os.getpid() and _start_ticks(pid) is not None]
    found = {
        pid
        for pid in pids
        if not variables.isdisjoint(_read(pid, "environ").split(b"\0")) or _read(pid, "comm").strip() in names
    }
    # Only sessions that the step made: one whose leader is not the step's may hold the worker or a Ray node.
    found |= {pid for pid in pids if _session(pid) in found and _session(pid) != os.getsid(0)}
    processes = []
    for pid in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    return processes


def _mark(key: str) -> bytes:
    return b"step-" + hashlib.sha256(key.encode()).hexdigest()[:10].encode()


def _start_ticks(pid: int) -> int | None:
    """Clock ticks from the machine's start to that of the process; None when it does not run (a zombie does not)."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


@functools.lru_cache(maxsize=1)
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - on the path of every step
            return file.readall()
    except OSError:
        return b""


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
