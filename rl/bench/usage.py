"""What each role takes of the machine: CPU seconds, and the most memory.

A role is a process and all that it started; a generator of the stack `local` is a thread of this process, whose CPU
time alone can be told apart from the rest. The threads that it starts for itself count for `loop` there.
"""

import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from rl.bench.results import Role, RoleUsage

_ENGINES = "engine-"
"""What the names of the generators' threads begin with."""


def cpu_s(processes: Mapping[str, int]) -> dict[Role, float]:
    """CPU seconds of each role since it began; `processes` says which process hosts which part."""
    found = {role: sum(map(_cpu_s, pids)) for role, pids in _processes(processes).items()}
    if "generator" not in found:
        engines = {one.native_id for one in threading.enumerate() if one.name.startswith(_ENGINES)}
        threads = [one for one in psutil.Process().threads() if one.id in engines]
        found["generator"] = sum(one.user_time + one.system_time for one in threads)
        found["loop"] -= found["generator"]
    return found


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
