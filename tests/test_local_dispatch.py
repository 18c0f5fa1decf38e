"""Steps beside the worker: run once, found again after a kill, ended with everything they have started."""

import asyncio
import json
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

from bridge.dispatch import LocalDispatch, WrongNode
from steps import Progress, StepError, StepRequest, StepResult
from steps._files import HOST, REQUEST, RESULT, attempt_dir, read_json, read_result, write_once
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
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} never came")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pids_in(path: Path, count: int) -> Callable[[], list[int]]:
    """The pids a step has written to a file, once there are `count`."""

    def read() -> list[int]:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [int(line) for line in lines] if len(lines) >= count else []

    return read


def host_of(request: StepRequest) -> dict[str, Any]:
    host = read_json(attempt_dir(request) / HOST)
    assert host is not None
    return host


async def test_a_step_runs_and_leaves_its_files(run_locally: Run, step_request: Make) -> None:
    result = await run_locally(params=shell("echo out; echo error >&2; pwd"))
    assert (result.outcome, result.exit_code, result.error) == ("succeeded", 0, "")
    folder = attempt_dir(step_request())
    assert result.attempt_dir == str(folder)
    assert (folder / "stdout.log").read_text().startswith("out\n")
    assert (folder / "stderr.log").read_text() == "error\n"
    assert {path.name for path in folder.iterdir()} == {
        REQUEST, HOST, RESULT, "stdout.log", "stderr.log", "structured.jsonl",
    }  # fmt: skip
    assert host_of(step_request())["pid"] == result.pid != os.getpid()


async def test_many_starts_at_once_run_the_step_once(tmp_path: Path, step_request: Make) -> None:
    dispatches = [LocalDispatch() for _ in range(3)]
    for round_number in range(5):
        request = step_request(f"once-{round_number}", params=shell(f"echo x >> {tmp_path}/effects; sleep 0.05"))
        handles = await asyncio.gather(*(d.attach_or_start(request) for d in dispatches for _ in range(2)))
        results = await asyncio.gather(*(handle.wait(quiet) for handle in handles))
        assert {result.outcome for result in results} == {"succeeded"}
        assert len({result.pid for result in results}) == 1
        assert (tmp_path / "effects").read_text().count("x") == round_number + 1
    for dispatch in dispatches:
        dispatch.close()


WORKER = """
import asyncio, sys
from bridge.dispatch import LocalDispatch
from steps import StepRequest
async def main():
    handle = await LocalDispatch().attach_or_start(StepRequest.model_validate_json(sys.argv[1]))
    await handle.wait(lambda progress: None)
asyncio.run(main())
"""


async def test_a_step_outlives_its_killed_worker_and_is_found_again(
    local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    script = f"echo x >> {tmp_path}/effects; for i in $(seq 60); do echo line $i; sleep 0.01; done; cat {tmp_path}/gate"
    os.mkfifo(tmp_path / "gate")
    request = step_request(params=shell(script))
    folder = attempt_dir(request)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, request.model_dump_json()], start_new_session=True)
    await until(lambda: (folder / "stdout.log").exists() and "line 3" in (folder / "stdout.log").read_text())
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    host = host_of(request)
    assert is_alive(host)

    handle = await local_dispatch.attach_or_start(request)
    waiting = asyncio.create_task(handle.wait(quiet))
    await asyncio.to_thread((tmp_path / "gate").write_text, "end\n")
    result = await waiting

    assert (result.outcome, result.pid) == ("succeeded", host["pid"])
    assert (folder / "stdout.log").read_text() == "".join(f"line {i}\n" for i in range(1, 61)) + "end\n"
    assert (tmp_path / "effects").read_text() == "x\n"
    again = await (await local_dispatch.attach_or_start(request)).wait(quiet)
    assert again == result


HIDING = """
import os, subprocess, sys, time
def note(pid):
    with open(sys.argv[1] if len(sys.argv) > 1 else os.environ["PIDS"], "a") as file:
        file.write(f"{pid}\\n")
def run():
    subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], start_new_session=True)
    note(subprocess.Popen(["env", "-i", "sleep", "300"], start_new_session=True).pid)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            note(os.getpid())
            time.sleep(300)
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(300)
"""


@pytest.mark.parametrize("with_spawner", [True, False])
async def test_a_killed_host_is_an_infrastructure_failure_and_leaves_nothing(
    with_spawner: bool, local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    (tmp_path / "hiding.py").write_text(HIDING)
    request = step_request(type="python", params={"call": "hiding:run"}, env={"PIDS": str(tmp_path / "pids")})
    handle = await local_dispatch.attach_or_start(request)
    pids = await until(pids_in(tmp_path / "pids", 2), "the pids")
    host = host_of(request)
    everything = [host["pid"], *(child.pid for child in psutil.Process(host["pid"]).children(recursive=True))]
    assert set(pids) < set(everything)
    if not with_spawner:
        assert local_dispatch._spawner.pid
        os.kill(local_dispatch._spawner.pid, signal.SIGKILL)
    os.kill(host["pid"], signal.SIGKILL)
    result = await handle.wait(quiet)
    assert (result.outcome, result.reason, result.final) == ("failed", "infrastructure", False)
    assert "killed" in result.error
    alive = [pid for pid in everything if not is_gone(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    # Without the spawner, only a program that hides both its environment and its session is not found.
    assert alive == [] if with_spawner else alive == pids[:1]


async def test_the_next_attempt_starts_when_everything_of_the_last_one_is_dead(
    local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    (tmp_path / "hiding.py").write_text(
        HIDING.replace('note(subprocess.Popen(["env", "-i", ', 'note(subprocess.Popen(["env", ')
    )
    first = step_request(type="python", params={"call": "hiding:run"}, env={"PIDS": str(tmp_path / "pids")})
    await local_dispatch.attach_or_start(first)
    await until(pids_in(tmp_path / "pids", 2), "the pids")
    host = host_of(first)
    everything = [host["pid"], *(child.pid for child in psutil.Process(host["pid"]).children(recursive=True))]
    assert local_dispatch._spawner.pid
    os.kill(local_dispatch._spawner.pid, signal.SIGKILL)
    os.kill(host["pid"], signal.SIGKILL)
    (tmp_path / "look.py").write_text(
        "import os\ndef run(pids):\n    return {'alive': [p for p in pids if os.path.exists(f'/proc/{p}/exe')"
        " and open(f'/proc/{p}/stat').read().rpartition(')')[2].split()[0] not in 'ZX']}\n"
    )
    params = {"call": "look:run", "arguments": {"pids": everything}}
    second = step_request(type="python", params=params, attempt=2)
    result = await (await local_dispatch.attach_or_start(second)).wait(quiet)
    assert (result.outcome, result.outputs) == ("succeeded", {"alive": []})


async def test_killed_spawners_cost_nothing(local_dispatch: LocalDispatch, run_locally: Run) -> None:
    for number in range(4):
        assert local_dispatch._spawner.pid
        spawner = psutil.Process(local_dispatch._spawner.pid)
        victim = spawner if number % 2 == 0 else (await until(spawner.children))[0]
        victim.kill()
        result = await run_locally(f"step-{number}", params={"command": "true"})
        assert result.outcome == "succeeded"


async def test_a_spawner_killed_with_requests_in_flight_loses_no_step(
    local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    requests = [step_request(f"s{i}", params=shell(f"echo {i} >> {tmp_path}/effects")) for i in range(20)]
    handles = [await local_dispatch.attach_or_start(request) for request in requests]
    assert local_dispatch._spawner.pid
    os.kill(local_dispatch._spawner.pid, signal.SIGKILL)
    results = await asyncio.gather(*(handle.wait(quiet) for handle in handles))
    assert {result.outcome for result in results} == {"succeeded"}
    assert sorted(map(int, (tmp_path / "effects").read_text().split())) == list(range(20))


async def test_a_spawner_stays_for_its_steps_and_leaves_with_the_last(tmp_path: Path, step_request: Make) -> None:
    dispatch = LocalDispatch()
    dispatch.start()
    spawner = dispatch._spawner.pid
    assert spawner
    os.mkfifo(tmp_path / "gate")
    request = step_request(params={"command": "cat", "args": [str(tmp_path / "gate")]})
    await dispatch.attach_or_start(request)
    await until(lambda: (attempt_dir(request) / "structured.jsonl").exists())
    dispatch.close()
    assert not is_gone(spawner)
    await asyncio.to_thread((tmp_path / "gate").write_text, "go\n")
    await until(lambda: is_gone(spawner), "the end of the spawner")
    result = read_result(attempt_dir(request))
    assert result is not None and result.outcome == "succeeded"


FOR_EVER = "while :; do sleep 0.1; done"
STUBBORN = f"trap '' TERM; echo $$ >> {{0}}; (trap '' TERM; {FOR_EVER}) & echo $! >> {{0}}; {FOR_EVER}"
DAEMON = f"setsid sh -c 'trap \"\" TERM; echo $$ >> {{0}}; {FOR_EVER}' & echo $! >> {{0}}; sleep 300"


@pytest.mark.parametrize("script", [STUBBORN, DAEMON])
@pytest.mark.parametrize("how", ["cancelled", "timed_out"])
async def test_cancel_and_timeout_end_the_whole_tree(
    how: str, script: str, local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    timeout_s = 60.0 if how == "cancelled" else 1.0
    request = step_request(params=shell(script.format(tmp_path / "pids")), timeout_s=timeout_s, grace_s=0.2)
    handle = await local_dispatch.attach_or_start(request)
    pids = await until(pids_in(tmp_path / "pids", 2), "the pids")
    result = await (handle.cancel() if how == "cancelled" else handle.wait(quiet))
    assert result.outcome == how
    assert all(is_gone(pid) for pid in pids)
    assert await handle.wait(quiet) == result


async def test_c_code_that_does_not_return_is_ended_by_force_with_its_log(
    local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    (tmp_path / "stuck.py").write_text(
        "import ctypes, signal\ndef run():\n    print('before', flush=True)\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])\n"
        "    ctypes.CDLL(None).sleep(300)\n"
    )
    request = step_request(type="python", params={"call": "stuck:run"}, timeout_s=0.5, grace_s=0.1)
    result = await (await local_dispatch.attach_or_start(request)).wait(quiet)
    assert (result.outcome, result.reason) == ("timed_out", "timeout")
    assert "by force" in result.error
    assert (attempt_dir(request) / "stdout.log").read_text() == "before\n"


async def test_a_host_that_does_not_answer_is_killed_by_cancel(
    local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    request = step_request(params=shell(f"echo $$ >> {tmp_path}/pids; sleep 300"), grace_s=0.1)
    handle = await local_dispatch.attach_or_start(request)
    pids = await until(pids_in(tmp_path / "pids", 1))
    host = host_of(request)
    os.kill(host["pid"], signal.SIGSTOP)
    result = await handle.cancel()
    assert result.outcome == "cancelled"
    assert is_gone(host["pid"]) and is_gone(pids[0])


async def test_a_late_cancel_changes_nothing(
    local_dispatch: LocalDispatch, run_locally: Run, step_request: Make
) -> None:
    done = await run_locally(params={"command": "true"})
    handle = await local_dispatch.attach_or_start(step_request())
    assert await handle.cancel() == done
    assert await handle.wait(quiet) == done


async def test_a_cancel_before_the_claim_keeps_the_step_from_running(
    local_dispatch: LocalDispatch, tmp_path: Path, step_request: Make
) -> None:
    assert local_dispatch._spawner.pid
    for number in range(10):
        request = step_request(f"s{number}", params=shell(f"echo x >> {tmp_path}/effects-{number}; sleep 300"))
        handle = await local_dispatch.attach_or_start(request)
        await asyncio.sleep(number * 0.001)
        result = await handle.cancel()
        assert result.outcome == "cancelled"
        assert await handle.wait(quiet) == result
        assert not kill_leftovers(request.step_key)


async def test_cancels_at_random_moments_always_end_with_a_result(
    local_dispatch: LocalDispatch, step_request: Make
) -> None:
    async def one(number: int) -> StepResult:
        request = step_request(f"s{number}", params=shell("echo hello; sleep 0.03"), grace_s=0.2)
        handle = await local_dispatch.attach_or_start(request)
        waiting = asyncio.create_task(handle.wait(quiet))
        await asyncio.sleep(number * 0.002)
        cancelled, waited = await handle.cancel(), await waiting
        assert cancelled == waited == read_result(attempt_dir(request))
        return waited

    results = await asyncio.gather(*(one(number) for number in range(40)))
    assert {result.outcome for result in results} <= {"cancelled", "succeeded"}, results


async def test_a_host_killed_at_random_moments_is_never_taken_for_a_success(
    local_dispatch: LocalDispatch, step_request: Make
) -> None:
    async def one(number: int) -> StepResult:
        request = step_request(f"s{number}", params=shell("sleep 0.05; exit 7"), grace_s=0.2)
        handle = await local_dispatch.attach_or_start(request)
        await asyncio.sleep(number * 0.003)
        host = read_json(attempt_dir(request) / HOST)
        if host and is_alive(host):
            os.kill(host["pid"], signal.SIGKILL)
        result: StepResult = await handle.wait(quiet)
        return result

    results = await asyncio.gather(*(one(number) for number in range(30)))
    assert {(result.outcome, result.reason) for result in results} <= {
        ("failed", "infrastructure"),
        ("failed", "exit_code"),
    }


async def test_a_background_child_that_holds_the_output_ends_with_the_step(
    run_locally: Run, tmp_path: Path, step_request: Make
) -> None:
    result = await run_locally(params=shell(f"sleep 300 & echo $! > {tmp_path}/pids; echo hello"))
    assert result.outcome == "succeeded"
    assert result.duration_s < 30
    assert is_gone(pids_in(tmp_path / "pids", 1)()[0])
    assert (attempt_dir(step_request()) / "stdout.log").read_text() == "hello\n"


async def test_an_attempt_of_another_machine_is_left_alone(local_dispatch: LocalDispatch, step_request: Make) -> None:
    request = step_request(params={"command": "true"})
    folder = attempt_dir(request)
    folder.mkdir(parents=True)
    claim = {"pid": 1, "start_ticks": 1, "boot_id": "there", "key": request.key, "node": "elsewhere", "isolated": True}
    write_once(folder / HOST, json.dumps(claim))
    with pytest.raises(WrongNode, match="`elsewhere`"):
        await local_dispatch.attach_or_start(request)
    result = StepResult(outcome="succeeded", node="elsewhere")
    write_once(folder / RESULT, result.model_dump_json())
    assert await (await local_dispatch.attach_or_start(request)).wait(quiet) == result


async def test_two_steps_whose_ids_give_one_file_name_are_told_apart(
    local_dispatch: LocalDispatch, run_locally: Run, step_request: Make
) -> None:
    await run_locally("a/b", params={"command": "true"})
    with pytest.raises(StepError, match="belongs to `flow/run/a/b/1`"):
        await local_dispatch.attach_or_start(step_request("a_b", params={"command": "true"}))


@pytest.mark.parametrize("step_id", ["..", ".", " ", "ü" * 200, "x" * 5000, "a b\\c", "-rf", "$HOME"])
async def test_odd_ids_stay_inside_the_log_folder(
    step_id: str, run_locally: Run, step_request: Make, tmp_path: Path
) -> None:
    assert (await run_locally(step_id, params={"command": "true"})).outcome == "succeeded"
    run_dir = tmp_path / "logs" / "flow" / "run"
    assert attempt_dir(step_request(step_id)).resolve().parent.parent == run_dir
    assert len(list(run_dir.iterdir())) == 1


async def test_progress_tells_the_last_line(local_dispatch: LocalDispatch, step_request: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    script = f"echo first; printf '10%%\\r20%%'; cat {tmp_path}/gate"
    handle = await local_dispatch.attach_or_start(step_request(params=shell(script)))
    seen: list[Progress] = []
    waiting = asyncio.create_task(handle.wait(seen.append))
    await until(lambda: any(progress.last_line == "20%" for progress in seen))
    assert seen[-1].pid == host_of(step_request())["pid"]
    await asyncio.to_thread((tmp_path / "gate").write_text, "")
    assert (await waiting).outcome == "succeeded"


async def test_a_cancelled_wait_can_be_taken_up_again(local_dispatch: LocalDispatch, step_request: Make) -> None:
    handle = await local_dispatch.attach_or_start(step_request(params={"command": "sleep", "args": ["0.3"]}))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(handle.wait(quiet), 0.05)
    assert (await handle.wait(quiet)).outcome == "succeeded"
