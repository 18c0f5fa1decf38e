"""The background process that keeps the local services alive: Temporal server, worker and, once asked for, Ray.

`python -m bridge.supervisor --state-dir D` <- one JSON line per request, over a Unix socket -> `services`

One per state directory, by a file lock. It starts what is missing, adopts what an earlier supervisor left alive, starts
again what ends unasked, and on `stop` ends everything. Imports are few: its start is part of every cold run.
Requests: `ensure` (wake what waits, switch the web UI on), `status`, `start_ray` (answers when Ray is usable), `stop`.
"""

import contextlib
import heapq
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge import lock, ports, ray_head
from bridge.child import Child, start_ticks, tail, trim
from bridge.control import ControlSocket, send
from bridge.state import MARKER, State, StateError, append_private, write_private

TEMPORAL_PORT_NAMES = ("port", "ui_port")
RAY_START_TIMEOUT_S = 60.0
POLL_S = 0.01
HOUSEKEEPING_S = 5.0
LOCK_TIMEOUT_S = 30.0
WORKER_DRAIN_S = 5.0
RAY_END_S = 1.5
PORT_PATIENCE_S = 1.0
STARTS_TO_GIVE_UP = 3
"""A Ray that ends so often in a row while it starts will not start by trying again."""
TEMPORAL_END_S = 2.0


class Supervisor:
    """The services of one state directory."""

    def __init__(self, state: State, worker_command: list[str]) -> None:
        """`worker_command` is completed by `--state-dir D --address HOST:PORT`."""
        self._state = state
        self._worker_command = worker_command
        self._temporal = Child("temporal", state.log_file("temporal"), self._temporal_start)
        self._worker = Child("worker", state.log_file("worker"), self._worker_start)
        self._ray = Child("ray", state.log_file("ray"), self._ray_start)
        self._wanted = [self._temporal, self._worker]
        self._waiting: set[str] = set()
        self._ui = False
        self._ports: dict[str, dict[str, int]] = {"temporal": {}, "ray": {}}
        self._ray_usable = False
        self._ray_cannot_start = False
        self._ray_failures = 0
        """How often in a row Ray ended while it started."""
        self._ray_asked: list[socket.socket] = []
        self._stop_asked: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = 0
        self._started_at = time.time()
        self._stopping = False

    # What runs.

    def start(self) -> None:
        """Adopt the services that live and start those that do not."""
        found = _read_services(self._state.services_file)
        was_used = self._state.services_file.exists() or self._state.temporal_db.exists()
        remembered = found.get("ports")
        remembered = remembered if isinstance(remembered, dict) else {}
        records = found.get("processes")
        records = records if isinstance(records, dict) else {}
        self._ui = found.get("ui") is True
        for name, names in (("temporal", TEMPORAL_PORT_NAMES), ("ray", ray_head.PORT_NAMES)):
            known = remembered.get(name)
            if isinstance(known, dict) and all(isinstance(known.get(each), int) for each in names):
                self._ports[name] = {each: known[each] for each in names}
        for child in (self._temporal, self._worker, self._ray):
            if (self._ports["temporal" if child is self._worker else child.name]) and child.adopt(
                records.get(child.name)
            ):
                self._say(f"adopted {child.name}, pid {child.pid}")
                self._watch(child)
        if self._ray.alive:
            self._wanted.append(self._ray)
            self._when_ray_is_usable(self._ray.pid, time.monotonic() + RAY_START_TIMEOUT_S)
        self._save()
        if was_used and found.get("is_clean") is not True:
            from bridge import leftovers

            adopted = (self._temporal, self._worker, self._ray)
            leftovers.end_services(self._state, {child.pid for child in adopted if child.alive})
        for child in self._wanted:
            if not child.alive:
                self._start(child)

    def _start(self, child: Child) -> None:
        self._waiting.discard(child.name)
        if child.alive or self._stopping or child not in self._wanted:
            return
        try:
            child.start()
        except (OSError, StateError) as error:
            with append_private(child.log) as log:
                log.write(f"cannot start {child.name}: {error}\n".encode())
            child.since = time.time()
            if child is self._ray:
                # A full process table heals; a token with a wrong mode does not.
                self._ray_cannot_start = not isinstance(error, BlockingIOError)
            self._ended(child)
            return
        if child is self._ray:
            self._ray_cannot_start = False
        self._say(f"started {child.name}, pid {child.pid}")
        self._watch(child)
        self._save()
        if child is self._ray:
            self._when_ray_is_usable(self._ray.pid, time.monotonic() + RAY_START_TIMEOUT_S)

    def _watch(self, child: Child) -> None:
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._gone(child))

    def _gone(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        if child is self._ray:
            child.kill_group()
        child.forget()
        self._say(f"{child.name}, pid {child.pid}, ended")
        self._ended(child)

    def _ended(self, child: Child) -> None:
        """Start it again, at once or a little later; a Ray that never came up is not tried again unasked."""
        if child is self._ray:
            was_usable, self._ray_usable = self._ray_usable, False
            # An actor outlives its raylet for a while: it must not go on while its step is tried again.
            ray_head.kill_leftovers(self._state)
            if not was_usable:
                self._ray_failures += 1
                self._ray_failed("Ray ended while it started")
                if child.crashes == 0:
                    self._wanted.remove(child)
                    self._save()
                    return
        delay_s = child.backoff_s()
        self._save()
        if delay_s == 0.0:
            self._start(child)
        else:
            self._waiting.add(child.name)
            self._after(delay_s, lambda: self._start(child) if child.name in self._waiting else None)

    def _temporal_start(self) -> tuple[list[str], dict[str, str]]:
        before = self._ports["temporal"]
        now = self._ports["temporal"] = ports.assign(TEMPORAL_PORT_NAMES, before, PORT_PATIENCE_S)
        if before and now["port"] != before["port"]:
            self._worker.ask_to_end()
        argv = [
            _program("temporal"),
            *("server", "start-dev", "--ip", "127.0.0.1", "--port", str(now["port"])),
            *(("--ui-port", str(now["ui_port"])) if self._ui else ("--headless",)),
            *("--db-filename", str(self._state.temporal_db), "--log-level", "error"),
            *("--dynamic-config-value", "history.transferProcessorMaxPollRPS=2000"),
            # Safe against the death of every process; a power cut may take back the last moments, in good order.
            *("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"),
        ]
        return argv, self._environment()

    def _worker_start(self) -> tuple[list[str], dict[str, str]]:
        argv = [*self._worker_command, "--state-dir", str(self._state.dir), "--address", self._temporal_address()]
        return argv, self._environment()

    def _ray_start(self) -> tuple[list[str], dict[str, str]]:
        ray_head.prepare(self._state)
        now = self._ports["ray"] = ports.assign(ray_head.PORT_NAMES, self._ports["ray"], PORT_PATIENCE_S)
        return ray_head.command(self._state, now), self._environment() | ray_head.environment(self._state, now)

    def _environment(self) -> dict[str, str]:
        return os.environ | {MARKER: str(self._state.dir)}

    def _temporal_address(self) -> str:
        return f"127.0.0.1:{self._ports['temporal']['port']}"

    # Ray, on demand.

    def _when_ray_is_usable(self, pid: int, deadline: float, dashboard_yields: bool = False) -> None:
        """Look again and again until `ray start` says so, Ray ends, or its time is over."""
        if not self._ray.alive or self._ray.pid != pid or self._ray_usable:
            return
        with contextlib.suppress(OSError):
            dashboard_yields = dashboard_yields or ray_head.make_dashboard_yield(pid)
            self._ray_usable = ray_head.address_file(self._state).read_text() != ""
        if self._ray_usable:
            self._ray_failures = 0
            self._answer_ray({"ray": self._ray_answer()})
        elif time.monotonic() > deadline:
            self._ray_failed(f"Ray was not usable after {RAY_START_TIMEOUT_S:.0f} s")
            self._ray.kill_group()
        else:
            self._after(POLL_S, lambda: self._when_ray_is_usable(pid, deadline, dashboard_yields))

    def _ray_answer(self) -> dict[str, str]:
        known = self._ports["ray"]
        return {
            "address": ray_head.address(known),
            "dashboard": ray_head.dashboard(known),
            "token_file": str(self._state.ray_token_file),
        }

    def _ray_failed(self, reason: str) -> None:
        is_final = self._ray_cannot_start or self._ray_failures >= STARTS_TO_GIVE_UP
        self._answer_ray({"error": f"{reason}:\n{tail(self._ray.log)}", "final": is_final})

    def _answer_ray(self, answer: dict[str, Any]) -> None:
        asked, self._ray_asked = self._ray_asked, []
        for connection in asked:
            send(connection, answer)

    # Requests.

    def serve(self) -> None:
        """Answer requests and keep the services alive until `stop` or SIGTERM."""
        control = ControlSocket(self._state.supervisor_socket, self._selector, self._answer)
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stopping", True))
        self._selector.register(woken, selectors.EVENT_READ, lambda: woken.recv(64))
        self._housekeeping(control)
        while not self._stopping:
            for key, _ in self._selector.select(self._next_timer_s()):
                key.data()
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
        control.close()
        ended = self._end_services()
        for connection in self._stop_asked:
            send(connection, {"ended": ended})

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        match request.get("do"):
            case "stop":
                self._stopping = True
                self._stop_asked.append(connection)
            case "start_ray":
                self._ask_for_ray(connection)
            case "ensure":
                self._wake(ui=request.get("ui") is True)
                send(connection, self.status())
            case "status":
                send(connection, self.status())
            case other:
                send(connection, {"error": f"got request `{other}`, wanted `ensure`, `status`, `start_ray` or `stop`"})

    def _ask_for_ray(self, connection: socket.socket) -> None:
        if self._ray_usable:
            send(connection, {"ray": self._ray_answer()})
            return
        self._ray_asked.append(connection)
        if self._ray not in self._wanted:
            self._ray.crashes = 0
            self._wanted.append(self._ray)
        self._start(self._ray)

    def _wake(self, *, ui: bool) -> None:
        """Start at once what waits for its next attempt; start the server anew when it has no UI and should."""
        for child in self._wanted:
            child.crashes = 0
            if child.name in self._waiting:
                self._start(child)
        if ui and not self._ui:
            self._ui = True
            self._save()
            self._temporal.kill_group()

    def status(self) -> dict[str, Any]:
        """What runs; `crashes` is how often a process ended since it last lived well or was asked for."""
        own = {"name": "supervisor", "pid": os.getpid(), "state": "running", "since": self._started_at, "crashes": 0}
        ray = self._ray_answer() if self._ray_usable else {}
        return {
            "state_dir": str(self._state.dir),
            "temporal": {
                "address": self._temporal_address() if self._temporal.alive else None,
                "ui": f"http://127.0.0.1:{self._ports['temporal']['ui_port']}"
                if self._ui and self._temporal.alive
                else None,
            },
            "ray": {"address": ray.get("address"), "dashboard": ray.get("dashboard")},
            "processes": [own, *(self._process_status(child) for child in self._wanted)],
        }

    def _process_status(self, child: Child) -> dict[str, Any]:
        state = "running" if child.alive else "restarting"
        if child is self._ray and child.alive and not self._ray_usable:
            state = "starting"
        pid = child.pid if child.alive else None
        return {"name": child.name, "pid": pid, "state": state, "since": child.since, "crashes": child.crashes}

    # Time, memory, end.

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timer_number, action))

    def _next_timer_s(self) -> float:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else HOUSEKEEPING_S

    def _housekeeping(self, control: ControlSocket) -> None:
        """Keep logs bounded; end when the state directory was removed, since nobody could reach us any more."""
        control.hang_up_on_silence()
        for log in (self._state.log_file("supervisor"), *(child.log for child in self._wanted)):
            trim(log)
        if not self._state.supervisor_socket.exists() or not self._state.lock_file.exists():
            self._say("the state directory is gone")
            self._stopping = True
        self._after(HOUSEKEEPING_S, lambda: self._housekeeping(control))

    def _save(self) -> None:
        children = {child.name: child.record for child in (self._temporal, self._worker, self._ray) if child.alive}
        own = {"supervisor": {"pid": os.getpid(), "created": start_ticks(os.getpid()), "since": self._started_at}}
        content = {
            "ports": self._ports,
            "ui": self._ui,
            "is_clean": self._stopping and not children,
            "processes": own | children,
        }
        with contextlib.suppress(FileNotFoundError):
            write_private(self._state.services_file, json.dumps(content))

    def _end_services(self) -> list[dict[str, Any]]:
        """End the worker first, so that it can drain, then Ray and the server; what ended."""
        self._say("stopping")
        self._answer_ray({"error": "the services are being stopped"})
        ended = [{"name": child.name, "pid": child.pid} for child in self._wanted if child.alive]
        for group, limit_s in (
            ([self._worker], WORKER_DRAIN_S),
            ([self._ray], RAY_END_S),
            ([self._temporal], TEMPORAL_END_S),
        ):
            for child in group:
                child.ask_to_end()
            for child in group:
                if not _wait(child, limit_s):
                    child.kill_group()
                    _wait(child, 1.0)
                child.forget()
        self._ui = False
        self._save()
        return ended

    def _say(self, message: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}", file=sys.stderr, flush=True)


def _wait(child: Child, limit_s: float) -> bool:
    """Wait for the end of a child; whether it ended in time."""
    if not child.alive:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(child.pidfd, selectors.EVENT_READ)
        return bool(selector.select(limit_s))


def _program(name: str) -> str:
    """A program that was installed with us, or else one on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def _read_services(path: Path) -> dict[str, Any]:
    """What an earlier supervisor wrote; empty when it is not there or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _serves(state: State) -> bool:
    """Whether another supervisor answers; one that is ending, or that has just started, holds the lock only."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(state.supervisor_socket)) == 0


def main(arguments: list[str]) -> int:
    """Run in the background; returns in the caller at once."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    state = State(Path(options["--state-dir"])).create()
    if os.fork() > 0:
        return 0
    os.chdir("/")
    if lock.take(state, LOCK_TIMEOUT_S, give_up=lambda: _serves(state)) is None:
        return 0
    worker = options.get("--worker-command")
    supervisor = Supervisor(state, json.loads(worker) if worker else [sys.executable, "-m", "bridge.worker"])
    supervisor.start()
    supervisor.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
