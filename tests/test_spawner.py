"""Processes that run several attempts one after another: each as in a new process, none ended in place of another."""

import asyncio
import difflib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge.dispatch import LocalDispatch
from steps import Progress, StepRequest, StepResult
from steps._files import CANCEL, HOST, attempt_dir, read_json, read_result
from steps._process import is_alive, kill_leftovers

Make = Callable[..., StepRequest]
Run = Callable[..., Awaitable[StepResult]]


def quiet(progress: Progress) -> None:
    pass


def shell(script: str) -> dict[str, Any]:
    return {"command": "sh", "args": ["-c", script]}


async def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if value := condition():
            return value
        await asyncio.sleep(0.005)
    raise AssertionError(f"{what} never came")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def open_files(pid: int) -> list[str]:
    return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]


async def idle_in(pid: int) -> None:
    """Wait until a process has nothing to do: then it has no end of an attempt's pipe."""
    await until(lambda: not any(name.startswith("pipe:") for name in open_files(pid)), f"{pid} is idle")


async def same_process(run: Run, name: str, **fields: Any) -> int:
    """Runs steps until two in a row had one process, which is idle then; its pid."""
    pids: list[int] = []
    while len(pids) < 2 or pids[-1] != pids[-2]:
        assert len(pids) < 20
        result = await run(f"{name}-{len(pids)}", **fields, params={"command": "true"})
        pids.append(result.pid)
        await idle_in(pids[-1])
    return pids[-1]


SURROUNDINGS = (
    "umask; pwd; ulimit -a; nice; cat /proc/self/status | grep Sig[BIC]; ls -l /proc/self/fd | grep -o '[0-9]* ->'"
)


async def test_each_attempt_finds_what_it_would_in_a_new_process(
    run_locally: Run, step_request: Make, tmp_path: Path
) -> None:
    seen: dict[int, set[str]] = {}
    for number in range(8):
        folder = tmp_path / f"folder-{number}"
        folder.mkdir()
        script = f"{SURROUNDINGS}; env | sort | grep -v STEP > {folder}/env; exit {number % 2}"
        fields = {"params": shell(script), "working_dir": str(folder), "env": {f"V{number}": "v"}}
        result = await run_locally(f"s{number}", **fields)
        assert (result.exit_code, result.outcome) == (number % 2, "failed" if number % 2 else "succeeded")
        log = (attempt_dir(step_request(f"s{number}")) / "stdout.log").read_text()
        environment = (folder / "env").read_text()
        assert str(folder) in log and f"V{number}=v" in environment
        trace = (log + environment).replace(str(folder), "").replace(f"V{number}=v", "")
        seen.setdefault(result.pid, set()).add(trace)
        await idle_in(result.pid)
    assert len(seen) < 8, "processes were used again"
    first, *others = set.union(*seen.values())
    assert not others, list(difflib.unified_diff(first.split("\n"), others[0].split("\n"), lineterm="", n=0))


async def test_an_idle_process_keeps_no_file_thread_or_name_of_its_attempts(run_locally: Run) -> None:
    pid = await same_process(run_locally, "first")
    before = sorted(open_files(pid))
    assert pid == await same_process(run_locally, "second")
    assert sorted(open_files(pid)) == before
    process = psutil.Process(pid)
    await until(lambda: process.num_threads() == 1, "the end of the threads of the attempt")
    assert not process.name().startswith("step-")
    assert process.cwd() == "/"


@pytest.mark.parametrize("how", ["python", "secret", "timed out", "cancelled", "no program"])
async def test_a_process_is_not_used_again_after(
    how: str, local_dispatch: LocalDispatch, step_request: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATE_SECRETS_DIR", str(tmp_path))
    (tmp_path / "TOKEN").write_text("hidden\n")
    local_dispatch.close()
    fields: dict[str, dict[str, Any]] = {
        "python": {"type": "python", "params": {"call": "time:time"}},
        "secret": {"params": {"command": "true"}, "secrets": {"TOKEN": "TOKEN"}},
        "timed out": {"params": {"command": "sleep", "args": ["300"]}, "timeout_s": 0.2},
        "cancelled": {"params": {"command": "sleep", "args": ["300"]}},
        "no program": {"params": {"command": "no-such-program"}},
    }
    handle = await local_dispatch.attach_or_start(step_request(**fields[how]))
    if how == "cancelled":
        await until((attempt_dir(step_request()) / "stdout.log").exists)
        result = await handle.cancel()
        assert result.outcome == "cancelled"
    else:
        result = await handle.wait(quiet)
    await until(lambda: is_gone(result.pid), "the end of the process")


async def test_a_waiter_that_comes_again_sees_the_end_though_the_process_lives_on(
    local_dispatch: LocalDispatch, run_locally: Run, step_request: Make
) -> None:
    pid = await same_process(run_locally, "warm")
    request = step_request("begun", params={"command": "sleep", "args": ["0.2"]})
    first = await local_dispatch.attach_or_start(request)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(first.wait(quiet), 0.02)
    again = await local_dispatch.attach_or_start(request)
    results = await asyncio.gather(again.wait(quiet), first.wait(quiet))
    assert [result.pid for result in results] == [pid, pid]
    assert not is_gone(pid)


async def test_another_worker_sees_the_end_though_the_process_runs_the_next_attempt(
    local_dispatch: LocalDispatch, run_locally: Run, step_request: Make, tmp_path: Path
) -> None:
    pid = await same_process(run_locally, "warm")
    os.mkfifo(tmp_path / "gate")
    request = step_request("watched", params={"command": "cat", "args": [str(tmp_path / "gate")]})
    own = await local_dispatch.attach_or_start(request)
    await until((attempt_dir(request) / "stdout.log").exists)
    other = LocalDispatch()
    waiting = asyncio.create_task((await other.attach_or_start(request)).wait(quiet))
    await asyncio.sleep(0.01)
    await asyncio.to_thread((tmp_path / "gate").write_text, "x")
    await own.wait(quiet)
    await idle_in(pid)
    following = step_request("following", params={"command": "sleep", "args": ["300"]})
    handle = await local_dispatch.attach_or_start(following)
    assert (await waiting).pid == pid
    await until((attempt_dir(following) / "stdout.log").exists)
    host = read_json(attempt_dir(following) / HOST)
    assert host is not None and host["pid"] == pid and is_alive(host)
    # What is left of the first attempt is nothing, and the second is not taken for it.
    assert kill_leftovers(request.step_key) == []
    assert await (await other.attach_or_start(request)).cancel() == await waiting
    assert is_alive(host)
    other.close()
    assert (await handle.cancel()).outcome == "cancelled"


async def test_cancels_that_come_late_never_end_the_next_attempt(
    local_dispatch: LocalDispatch, step_request: Make
) -> None:
    requests = [step_request(f"s{n}", params={"command": "sleep", "args": ["0.01"]}, grace_s=0.2) for n in range(60)]
    cancels: list[asyncio.Task[StepResult]] = []
    wanted_dead: set[str] = set()
    outcomes: dict[str, str] = {}
    for number, request in enumerate(requests):
        handle = await local_dispatch.attach_or_start(request)
        waiting = asyncio.create_task(handle.wait(quiet))
        if number % 2:
            wanted_dead.add(request.step_id)
            await asyncio.sleep(0.008 + (number % 12) * 0.001)
            cancels.append(asyncio.create_task(handle.cancel()))
        outcomes[request.step_id] = (await waiting).outcome
    await asyncio.gather(*cancels)
    assert {outcomes[request.step_id] for request in requests if request.step_id not in wanted_dead} == {"succeeded"}
    assert set(outcomes.values()) <= {"succeeded", "cancelled"}


async def test_a_cancel_that_finds_the_result_ends_nothing(
    local_dispatch: LocalDispatch, run_locally: Run, step_request: Make
) -> None:
    """The worker's half of the agreement; the other half is in the host: it looks for the marker after its result."""
    pid = await same_process(run_locally, "warm")
    request = step_request("marked", params={"command": "true"})
    folder = attempt_dir(request)
    folder.mkdir(parents=True)
    (folder / CANCEL).touch()
    result = await (await local_dispatch.attach_or_start(request)).wait(quiet)
    assert (result.outcome, result.pid) == ("succeeded", pid)
    await until(lambda: is_gone(pid), "the end of the process that somebody may be about to signal")


async def test_a_killed_process_is_a_failure_of_the_attempt_it_ran_only(
    local_dispatch: LocalDispatch, run_locally: Run, step_request: Make, tmp_path: Path
) -> None:
    pid = await same_process(run_locally, "warm")
    done = await run_locally("done", params={"command": "true"})
    await idle_in(pid)
    script = f"setsid env -i sleep 300 & echo $! > {tmp_path}/orphan; sleep 300"
    request = step_request("killed", params=shell(script))
    handle = await local_dispatch.attach_or_start(request)
    await until(lambda: (tmp_path / "orphan").exists() and (tmp_path / "orphan").read_text().endswith("\n"))
    host = read_json(attempt_dir(request) / HOST)
    assert host is not None and host["pid"] == pid == done.pid
    os.kill(pid, signal.SIGKILL)
    result = await handle.wait(quiet)
    assert (result.outcome, result.reason) == ("failed", "infrastructure")
    await until(lambda: is_gone(int((tmp_path / "orphan").read_text())), "the end of the orphan")
    assert read_result(attempt_dir(step_request("done"))) == done
    assert (await run_locally("next", params={"command": "true"})).outcome == "succeeded"


WORKER = """
import asyncio, sys
from pathlib import Path
from bridge.dispatch import LocalDispatch
from steps import StepRequest
async def main():
    dispatch = LocalDispatch()
    for text in sys.argv[1:]:
        handle = await dispatch.attach_or_start(StepRequest.model_validate_json(text))
        await handle.wait(lambda progress: None)
asyncio.run(main())
"""


async def test_without_its_worker_a_process_ends_with_its_attempt(
    local_dispatch: LocalDispatch, step_request: Make, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "gate")
    requests = [step_request(f"s{number}", params={"command": "true"}) for number in range(3)]
    requests.append(step_request("last", params={"command": "cat", "args": [str(tmp_path / "gate")]}))
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *(request.model_dump_json() for request in requests)], start_new_session=True
    )
    folder = attempt_dir(requests[-1])
    await until((folder / "stdout.log").exists)
    processes = [child for child in psutil.Process(worker.pid).children(recursive=True) if child.name() != "cat"]
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    waiting = asyncio.create_task((await local_dispatch.attach_or_start(requests[-1])).wait(quiet))
    await asyncio.to_thread((tmp_path / "gate").write_text, "x")
    result = await waiting
    assert (result.outcome, result.pid) == ("succeeded", (read_json(folder / HOST) or {})["pid"])
    for process in processes:
        await until(lambda process=process: is_gone(process.pid), "the end of every process")
