"""Finding and ending what a step has started, with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from steps._process import STEP_KEY_VARIABLE, descendants, end, identity, is_alive, kill_leftovers, marked


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def run(argv: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, **options))  # type: ignore[call-overload]
        return started[-1]

    yield run
    for process in started:
        for child in [*descendants(process.pid), process]:
            child.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.005)
    return False


def ready(process: subprocess.Popen[bytes]) -> int:
    """Wait for the line a program prints when it is set up; often a pid."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_identity_tells_processes_apart(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    own = identity()
    assert is_alive(own)
    assert not is_alive({**own, "start_ticks": own["start_ticks"] - 1})
    assert not is_alive({**own, "boot_id": "another start of the machine"})
    assert not is_alive({**own, "pid": 0, "start_ticks": None})
    ended = start([sys.executable, "-c", "from steps._process import identity; print(identity(), flush=True); input()"])
    assert ended.stdout is not None
    theirs = eval(ended.stdout.readline())
    assert is_alive(theirs)
    ended.kill()
    # A zombie counts as dead: nobody need have collected it.
    assert gone(ended.pid)
    assert not is_alive(theirs)


def test_end_kills_what_ignores_sigterm(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    stubborn = start(["sh", "-c", 'trap "" TERM; echo 1; while :; do sleep 0.05; done'])
    ready(stubborn)
    end([psutil.Process(stubborn.pid)], 0.1)
    assert gone(stubborn.pid)


SUBREAPER = """
import os, subprocess, sys
from steps._process import become_subreaper, end_children
become_subreaper()
daemon = "trap '' TERM; echo $$; exec >/dev/null; while :; do sleep 0.1; done"
command = f'setsid sh -c "{daemon.replace("$", chr(92) + "$")}" & sleep 0.3'
out = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE).stdout
end_children(0.2)
print(int(out), flush=True)
input()
"""


def test_end_children_ends_daemonized_grandchildren(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    host = start([sys.executable, "-c", SUBREAPER], stdin=subprocess.PIPE)
    assert gone(ready(host))
    assert host.stdin is not None
    host.stdin.close()


def test_end_children_without_children_is_no_work() -> None:
    subprocess.run(
        [sys.executable, "-c", "from steps._process import end_children; end_children(500)"], check=True, timeout=60
    )


def test_leftovers_are_found_by_key_name_and_session(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    key = f"flow/{os.getpid()}/leftovers"
    environment = {**os.environ, STEP_KEY_VARIABLE: f"{key}/1"}
    # A program in a session of its own, with a child whose environment was cleared.
    program = start(["sh", "-c", "env -i sleep 300 & echo $!; wait"], env=environment, start_new_session=True)
    hidden = ready(program)
    forked = start(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nfrom steps._process import marked\n"
            f"with marked({key + '/1'!r}):\n    pid = os.fork()\n"
            "    if pid == 0:\n        os.setsid(); time.sleep(300)\nprint(pid, flush=True); time.sleep(300)",
        ]
    )
    child = ready(forked)
    later = start(["sh", "-c", "echo 1; sleep 300"], env={**os.environ, STEP_KEY_VARIABLE: f"{key}/2"})
    similar = start(["sh", "-c", "echo 1; sleep 300"], env={**os.environ, STEP_KEY_VARIABLE: f"{key}/11"})
    ready(later), ready(similar)

    killed = kill_leftovers(key, before_attempt=2)

    assert {program.pid, hidden, child} <= set(killed)
    assert gone(program.pid) and gone(hidden) and gone(child)
    assert forked.poll() is None, "the parent has its own name back"
    assert later.poll() is None and similar.poll() is None
    assert {later.pid, similar.pid} <= set(kill_leftovers(key))
    assert kill_leftovers(key) == []


def test_a_session_that_is_not_the_steps_is_spared(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    key = f"flow/{os.getpid()}/spared"
    script = f"sleep 300 & echo $!; {STEP_KEY_VARIABLE}={key}/1 sleep 301 & wait"
    shell = start(["sh", "-c", script], start_new_session=True)
    bystander = ready(shell)
    deadline = time.monotonic() + 30
    while len(descendants(shell.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(kill_leftovers(key)) == 1
    assert psutil.pid_exists(bystander) and psutil.Process(bystander).status() != psutil.STATUS_ZOMBIE


def test_marked_gives_the_name_back() -> None:
    name = Path("/proc/thread-self/comm")
    before = name.read_text()
    with marked("a/b/c/1"):
        assert name.read_text().startswith("step-")
    assert name.read_text() == before


def test_signalling_a_process_that_is_gone_is_harmless() -> None:
    process = subprocess.Popen(["true"])
    found = psutil.Process(process.pid)
    process.wait()
    end([found], 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
