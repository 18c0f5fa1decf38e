"""A Temporal server of one's own: `orchestrate worker` in the foreground, the CLI pointed at it by TEMPORAL_ADDRESS."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.temporal

ORCHESTRATE = str(Path(sys.executable).with_name("orchestrate"))
PLAN = """
steps:
  - {id: a, type: command, command: bash, args: [-c, "echo begun; sleep 1.5; echo ended"]}
  - {id: b, type: command, command: echo, args: [last], depends_on: [a]}
"""


@pytest.fixture
def environment(temporal_server: str, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ORCHESTRATE_HOME": str(tmp_path / "state"),
        "TEMPORAL_ADDRESS": temporal_server,
        "TEMPORAL_TASK_QUEUE": f"queue-{tmp_path.name}",
    }


@pytest.fixture
def worker(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([ORCHESTRATE, "worker", "--drain-timeout", "20"], env=environment, stderr=-1)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=30)


def test_a_plan_runs_on_a_server_and_a_worker_that_were_there(
    environment: dict[str, str], worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    run = subprocess.run(
        [ORCHESTRATE, tmp_path / "plan.yaml", "--json"], env=environment, capture_output=True, timeout=120
    )
    report = json.loads(run.stdout)
    assert run.returncode == 0
    assert [step["outcome"] for step in report["steps"]] == ["succeeded", "succeeded"]
    assert report["steps"][0]["stdout_tail"] == "begun\nended\n"
    assert not (tmp_path / "state" / "supervisor.lock").exists()


def test_a_run_that_nobody_works_on_says_so(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    argv = [ORCHESTRATE, tmp_path / "plan.yaml", "--detach", "--task-queue", "other"]
    run = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert "no worker serves task queue `other`" in run.stderr
    assert "orchestrate worker --task-queue other" in run.stderr


def test_a_profile_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    config = tmp_path / "temporal.toml"
    config.write_text('[profile.default]\naddress = "127.0.0.1:1"\n')
    own = {"ORCHESTRATE_HOME": str(tmp_path / "state"), "TEMPORAL_CONFIG_FILE": str(config), "TEMPORAL_PROFILE": "nope"}
    environment = {name: value for name, value in os.environ.items() if name != "TEMPORAL_ADDRESS"} | own
    for arguments in (["runs"], ["worker"]):
        run = subprocess.run([ORCHESTRATE, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        assert run.returncode == 2
        assert "TEMPORAL_PROFILE names `nope`" in run.stderr and "its profiles: `default`" in run.stderr
    assert not (tmp_path / "state" / "supervisor.lock").exists()


def test_sigterm_drains_the_worker_and_the_next_one_takes_over(
    environment: dict[str, str], worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    run = subprocess.Popen([ORCHESTRATE, tmp_path / "plan.yaml", "--json"], env=environment, stdout=-1)
    deadline = time.monotonic() + 60
    while not any("begun" in log.read_text() for log in (tmp_path / "state").rglob("a/attempt-1/stdout.log")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    (log,) = (tmp_path / "state").rglob("a/attempt-1/stdout.log")
    assert log.read_text() == "begun\nended\n"
    next_worker = subprocess.Popen([ORCHESTRATE, "worker"], env=environment, stderr=-1)
    try:
        stdout, _ = run.communicate(timeout=90)
    finally:
        next_worker.terminate()
        next_worker.communicate(timeout=60)
    steps = json.loads(stdout)["steps"]
    assert [(step["outcome"], len(step["attempts"])) for step in steps] == [("succeeded", 1), ("succeeded", 1)]


def test_no_server_is_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    environment = {**os.environ, "ORCHESTRATE_HOME": str(tmp_path / "state"), "TEMPORAL_ADDRESS": "127.0.0.1:1"}
    run = subprocess.run([ORCHESTRATE, tmp_path / "plan.yaml"], env=environment, capture_output=True, text=True)
    assert run.returncode == 3
    assert "127.0.0.1:1" in run.stderr
    worker = subprocess.run([ORCHESTRATE, "worker"], env=environment, capture_output=True, text=True)
    assert worker.returncode == 3
