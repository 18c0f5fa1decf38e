"""The client side of the local services, with a real Temporal server: start, share, fail, stop; and the commands."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bridge import leftovers, lock, services
from bridge.child import start_ticks
from bridge.cli.services import down, status, up
from bridge.state import MARKER, State, StateError, private_dir, write_private

START = """
import json, pathlib, sys
from bridge import services
from bridge.state import State
found = services.ensure(State(pathlib.Path(sys.argv[1])), worker_command=json.loads(sys.argv[2]))
print(found.address)
"""


def wait_for(condition: Callable[[], Any], timeout_s: float = 30) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
    return value


def names(state: State) -> list[str]:
    return [process["name"] for process in services.status(state)["processes"]]


@pytest.mark.temporal
def test_two_at_once_share_one_supervisor(local_state: State, stand_in_worker: list[str]) -> None:
    argv = [sys.executable, "-c", START, str(local_state.dir), json.dumps(stand_in_worker)]
    starting = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    addresses = {process.communicate(timeout=60)[0].strip() for process in starting}
    assert all(process.returncode == 0 for process in starting)
    found = services.find(local_state)
    assert found is not None and addresses == {found.address}
    assert names(local_state) == ["supervisor", "temporal", "worker"]
    assert len(leftovers.find(local_state)) == 2
    log = local_state.log_file("supervisor").read_text()
    assert log.count("started temporal") == log.count("started worker") == 1


@pytest.mark.temporal
def test_stop_ends_running_steps_and_what_they_started(local_state: State, stand_in_worker: list[str]) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    stubborn = "trap '' TERM; (setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' &) ; while :; do sleep 1; done"
    step = subprocess.Popen(
        ["sh", "-c", stubborn], env={**os.environ, MARKER: str(local_state.dir)}, start_new_session=True
    )
    wait_for(lambda: len(leftovers.find(local_state)) >= 4)
    stopped = services.stop(local_state)
    assert step.wait(5) == -signal.SIGKILL
    assert [name for name, _ in stopped.services] == ["temporal", "worker"]
    assert step.pid in [pid for pid, _ in stopped.killed]
    assert not leftovers.find(local_state)
    assert services.find(local_state) is None
    assert services.stop(local_state) == services.Stopped((), ())


@pytest.mark.temporal
def test_stop_works_without_a_supervisor_and_with_a_hanging_one(local_state: State, stand_in_worker: list[str]) -> None:
    services.ensure(local_state, worker_command=stand_in_worker)
    supervisor = services.status(local_state)["processes"][0]["pid"]
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: start_ticks(supervisor) == 0)
    assert len(services.stop(local_state).killed) == 2
    assert not leftovers.find(local_state)

    services.ensure(local_state, worker_command=stand_in_worker)
    supervisor = services.status(local_state)["processes"][0]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    assert len(services.stop(local_state, timeout_s=1).killed) == 2
    assert start_ticks(supervisor) == 0
    assert not leftovers.find(local_state)


@pytest.mark.temporal
def test_a_worker_that_cannot_start_is_reported_with_its_log(local_state: State, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('the flux capacitor is empty')")
    with pytest.raises(services.ServiceError, match="worker ended") as caught:
        services.ensure(local_state, worker_command=[sys.executable, str(broken)])
    assert "the flux capacitor is empty" in str(caught.value)
    assert "\n\nhint: " in str(caught.value)


@pytest.mark.temporal
def test_a_worker_that_is_never_ready_ends_in_an_error(local_state: State) -> None:
    with pytest.raises(services.ServiceError, match="not ready after 1 s"):
        services.ensure(local_state, timeout_s=1, worker_command=[sys.executable, "-c", "import time; time.sleep(300)"])


def test_a_missing_program_is_reported(local_state: State) -> None:
    with pytest.raises(services.ServiceError, match="no-such-program"):
        services.ensure(local_state, worker_command=["/no-such-program"])


@pytest.mark.temporal
def test_a_long_state_directory_gets_short_sockets(tmp_path: Path, stand_in_worker: list[str]) -> None:
    state = State(tmp_path / ("long" * 30) / ("path" * 30))
    try:
        services.ensure(state, worker_command=stand_in_worker)
        assert len(os.fsencode(state.gateway_socket)) <= 100
        assert state.gateway_socket.parent != state.dir
        assert stat.S_IMODE(state.sockets_dir.stat().st_mode) == 0o700
    finally:
        services.stop(state)
        assert not state.supervisor_socket.exists()
        state.sockets_dir.rmdir()


@pytest.mark.temporal
def test_the_real_worker_gets_ready(local_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(local_state.dir))
    run = CliRunner()
    missing = run.invoke(status, [])
    assert missing.exit_code == 3 and "not running" in missing.output

    shown = run.invoke(up, ["--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.output)
    assert set(document) == {"state_dir", "temporal", "ray", "processes"}
    assert document["temporal"]["address"].startswith("127.0.0.1:") and document["temporal"]["ui"] is None
    assert document["ray"] == {"address": None, "dashboard": None}
    assert all(set(process) == {"name", "pid", "state", "since"} for process in document["processes"])
    assert json.loads(run.invoke(status, ["--json"]).output) == document
    assert "temporal" in run.invoke(status, []).output

    old = {process["name"]: process["pid"] for process in document["processes"]}
    os.kill(old["worker"], signal.SIGKILL)
    wait_for(lambda: start_ticks(old["worker"]) == 0)
    assert run.invoke(up, []).exit_code == 0

    ended = json.loads(run.invoke(down, ["--json"]).output)
    assert {service["name"] for service in ended["stopped"]} == {"temporal", "worker"}
    assert not leftovers.find(local_state)
    assert run.invoke(down, []).output == "nothing was running\n"
    assert run.invoke(status, ["--json"]).exit_code == 3


def test_up_that_fails_exits_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "file"))
    failed = CliRunner().invoke(up, [])
    assert failed.exit_code == 3 and "hint: set `ORCHESTRATE_HOME`" in failed.output


def test_nothing_runs_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    state = State(tmp_path / "none")
    assert services.find(state) is None
    assert services.status(state)["processes"] == []
    assert services.stop(state) == services.Stopped((), ())
    assert not state.dir.exists()
    with pytest.raises(services.ServiceError, match="no supervisor answers"):
        services.start_ray(state)


def test_one_holder_of_the_lock(local_state: State) -> None:
    local_state.create()
    held = lock.take(local_state, 0.1)
    assert held is not None
    try:
        assert lock.take(local_state, 0.05) is None
        assert lock.take(local_state, 60, give_up=lambda: True) is None
    finally:
        os.close(held)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"ORCHESTRATE_HOME": "/a/b", "XDG_STATE_HOME": "/c"}, "/a/b"),
        ({"XDG_STATE_HOME": "/c"}, "/c/orchestrate"),
        ({}, str(Path.home() / ".local/state/orchestrate")),
    ],
)
def test_where_the_state_is(environment: dict[str, str], wanted: str) -> None:
    assert str(State.from_environment(environment).dir) == wanted


def test_the_state_directory_is_private(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    state = State(tmp_path / "open").create()
    for path in (state.dir, state.logs_dir, state.secrets_dir, state.ray_token_file.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(state.dir)
    with pytest.raises(StateError, match="not a directory"):
        private_dir(tmp_path / "link", may_be_link=False)
    write_private(state.services_file, "x")
    assert stat.S_IMODE(state.services_file.stat().st_mode) == 0o600


def test_the_client_side_imports_little() -> None:
    heavy = "{'asyncio', 'psutil', 'temporalio', 'ray', 'pydantic', 'hashlib'}"
    script = f"import sys, bridge.services, bridge.supervisor; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
