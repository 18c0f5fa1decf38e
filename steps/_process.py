"""Processes a step starts: one group each, every descendant found again, the whole tree ended within a grace period."""

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

STEP_KEY_VARIABLE = "ORCHESTRATE_STEP_KEY"
"""Environment variable that every process of a step carries: `workflow/run/step/attempt`."""

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Make this process the parent of orphaned descendants, so that a daemonized grandchild is still found (Linux)."""
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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


def has_children() -> bool:
    """True when this process has children; costs a few file reads, unlike a scan of all processes."""
    return any(path.read_bytes() for path in Path("/proc/self/task").glob("*/children"))


def end_children(grace_s: float) -> None:
    """End every descendant of this process, those that are born meanwhile too."""
    for _ in range(20):
        if not has_children():
            return
        end(descendants(os.getpid()), grace_s)
        _reap()
        grace_s = 0


def kill_leftovers(step_key: str, *, except_pid: int | None = None) -> list[int]:
    """Kill what earlier attempts of the step left on this machine; returns the pids.

    Found by `STEP_KEY_VARIABLE` in their environment and by the session of a process so found, because a forked child
    that never called `exec` shows its parent's environment.
    """
    prefix = f"{step_key}/"
    spare = {os.getpid(), except_pid}
    found = [process for process in psutil.process_iter() if _carries(process, prefix) and process.pid not in spare]
    sessions = {_session(process.pid) for process in found} - {0, os.getsid(0)}
    found += [
        process
        for process in psutil.process_iter()
        if process not in found and process.pid not in spare and _session(process.pid) in sessions
    ]
    end(found, 0)
    return [process.pid for process in found]


def is_same_process(pid: int, created_at: float) -> bool:
    """True when `pid` runs and is the process that was created at `created_at` (Unix time), not a later one."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created_at) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_exit(pid: int, timeout_s: float) -> bool:
    """Wait until `pid` is gone; False when it still lives after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.01)
    return False


def _carries(process: psutil.Process, prefix: str) -> bool:
    try:
        return process.environ().get(STEP_KEY_VARIABLE, "").startswith(prefix)
    except (psutil.Error, OSError):
        return False


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _reap() -> None:
    """Collect orphans that became children of this process by `become_subreaper`."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
