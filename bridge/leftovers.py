"""Processes of a state directory, found by the marker in their environment or by descent, whoever started them.

The containers of its steps are the engine's processes; they are found by their label.
"""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bridge.state import MARKER, State

if TYPE_CHECKING:
    from container.step_containers import StepContainer

TERMINATE_GRACE_S = 1.0
CONTAINER_GRACE_S = 3.0
"""For containers, and for all when there are any: the processes that stop them say their last words too."""
POLL_S = 0.01


@dataclass(frozen=True)
class Leftover:
    """A process, or the first one of a container, that had to be ended by force."""

    pid: int
    command: str


def find(state: State) -> list[psutil.Process]:
    """Living processes that carry our marker, and all their descendants; never this process or its ancestors.

    A parent comes before its children: told first, it knows why they end.
    """
    marker = {_marker(state)}
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    living: dict[int, psutil.Process] = {}
    children: dict[int, list[int]] = {}
    found: list[int] = []
    for process in psutil.process_iter(["ppid", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            living[process.pid] = process
            children.setdefault(process.info["ppid"], []).append(process.pid)
            if _carries(process.pid, marker):
                found.append(process.pid)
    family: set[int] = set()
    while found:
        pid = found.pop()
        if pid not in family:
            family.add(pid)
            found += children.get(pid, [])
    return sorted((living[pid] for pid in family - own), key=_age_order)


def end(state: State, known: list[psutil.Process], deadline: float) -> tuple[list[Leftover], list[Leftover]]:
    """End what lives of `known` and whatever `find` finds, until there is nothing; (what was ended, what is left).

    Each is asked by SIGTERM and killed a moment later; then the steps' containers that are still there are removed.
    `deadline` is in seconds of the monotonic clock.
    """
    from container import step_containers

    label = step_containers.STATE_LABEL, step_containers.state_digest(str(state.dir))
    grace_s = CONTAINER_GRACE_S if step_containers.find(*label, os.environ) else TERMINATE_GRACE_S
    ended: dict[int, Leftover] = {}
    asked_at: dict[int, float] = {}
    while True:
        left = {process.pid: process for process in (*find(state), *filter(_lives, known))}
        for process in left.values():
            with contextlib.suppress(psutil.Error):
                ended.setdefault(process.pid, Leftover(process.pid, _command(process)))
                if process.pid not in asked_at:
                    asked_at[process.pid] = time.monotonic()
                    process.send_signal(signal.SIGTERM)
                elif time.monotonic() - asked_at[process.pid] >= grace_s:
                    process.send_signal(signal.SIGKILL)
        if not left or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    containers = step_containers.find(*label, os.environ)
    stuck = step_containers.end(containers, os.environ, CONTAINER_GRACE_S)
    return (
        [*ended.values(), *(_leftover(each) for each in containers if each.pid)],
        [*(ended[pid] for pid in left), *map(_leftover, stuck)],
    )


def end_services(state: State, adopted: set[int]) -> None:
    """Kill the services of earlier supervisors that nobody has a record of; what they started for steps stays."""
    marks = (str(state.temporal_db), f"--temp-dir={state.ray_temp_dir}")
    killed = []
    for process in find(state):
        with contextlib.suppress(psutil.Error):
            argv = process.cmdline()
            is_worker = {"--state-dir", str(state.dir), "--address"} <= set(argv)
            if process.pid not in adopted and (is_worker or any(mark in argv for mark in marks)):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=2.0)


def kill_carrying(state: State, variable: str) -> None:
    """Kill the processes that carry our marker and also `variable`, a `NAME=value` of their environment."""
    wanted = {_marker(state), variable.encode()}
    for pid in psutil.pids():
        if _carries(pid, wanted):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marker(state: State) -> bytes:
    return f"{MARKER}={state.dir}".encode()


def _carries(pid: int, variables: set[bytes]) -> bool:
    with contextlib.suppress(OSError):
        return variables <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return False


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _age_order(process: psutil.Process) -> tuple[float, int]:
    with contextlib.suppress(psutil.Error):
        return process.create_time(), process.pid
    return 0.0, process.pid


def _leftover(container: "StepContainer") -> Leftover:
    return Leftover(container.pid, f"container {container.name}")


def _command(process: psutil.Process) -> str:
    return " ".join(process.cmdline())[:200].strip() or process.name()
