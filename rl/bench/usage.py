"""What each role takes of the machine: CPU seconds, and the most memory.

A role is a process and all that it started; on the stack `local` it is a thread, whose CPU time alone can be told apart
from the rest of the process. The threads that a role's thread starts for itself count for `loop` there.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from rl.bench.results import Role, RoleUsage

_THREADS: dict[Role, str] = {"trainer": "learner", "generator": "engine-"}
"""What the names of the roles' threads begin with."""


def cpu_s(processes: Mapping[str, int]) -> dict[Role, float]:
    """CPU seconds of each role since it began; `processes` says which process hosts which part."""
    own = psutil.Process()
    if _are_threads(processes):
        by_thread = {one.id: one.user_time + one.system_time for one in own.threads()}
        found = {role: sum(by_thread.get(one, 0.0) for one in _threads(prefix)) for role, prefix in _THREADS.items()}
        return {**found, "loop": sum(by_thread.values()) - sum(found.values())}
    return {role: sum(map(_cpu_s, pids)) for role, pids in _processes(processes).items()}


def peak_memory_bytes(processes: Mapping[str, int]) -> dict[Role, int]:
    """The most that each role had in memory, shared memory included; roles that are threads of this process count for
    `loop`, and so do processes of a stack that host no part, such as a spare."""
    return {role: sum(map(_peak_bytes, pids)) for role, pids in _processes(processes).items()}


def usage(
    before: Mapping[Role, float], after: Mapping[Role, float], memory: Mapping[Role, int]
) -> tuple[RoleUsage, ...]:
    """Of the time between two looks."""
    return tuple(
        RoleUsage(role=role, peak_memory_bytes=memory.get(role, 0), cpu_s=max(0.0, seconds - before.get(role, 0.0)))
        for role, seconds in after.items()
    )


def _are_threads(processes: Mapping[str, int]) -> bool:
    return set(processes.values()) <= {os.getpid()}


def _threads(prefix: str) -> list[int]:
    return [one.native_id for one in threading.enumerate() if one.name.startswith(prefix) and one.native_id is not None]


def _processes(processes: Mapping[str, int]) -> dict[Role, list[int]]:
    """Role -> its processes and all that they started; `loop` has this one and what else it started."""
    own = psutil.Process()
    found: dict[Role, list[int]] = {}
    for part, pid in processes.items():
        if pid != own.pid:
            found.setdefault("trainer" if part == "trainer" else "generator", []).extend(_tree(pid))
    hosts = {pid for pids in found.values() for pid in pids}
    found["loop"] = [pid for pid in _tree(own.pid) if pid not in hosts]
    return found


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
