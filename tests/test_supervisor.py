"""The supervisor with a real Temporal server: crashes of every part, adoption, and what it leaves open."""

import contextlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge import leftovers, ports, ray_head, services
from bridge.child import Child, start_ticks, tail, trim
from bridge.state import MARKER, State, StateError

TIMEOUT_S = 30.0


def wait_for(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
    return value


def pids(state: State) -> dict[str, int]:
    """Pids of the services by name."""
    return {process["name"]: process["pid"] for process in services.status(state)["processes"]}


def has_ended(pid: int) -> bool:
    return start_ticks(pid) == 0


def listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


def marked(state: State) -> list[int]:
    return [process.pid for process in leftovers.find(state)]


@pytest.mark.temporal
@pytest.mark.parametrize("name", ["temporal", "worker"])
def test_a_killed_service_is_back_on_the_same_port(name: str, local_state: State, stand_in_worker: list[str]) -> None:
    before = services.ensure(local_state, worker_command=stand_in_worker)
    old = pids(local_state)
    os.kill(old[name], signal.SIGKILL)
    wait_for(lambda: pids(local_state).get(name) not in (None, old[name]))
    after = services.ensure(local_state)
    wait_for(lambda: listens(after.address))
    assert after == before
    new = pids(local_state)
    assert {other for other in old if old[other] != new[other]} == {name}
    assert len(marked(local_state)) == 2


@pytest.mark.temporal
def test_a_killed_supervisor_is_followed_by_one_that_adopts(local_state: State, stand_in_worker: list[str]) -> None:
    before = services.ensure(local_state, worker_command=stand_in_worker)
    old = pids(local_state)
    os.kill(old.pop("supervisor"), signal.SIGKILL)
    wait_for(lambda: services.find(local_state) is None)
    assert services.status(local_state)["temporal"] == {"address": None, "ui": None}
    assert services.ensure(local_state, worker_command=stand_in_worker) == before
    new = pids(local_state)
    new.pop("supervisor")
    assert new == old

    os.kill(old["worker"], signal.SIGKILL)
    wait_for(lambda: pids(local_state).get("worker") not in (None, old["worker"]))
    assert pids(local_state)["temporal"] == old["temporal"]


@pytest.mark.temporal
def test_everything_killed_is_started_anew(local_state: State, stand_in_worker: list[str]) -> None:
    before = services.ensure(local_state, worker_command=stand_in_worker)
    old = pids(local_state)
    for pid in old.values():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(map(has_ended, old.values())))
    assert local_state.supervisor_socket.exists() and local_state.gateway_socket.exists()
    after = services.ensure(local_state, worker_command=stand_in_worker)
    assert after == before
    assert not set(pids(local_state).values()) & set(old.values())


@pytest.mark.temporal
def test_kills_at_random_moments_leave_one_of_each(local_state: State, stand_in_worker: list[str]) -> None:
    chance = random.Random(7)
    for _ in range(8):
        before = services.ensure(local_state, worker_command=stand_in_worker)
        for pid in pids(local_state).values():
            if pid and chance.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(chance.random() * 0.1)
    assert services.ensure(local_state, worker_command=stand_in_worker) == before
    expected = wait_for(lambda: (found := pids(local_state)) and all(found.values()) and found)
    assert sorted(marked(local_state)) == sorted([expected["temporal"], expected["worker"]])


@pytest.mark.temporal
@pytest.mark.parametrize("content", ["{", '{"ports": {"temporal": {"port": "x"}}, "processes": [2]}'])
def test_a_damaged_services_file_leaves_one_of_each(
    content: str, local_state: State, stand_in_worker: list[str]
) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    old = pids(local_state)
    os.kill(old["supervisor"], signal.SIGKILL)
    wait_for(lambda: has_ended(old["supervisor"]))
    local_state.services_file.write_text(content)
    services.ensure(local_state, worker_command=stand_in_worker)
    new = pids(local_state)
    assert sorted(marked(local_state)) == sorted([new["temporal"], new["worker"]])
    assert json.loads(local_state.services_file.read_text())["processes"]["worker"]["pid"] == new["worker"]


@pytest.mark.temporal
def test_a_port_taken_meanwhile_is_replaced(local_state: State, stand_in_worker: list[str]) -> None:
    before = services.ensure(local_state, worker_command=stand_in_worker)
    services.stop(local_state)
    with socket.create_server(("127.0.0.1", int(before.address.partition(":")[2]))):
        after = services.ensure(local_state, worker_command=stand_in_worker)
        assert after.address != before.address
        assert listens(after.address)


@pytest.mark.temporal
def test_services_end_when_the_state_directory_is_removed(
    tmp_path: Path, local_state: State, stand_in_worker: list[str]
) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    old = pids(local_state)
    local_state.dir.rename(tmp_path / "gone")
    wait_for(lambda: all(map(has_ended, old.values())))


@pytest.mark.temporal
def test_sigterm_ends_all(local_state: State, stand_in_worker: list[str]) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    old = pids(local_state)
    os.kill(old["supervisor"], signal.SIGTERM)
    wait_for(lambda: all(map(has_ended, old.values())))


@pytest.mark.temporal
def test_ui_is_added_to_a_running_server_and_all_is_on_loopback(local_state: State, stand_in_worker: list[str]) -> None:
    before = services.ensure(local_state, worker_command=stand_in_worker)
    assert before.ui is None
    after = services.ensure(local_state, ui=True)
    assert after.ui is not None and after.address == before.address
    wait_for(lambda: listens(str(after.ui).removeprefix("http://")))
    assert services.ensure(local_state).ui == after.ui
    listening = listeners(pids(local_state).values())
    assert len(listening) >= 2
    assert {address.ip for address in listening} == {"127.0.0.1"}


@pytest.mark.temporal
def test_a_bad_request_is_answered_and_harmless(local_state: State, stand_in_worker: list[str]) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    for request in (b"\n", b"[]\n", b'{"do": "dance"}\n', b"x" * 100_000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(local_state.supervisor_socket))
            try:
                connection.sendall(request)
                answer = connection.makefile().readline()
            except (BrokenPipeError, ConnectionResetError):
                continue
            assert "error" in json.loads(answer)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(local_state.supervisor_socket))
        assert services.find(local_state) is not None
    assert stat.S_IMODE(local_state.supervisor_socket.stat().st_mode) == 0o600


def test_ports_keep_what_is_free_and_replace_the_rest() -> None:
    first = ports.assign(("a", "b"), None)
    assert ports.assign(("a", "b"), first) == first
    with socket.create_server(("127.0.0.1", first["a"])):
        second = ports.assign(("a", "b"), first)
    assert second["b"] == first["b"] and second["a"] not in first.values()
    assert len(set(ports.assign(("a", "b", "c"), {"a": 25000, "b": 25000, "c": "x"}).values())) == 3


def test_backoff_doubles_and_is_reset_by_a_good_life(tmp_path: Path) -> None:
    child = Child("x", tmp_path / "x.log", lambda: (["true"], {}))
    child.since = time.time()
    assert [round(child.backoff_s(), 3) for _ in range(8)] == [0, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]
    child.since = time.time() - 31
    assert child.backoff_s() == 0


def test_adopting_wants_the_same_process(tmp_path: Path) -> None:
    child = Child("x", tmp_path / "x.log", lambda: (["sleep", "60"], {}))
    child.start()
    other = Child("x", tmp_path / "x.log", lambda: ([], {}))
    try:
        damaged: list[Any] = [{**child.record, "created": child.created + 1}, {**child.record, "pid": -1}, {}, None, []]
        for wrong in damaged:
            assert not other.adopt(wrong)
        assert other.adopt(child.record) and other.alive
    finally:
        child.kill_group()
        child.forget()
        other.forget()
    assert not other.adopt(child.record)


def test_a_log_keeps_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    trim(log)
    log.write_bytes(b"old line\n" * 1_000_000 + b"last line\n")
    trim(log)
    assert log.stat().st_size <= 8 * 1024 * 1024 // 4
    assert tail(log).endswith("last line")
    assert tail(log).splitlines()[0] == "old line"
    assert tail(tmp_path / "none.log") == "(no log)"


def test_the_token_is_private_or_refused(tmp_path: Path) -> None:
    token = tmp_path / "ray" / "auth_token"
    ray_head.ensure_token(token)
    written = token.read_text()
    assert len(written) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
    ray_head.ensure_token(token)
    assert token.read_text() == written
    token.chmod(0o644)
    with pytest.raises(StateError, match="mode `0644`"):
        ray_head.ensure_token(token)
    token.chmod(0o600)
    token.parent.chmod(0o755)
    with pytest.raises(StateError, match="mode `0755`"):
        ray_head.ensure_token(token)
    token.parent.chmod(0o700)
    token.write_text("short")
    with pytest.raises(StateError, match="too short"):
        ray_head.ensure_token(token)


@pytest.mark.ray
@pytest.mark.temporal
def test_ray_is_not_started_with_a_token_others_can_read(local_state: State, stand_in_worker: list[str]) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    ray_head.ensure_token(local_state.ray_token_file)
    local_state.ray_token_file.chmod(0o640)
    with pytest.raises(services.RayUnusable, match="mode `0640`"):
        services.start_ray(local_state)
    assert "ray" not in pids(local_state)


@pytest.mark.ray
@pytest.mark.temporal
def test_ray_starts_once_is_guarded_survives_its_supervisor_and_comes_back(
    local_state: State, stand_in_worker: list[str]
) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK_FOR_RAY, str(local_state.dir)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    addresses = {process.communicate(timeout=90)[0].strip() for process in asking}
    found = services.start_ray(local_state)
    assert addresses == {found.address}
    assert services.status(local_state)["ray"] == {"address": found.address, "dashboard": found.dashboard}

    pid = run_in_ray(local_state, found, "make")
    assert refused_by_gcs(local_state, found)
    dashboard = wait_for(lambda: answer_of(found.dashboard + "/api/version", ""), 60)
    assert dashboard == 401
    assert answer_of(found.dashboard + "/api/version", found.token_file.read_text()) == 200
    check_open_ports(local_state, pids(local_state)["ray"])

    before = pids(local_state)
    os.kill(before.pop("supervisor"), signal.SIGKILL)
    wait_for(lambda: services.find(local_state) is None)
    services.ensure(local_state, worker_command=stand_in_worker)
    after = pids(local_state)
    after.pop("supervisor")
    assert after == before
    assert services.start_ray(local_state) == found
    assert run_in_ray(local_state, found, "find") == pid

    os.kill(before["ray"], signal.SIGKILL)
    wait_for(lambda: pids(local_state).get("ray") != before["ray"])
    assert services.start_ray(local_state) == found

    services.stop(local_state)
    assert not marked(local_state)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(local_state.ray_temp_dir) in str(p.info["cmdline"])]


ASK_FOR_RAY = """
import pathlib, sys
from bridge import services
from bridge.state import State
print(services.start_ray(State(pathlib.Path(sys.argv[1]))).address)
"""

ACTOR = """
import os, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="test")
class Named:
    def pid(self):
        return os.getpid()
if sys.argv[2] == "make":
    actor = ray.remote(Named).options(name="named", lifetime="detached").remote()
else:
    actor = ray.get_actor("named")
print(ray.get(actor.pid.remote()))
"""

GUEST = """
import sys
from ray._raylet import GcsClient
try:
    print(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=2))
except Exception as error:
    print("refused", error)
"""


def run_in_ray(state: State, found: services.RayService, verb: str) -> int:
    """Pid of a detached actor."""
    environment = os.environ | ray_head.client_environment(state)
    argv = [sys.executable, "-c", ACTOR, found.address, verb]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def refused_by_gcs(state: State, found: services.RayService) -> bool:
    """Whether a client without the token, and one with a wrong one, are turned away."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return all(
        is_refused(clean | extra | {"HOME": str(state.dir)}, found.address)
        for extra in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    )


def is_refused(environment: dict[str, str], address: str) -> bool:
    argv = [sys.executable, "-c", GUEST, address]
    with subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            return any("InvalidAuthToken" in line for line in process.stdout)
        finally:
            process.kill()


def answer_of(url: str, token: str) -> int:
    """HTTP status, 0 while nobody answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def check_open_ports(state: State, ray_pid: int) -> None:
    """Beyond loopback: the ports of GCS, raylet and Ray's workers, which want the token, and two for metrics."""
    known = json.loads(state.services_file.read_text())["ports"]["ray"]
    for process in psutil.Process(ray_pid).children(recursive=True):
        for address in listeners([process.pid]):
            if not address.ip.startswith("127."):
                is_ray = process.name().startswith(("gcs_server", "raylet", "ray::"))
                assert is_ray or address.port == known["dashboard_metrics_port"], (process.name(), address)


def listeners(of: Any) -> list[Any]:
    """Addresses on which processes listen."""
    return [
        connection.laddr
        for pid in of
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_the_marker_finds_descendants_in_sessions_of_their_own(local_state: State) -> None:
    local_state.create()
    script = "setsid env -i sleep 300 & exec sleep 300"
    process = subprocess.Popen(["sh", "-c", script], env={**os.environ, MARKER: str(local_state.dir)})
    try:
        wait_for(lambda: len(marked(local_state)) >= 2)
    finally:
        services.stop(local_state)
        process.wait(5)
    assert not marked(local_state)
