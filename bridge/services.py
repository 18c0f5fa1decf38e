"""Client side of the local services: start or find them, ask for Ray, stop them. Light: every command may import it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.state import MARKER, State, StateError, append_private

POLL_S = 0.005
STATUS_INTERVAL_S = 0.1
ANSWER_TIMEOUT_S = 5.0
CRASHES_TO_GIVE_UP = 3
LOG_LINES = 20
RESPAWN_S = 3.0
SPAWN_TIMEOUT_S = 30.0
LOCK_POLL_S = 0.02
STOP_ANSWER_TIMEOUT_S = 20.0
LEFTOVERS_S = 5.0


class ServiceError(Exception):
    """A local service could not be started, reached or stopped. The CLI exits with 3."""


class RayUnusable(ServiceError):
    """The local Ray cannot start, and trying again does not help."""


@dataclass(frozen=True)
class Services:
    """The local services, ready to take work."""

    state: State
    address: str
    """`host:port` of the Temporal server."""
    ui: str | None
    """URL of Temporal's web UI, when it was asked for."""
    gateway_socket: Path


@dataclass(frozen=True)
class RayService:
    """The local Ray, ready to take actors."""

    address: str
    """What `ray.init` connects to."""
    dashboard: str
    token_file: Path


@dataclass(frozen=True)
class Stopped:
    """What `stop` ended."""

    services: tuple[tuple[str, int], ...]
    """Name and pid of the services that were running."""
    killed: tuple[tuple[int, str], ...]
    """Pid and command of what was still there after them: running steps, and what they started."""


def ensure(
    state: State, *, ui: bool = False, timeout_s: float = 30.0, worker_command: list[str] | None = None
) -> Services:
    """Find the services or start them; returns as soon as the worker takes work.

    `ui` adds Temporal's web UI. `worker_command` runs another worker than ours, when the supervisor is not there yet.
    `ServiceError` when a service cannot start or is not ready in time.
    """
    try:
        state.create()
    except StateError as error:
        raise ServiceError(str(error)) from error
    deadline = time.monotonic() + timeout_s
    status = _supervisor(state, {"do": "ensure", "ui": ui}, deadline, worker_command)
    asked_at = time.monotonic()
    while True:
        server_is_up = status["temporal"]["address"] is not None and (not ui or status["temporal"]["ui"] is not None)
        if server_is_up and accepts(state.gateway_socket):
            return Services(state, status["temporal"]["address"], status["temporal"]["ui"], state.gateway_socket)
        if not server_is_up or time.monotonic() - asked_at > STATUS_INTERVAL_S:
            asked_at = time.monotonic()
            status = _ask(state, {"do": "status"}, ANSWER_TIMEOUT_S) or _supervisor(
                state, {"do": "ensure", "ui": ui}, deadline, worker_command
            )
            _check_crashes(state, status)
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the local services are not ready after {timeout_s:g} s, wanted `{state.gateway_socket}`\n"
                f"{_tails(state)}\n\nhint: `orchestrate down` and `orchestrate up` start them anew"
            )
        time.sleep(POLL_S)


def find(state: State) -> Services | None:
    """The services when they run; starts nothing."""
    answer = _ask(state, {"do": "status"}, ANSWER_TIMEOUT_S)
    if answer is None or answer["temporal"]["address"] is None:
        return None
    return Services(state, answer["temporal"]["address"], answer["temporal"]["ui"], state.gateway_socket)


def start_ray(state: State, timeout_s: float = 65.0) -> RayService:
    """The local Ray, started if need be; callers at the same time share one start.

    `ServiceError` with the end of its log when it cannot start; `RayUnusable` when waiting will not help.
    """
    answer = _ask(state, {"do": "start_ray"}, timeout_s)
    if answer is None:
        raise ServiceError(
            f"no supervisor answers at `{state.supervisor_socket}`, or Ray needs more than {timeout_s:g} s\n\n"
            f"hint: `orchestrate status` shows what runs; Ray's log is `{state.log_file('ray')}`"
        )
    if "error" in answer:
        kind = RayUnusable if answer.get("final") else ServiceError
        raise kind(f"{answer['error']}\n\nhint: the whole log is `{state.log_file('ray')}`")
    ray = answer["ray"]
    return RayService(ray["address"], ray["dashboard"], Path(ray["token_file"]))


def status(state: State) -> dict[str, Any]:
    """What runs, as `{state_dir, temporal: {address, ui}, ray: {address, dashboard}, processes: [...]}`.

    An address is None where nothing runs; a process is `{name, pid, state, since}`.
    """
    answer = _ask(state, {"do": "status"}, ANSWER_TIMEOUT_S)
    if answer is None:
        return {
            "state_dir": str(state.dir),
            "temporal": {"address": None, "ui": None},
            "ray": {"address": None, "dashboard": None},
            "processes": [],
        }
    for process in answer["processes"]:
        del process["crashes"]
    return answer


def stop(state: State, timeout_s: float = 30.0) -> Stopped:
    """End the services and everything they started, running steps included; `ServiceError` when something is left."""
    from bridge import leftovers, lock

    if not state.dir.is_dir():
        return Stopped((), ())
    deadline = time.monotonic() + timeout_s
    known = leftovers.find(state)
    services: list[tuple[str, int]] = []
    while (held := lock.take(state, LOCK_POLL_S)) is None:
        answer = _ask(state, {"do": "stop"}, min(STOP_ANSWER_TIMEOUT_S, max(1.0, deadline - time.monotonic())))
        if answer is not None:
            services += [(service["name"], service["pid"]) for service in answer.get("ended", [])]
        elif accepts(state.supervisor_socket) and (pid := _recorded_supervisor(state)):
            os.kill(pid, signal.SIGKILL)
        elif time.monotonic() > deadline:
            raise ServiceError(
                f"another process holds `{state.lock_file}`\n\nhint: is another `orchestrate` starting or stopping?"
            )
    try:
        ended, left = leftovers.end(state, known, max(deadline, time.monotonic() + LEFTOVERS_S))
        state.supervisor_socket.unlink(missing_ok=True)
        state.gateway_socket.unlink(missing_ok=True)
    finally:
        os.close(held)
    if left:
        names = ", ".join(f"`{process.command}` (pid {process.pid})" for process in left)
        raise ServiceError(f"could not end {names}\n\nhint: a process in uninterruptible sleep waits for a device")
    return Stopped(tuple(services), tuple((process.pid, process.command) for process in ended))


def accepts(path: Path) -> bool:
    """Whether somebody listens on the Unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _supervisor(
    state: State, request: dict[str, Any], deadline: float, worker_command: list[str] | None
) -> dict[str, Any]:
    """The answer of the living supervisor, or else of a new one."""
    answer = _ask(state, request, ANSWER_TIMEOUT_S)
    spawn_at = 0.0
    while answer is None:
        if time.monotonic() >= spawn_at:
            _spawn_supervisor(state, worker_command)
            spawn_at = time.monotonic() + RESPAWN_S
        if time.monotonic() > deadline:
            raise ServiceError(
                f"no supervisor answers at `{state.supervisor_socket}`\n{_log_end(state, 'supervisor')}\n\n"
                "hint: `orchestrate down` ends what is left of an earlier one"
            )
        time.sleep(POLL_S)
        answer = _ask(state, request, ANSWER_TIMEOUT_S)
    return answer


def _spawn_supervisor(state: State, worker_command: list[str] | None) -> None:
    """Start a supervisor, which puts itself into the background; of two, one sees the other's lock and ends."""
    argv = [sys.executable, "-m", "bridge.supervisor", "--state-dir", str(state.dir)]
    if worker_command is not None:
        argv += ["--worker-command", json.dumps(worker_command)]
    with append_private(state.log_file("supervisor")) as log:
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if name != MARKER},
                start_new_session=True,
                timeout=SPAWN_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceError(f"cannot start `{' '.join(argv)}`: {error}") from error
    if done.returncode != 0:
        raise ServiceError(f"the supervisor did not start\n{_log_end(state, 'supervisor')}")


def _ask(state: State, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
    """The supervisor's answer, or None when there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(state.supervisor_socket))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline())
        except (OSError, ValueError):
            return None
    return answer if isinstance(answer, dict) else None


def _check_crashes(state: State, status: dict[str, Any]) -> None:
    for process in status["processes"]:
        name = process["name"]
        if name in ("temporal", "worker") and process["crashes"] >= CRASHES_TO_GIVE_UP:
            raise ServiceError(
                f"the local {name} ended {process['crashes']} times while it started\n{_log_end(state, name)}\n\n"
                f"hint: the whole log is `{state.log_file(name)}`; it is tried again until `orchestrate down`"
            )


def _recorded_supervisor(state: State) -> int:
    """Pid of the supervisor that wrote `services.json` if it still lives, else 0."""
    from bridge.child import start_ticks

    try:
        record = json.loads(state.services_file.read_text())["processes"]["supervisor"]
        pid, created = int(record["pid"]), int(record["created"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return pid if pid > 0 and start_ticks(pid) == created else 0


def _tails(state: State) -> str:
    return "\n".join(f"--- {name}\n{_log_end(state, name)}" for name in ("worker", "temporal"))


def _log_end(state: State, name: str) -> str:
    from bridge.child import tail

    return "\n".join(tail(state.log_file(name)).splitlines()[-LOG_LINES:])
