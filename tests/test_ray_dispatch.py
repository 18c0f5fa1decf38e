"""Steps on a real Ray head: found again by key, killed in every part, logs byte for byte."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster.call import RayCall
from cluster.dispatch import ClusterUnusable, RayDispatch, RayHandle, RayLocation
from cluster.shape import ResourceShape
from steps import Progress, StepRequest, StepResult
from steps._files import attempt_dir

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

WORK = """
import os, sys, time

def greet(name):
    print("hello", name)
    print("to stderr", file=sys.stderr)
    return {"greeting": f"hello {name}", "pid": os.getpid()}

def count(path, lines, pause_s):
    with open(path, "a") as file:
        file.write("started\\n")
    for number in range(lines):
        print(f"line {number} " + "x" * (number % 50), flush=True)
        time.sleep(pause_s)
    return {"pid": os.getpid()}

def spin():
    print("spinning", flush=True)
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

def leave():
    print("last words", flush=True)
    time.sleep(0.2)
    os._exit(7)

def fork():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(600)
        os._exit(0)
    print(pid, flush=True)
    time.sleep(600)

def big(megabytes):
    line = b"y" * 1023 + b"\\n"
    for _ in range(megabytes * 1024):
        os.write(1, line)
"""


class Bench:
    """A dispatch on one head, with requests that differ in what matters to a test."""

    def __init__(self, head: Any, folder: Path, **options: Any) -> None:
        self.head = head
        self.folder = folder
        self.run_id = uuid.uuid4().hex[:8]
        (folder / "work.py").write_text(WORK)
        self.dispatch = RayDispatch(self.locate, driver_log=folder / "driver.log", **options)

    async def locate(self) -> RayLocation:
        return RayLocation(address=self.head.address, token_file=str(self.head.token_file))

    def request(self, type: str, params: dict[str, Any], **fields: Any) -> StepRequest:
        known: dict[str, Any] = {
            "workflow_id": "flow",
            "run_id": self.run_id,
            "step_id": uuid.uuid4().hex[:8],
            "step_name": "step",
            "attempt": 1,
            "plan_dir": str(self.folder),
            "working_dir": str(self.folder),
            "log_dir": str(self.folder / "logs"),
            "timeout_s": 60,
            "grace_s": 0.5,
        }
        return StepRequest(type=type, params=params, **{**known, **fields})

    def call(self, function: str, **arguments: Any) -> StepRequest:
        return self.request("python", {"call": f"work:{function}", "arguments": arguments})

    def shell(self, script: str, **fields: Any) -> StepRequest:
        return self.request("command", {"command": "sh", "args": ["-c", script]}, **fields)

    async def start(self, request: StepRequest, **shape: Any) -> RayHandle:
        return await self.dispatch.attach_or_start(request, ResourceShape(**shape))

    async def run(self, request: StepRequest, **shape: Any) -> StepResult:
        handle = await self.start(request, **shape)
        return await asyncio.wait_for(handle.wait(), 120)

    def driver(self) -> psutil.Process:
        living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
        return next(child for child in living if str(self.head.port) in " ".join(child.cmdline()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(ray_head: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    bench = Bench(ray_head, tmp_path_factory.mktemp("bench"), idle_ttl_s=3.0)
    yield bench
    await bench.dispatch.close()


async def until(handle: RayHandle, wanted: Callable[[Progress], object]) -> Progress:
    """The first progress for which `wanted` is true."""
    found: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()

    def listen(progress: Progress) -> None:
        if wanted(progress) and not found.done():
            found.set_result(progress)

    waiting = asyncio.ensure_future(handle.wait(listen))
    await asyncio.wait({found, waiting}, timeout=120, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert found.done(), f"got {handle.progress} and {handle.result}"
    return found.result()


async def gone(pid: int, timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        await asyncio.sleep(0.05)
    return False


async def test_a_function_prints_and_returns(bench: Bench) -> None:
    request = bench.call("greet", name="Ada")
    result = await bench.run(request)
    assert result.outcome == "succeeded", result
    assert result.outputs == {"greeting": "hello Ada", "pid": result.pid}
    folder = attempt_dir(request)
    assert result.attempt_dir == str(folder)
    assert (folder / "stdout.log").read_bytes() == b"hello Ada\n"
    assert (folder / "stderr.log").read_bytes() == b"to stderr\n"
    records = [json.loads(line) for line in (folder / "structured.jsonl").read_text().splitlines()]
    assert {(record["stream"], record["message"]) for record in records} == {
        ("stdout", "hello Ada"),
        ("stderr", "to stderr"),
    }


async def test_a_warm_actor_is_used_again(bench: Bench) -> None:
    first = await bench.run(bench.call("greet", name="a"))
    pids = {(await bench.run(bench.shell("exit 3"))).pid for _ in range(3)}
    assert pids == {first.pid}


async def test_an_exit_code_is_a_result(bench: Bench) -> None:
    result = await bench.run(bench.shell("echo no >&2; exit 3"))
    assert (result.outcome, result.reason, result.exit_code) == ("failed", "exit_code", 3)


async def test_a_changed_module_is_loaded_again(bench: Bench) -> None:
    module = bench.folder / "changing.py"
    request = [bench.request("python", {"call": "changing:value"}) for _ in range(3)]
    module.write_text("loads = []\ndef value():\n    loads.append(1)\n    return {'value': 1, 'calls': len(loads)}\n")
    assert (await bench.run(request[0])).outputs == {"value": 1, "calls": 1}
    assert (await bench.run(request[1])).outputs == {"value": 1, "calls": 2}
    module.write_text("def value():\n    return {'value': 'two'}\n")
    assert (await bench.run(request[2])).outputs == {"value": "two"}


async def test_another_plans_module_of_the_same_name_is_its_own(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("def greet(name):\n    return {'greeting': 'other'}\n")
    await bench.run(bench.call("greet", name="a"))
    request = bench.request("python", {"call": "work:greet", "arguments": {"name": "b"}}, plan_dir=str(tmp_path))
    assert (await bench.run(request)).outputs == {"greeting": "other"}


async def test_secrets_are_masked(bench: Bench) -> None:
    request = bench.shell('echo "it is $KEY"; test -n "$KEY"', secrets={"KEY": "STABLE"})
    result = await bench.run(request)
    assert result.outcome == "succeeded", result
    assert (attempt_dir(request) / "stdout.log").read_text() == "it is ***\n"


async def test_fractions_of_a_cpu_run_side_by_side(bench: Bench) -> None:
    folder = bench.folder / "meeting"
    folder.mkdir()
    script = f"touch {folder}/$STEP_ID; while [ $(ls {folder} | wc -l) -lt 3 ]; do sleep 0.05; done"
    results = await asyncio.gather(*(bench.run(bench.shell(script), cpus=0.5) for _ in range(3)))
    assert {result.outcome for result in results} == {"succeeded"}
    assert len({result.pid for result in results}) == 3


async def test_a_step_has_as_many_threads_as_cpus_unless_it_says_otherwise(bench: Bench) -> None:
    async def threads(cpus: float, **env: str) -> str:
        result = await bench.run(bench.shell('echo "$OMP_NUM_THREADS"', env=env), cpus=cpus)
        return (Path(result.attempt_dir) / "stdout.log").read_text().strip()

    assert [await threads(0.5), await threads(2), await threads(0.5, OMP_NUM_THREADS="3")] == ["1", "2", "3"]


async def test_labels_and_custom_resources_place_a_step(bench: Bench) -> None:
    result = await bench.run(bench.shell("true"), labels={"zone": "here"}, custom={"slot": 1}, memory=50_000_000)
    assert result.outcome == "succeeded", result


@pytest.mark.parametrize("shape", [{"gpus": 1}, {"cpus": 64}, {"labels": {"zone": "there"}}, {"custom": {"tpu": 1}}])
async def test_what_no_node_can_give_fails_at_once(bench: Bench, shape: dict[str, Any]) -> None:
    started_at = time.monotonic()
    result = await bench.run(bench.shell("true"), **shape)
    assert (result.outcome, result.reason, result.final) == ("failed", "infeasible", True)
    assert "there is" in result.error and "hint:" in result.error
    assert time.monotonic() - started_at < 5


async def test_one_that_waits_says_for_what(bench: Bench) -> None:
    holder = await bench.start(bench.shell("sleep 60"), custom={"slot": 2})
    await until(holder, lambda progress: progress.pid)
    waiter = await bench.start(bench.shell("true"), custom={"slot": 1})
    progress = await until(waiter, lambda progress: "0 of 2 slot free" in progress.text)
    assert "waiting for a node with" in progress.text
    await holder.cancel()
    assert (await asyncio.wait_for(waiter.wait(), 120)).outcome == "succeeded"
    assert (await holder.wait()).outcome == "cancelled"


async def test_a_waiting_step_can_be_cancelled(bench: Bench) -> None:
    holder = await bench.start(bench.shell("sleep 60"), custom={"slot": 2})
    await until(holder, lambda progress: progress.pid)
    waiter = await bench.start(bench.shell("true"), custom={"slot": 1})
    await until(waiter, lambda progress: "waiting" in progress.text)
    await waiter.cancel()
    assert (await asyncio.wait_for(waiter.wait(), 120)).outcome == "cancelled"
    await holder.cancel()
    await holder.wait()


async def test_cancel_ends_the_whole_tree_within_the_grace_period(bench: Bench) -> None:
    handle = await bench.start(bench.shell("trap '' TERM; setsid sleep 600 & echo $!; sleep 600"))
    child = int((await until(handle, lambda progress: progress.last_line.isdigit())).last_line)
    started_at = time.monotonic()
    await handle.cancel()
    assert (await handle.wait()).outcome == "cancelled"
    assert time.monotonic() - started_at < 5
    assert await gone(child, 1)


async def test_a_step_over_its_time_is_ended(bench: Bench) -> None:
    result = await bench.run(bench.shell("sleep 600", timeout_s=0.5))
    assert (result.outcome, result.reason) == ("timed_out", "timeout")


async def test_a_function_that_will_not_end_costs_its_actor(bench: Bench) -> None:
    handle = await bench.start(bench.call("spin"))
    pid = (await until(handle, lambda progress: progress.last_line == "spinning")).pid
    await handle.cancel()
    assert (await asyncio.wait_for(handle.wait(), 120)).outcome == "cancelled"
    assert await gone(pid)
    assert (await bench.run(bench.shell("true"))).pid != pid


async def test_a_function_that_ends_the_process_keeps_its_last_words(bench: Bench) -> None:
    request = bench.call("leave")
    result = await bench.run(request)
    assert (result.outcome, result.reason, result.final) == ("failed", "infrastructure", False)
    assert (attempt_dir(request) / "stdout.log").read_text() == "last words\n"


@pytest.mark.parametrize("kind", ["command", "fork"])
async def test_a_killed_actor_takes_its_children_along(bench: Bench, kind: str) -> None:
    request = bench.call("fork") if kind == "fork" else bench.shell("setsid sleep 600 & echo $!; sleep 600")
    handle = await bench.start(request)
    progress = await until(handle, lambda progress: progress.last_line.isdigit())
    os.kill(progress.pid, signal.SIGKILL)
    result = await asyncio.wait_for(handle.wait(), 120)
    assert (result.outcome, result.reason, result.final) == ("failed", "infrastructure", False)
    assert await gone(int(progress.last_line))
    assert (attempt_dir(request) / "stdout.log").read_text() == f"{progress.last_line}\n"


async def test_what_was_dispatched_and_is_lost_is_not_started_again(bench: Bench) -> None:
    request = bench.shell(f"touch {bench.folder}/ran-twice")
    folder = attempt_dir(request)
    first = bench.shell("sleep 600")
    handle = await bench.start(first)
    pid = (await until(handle, lambda progress: progress.pid)).pid
    marker = json.loads((attempt_dir(first) / "dispatched.json").read_text())
    os.kill(pid, signal.SIGKILL)
    await handle.wait()
    folder.mkdir(parents=True)
    places = [{**place, "node_id": "ff" * 28} for place in marker["places"]]
    lost = {**marker, "key": request.key, "places": places}
    (folder / "dispatched.json").write_text(json.dumps(lost))
    result = await bench.run(request)
    assert (result.outcome, result.reason) == ("failed", "infrastructure")
    assert not (bench.folder / "ran-twice").exists()


WORKER = """
import asyncio, sys
from pathlib import Path
from cluster.dispatch import ClusterUnusable, RayDispatch, RayLocation
from cluster.shape import ResourceShape
from steps import StepRequest

async def main():
    async def locate():
        return RayLocation(address=sys.argv[1], token_file=sys.argv[2])
    dispatch = RayDispatch(locate)
    handle = await dispatch.attach_or_start(StepRequest.model_validate_json(sys.argv[3]), ResourceShape())
    await handle.wait()

asyncio.run(main())
"""


async def test_another_worker_finds_the_step_of_a_killed_one(bench: Bench) -> None:
    effect, lines = bench.folder / "effect", 80
    request = bench.call("count", path=str(effect), lines=lines, pause_s=0.05)
    argv = [sys.executable, "-c", WORKER, bench.head.address, str(bench.head.token_file), request.model_dump_json()]
    worker = subprocess.Popen(argv, cwd=Path(__file__).parent.parent, process_group=0, stderr=subprocess.DEVNULL)
    log = attempt_dir(request) / "stdout.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size > 200):
        assert time.monotonic() < deadline and worker.poll() is None
        await asyncio.sleep(0.02)
    worker.kill()
    worker.wait(10)
    result = await bench.run(request)
    assert result.outcome == "succeeded", result
    assert effect.read_text() == "started\n"
    expected = "".join(f"line {number} {'x' * (number % 50)}\n" for number in range(lines))
    assert log.read_text() == expected
    messages = [json.loads(line)["message"] for line in (log.parent / "structured.jsonl").read_text().splitlines()]
    assert messages == expected.splitlines()
    again = await bench.run(request)
    assert again == result


async def test_a_killed_driver_is_replaced_and_the_step_goes_on(bench: Bench) -> None:
    effect = bench.folder / "driver-effect"
    request = bench.call("count", path=str(effect), lines=60, pause_s=0.03)
    handle = await bench.start(request)
    pid = (await until(handle, lambda progress: progress.last_line)).pid
    bench.driver().kill()
    result = await asyncio.wait_for(handle.wait(), 120)
    assert (result.outcome, result.pid) == ("succeeded", pid)
    assert effect.read_text() == "started\n"
    assert len((attempt_dir(request) / "stdout.log").read_text().splitlines()) == 60


async def test_a_large_log_is_copied_whole_in_little_memory(bench: Bench) -> None:
    await bench.run(bench.shell("true"))
    before = bench.driver().memory_info().rss
    request = bench.call("big", megabytes=20)
    result = await bench.run(request)
    assert result.outcome == "succeeded", result
    data = (attempt_dir(request) / "stdout.log").read_bytes()
    assert len(data) == 20 << 20 and data.count(b"\n") == 20 * 1024
    assert bench.driver().memory_info().rss - before < 120 << 20


async def test_a_ray_call_is_a_step(bench: Bench) -> None:
    call = RayCall(function="work:greet", arguments={"name": "Bob"}, plan_dir=str(bench.folder))
    request = call.request(
        workflow_id="flow", run_id=bench.run_id, call_id="call", attempt=1, log_dir=str(bench.folder), plan_dir="/"
    )
    handle = await bench.dispatch.attach_or_start(request, call.shape)
    assert (await handle.wait()).outputs["greeting"] == "hello Bob"


async def test_a_wrong_token_is_named(ray_head: Any, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("0" * 64)

    async def locate() -> RayLocation:
        return RayLocation(address=ray_head.address, token_file=str(token_file))

    bench = Bench(ray_head, tmp_path)
    dispatch = RayDispatch(locate, patience_s=20, driver_log=tmp_path / "driver.log")
    handle = await dispatch.attach_or_start(bench.shell("true"), ResourceShape())
    result = await asyncio.wait_for(handle.wait(), 120)
    await dispatch.close()
    assert result.reason == "infrastructure"
    assert "refuses the token" in result.error


async def test_a_cluster_that_cannot_be_fails_at_once_for_good(ray_head: Any, tmp_path: Path) -> None:
    async def locate() -> RayLocation:
        raise ClusterUnusable("the token has mode `0640`")

    dispatch = RayDispatch(locate, patience_s=600, driver_log=tmp_path / "driver.log")
    handles = [await dispatch.attach_or_start(Bench(ray_head, tmp_path).shell("true"), ResourceShape()) for _ in "ab"]
    results = [await asyncio.wait_for(handle.wait(), 60) for handle in handles]
    await dispatch.close()
    assert {(result.reason, result.final, result.error) for result in results} == {
        ("infrastructure", True, "the token has mode `0640`")
    }


async def test_no_cluster_fails_when_patience_ends(ray_head: Any, tmp_path: Path) -> None:
    async def locate() -> RayLocation:
        return RayLocation(address="127.0.0.1:1")

    dispatch = RayDispatch(locate, patience_s=0.5, driver_log=tmp_path / "driver.log")
    handle = await dispatch.attach_or_start(Bench(ray_head, tmp_path).shell("true"), ResourceShape())
    result = await asyncio.wait_for(handle.wait(), 120)
    await dispatch.close()
    assert result.reason == "infrastructure"
    assert "no Ray cluster answers at `127.0.0.1:1`" in result.error


async def test_a_driver_that_cannot_be_started_is_tried_again(bench: Bench, tmp_path: Path) -> None:
    log = tmp_path / "later" / "driver.log"
    dispatch = RayDispatch(bench.locate, driver_log=log)
    handle = await dispatch.attach_or_start(bench.shell("true"), ResourceShape())
    progress = await until(handle, lambda progress: progress.text)
    assert "waiting for the Ray cluster: FileNotFoundError" in progress.text
    log.parent.mkdir()
    assert (await asyncio.wait_for(handle.wait(), 120)).outcome == "succeeded"
    await dispatch.close()


async def test_a_driver_that_can_never_be_started_fails_when_patience_ends(bench: Bench, tmp_path: Path) -> None:
    dispatch = RayDispatch(bench.locate, patience_s=0.5, driver_log=tmp_path)
    handle = await dispatch.attach_or_start(bench.shell("true"), ResourceShape())
    result = await asyncio.wait_for(handle.wait(), 60)
    await dispatch.close()
    assert (result.reason, result.final) == ("infrastructure", False)
    assert "IsADirectoryError" in result.error


async def test_the_worker_survives_its_cluster(make_ray_head: Callable[[], Any], tmp_path: Path) -> None:
    head = make_ray_head()
    head.start()
    bench = Bench(head, tmp_path)
    handle = await bench.start(bench.shell("setsid sleep 600 & echo $!; sleep 600"))
    child = int((await until(handle, lambda progress: progress.last_line.isdigit())).last_line)
    head.kill()
    await until(handle, lambda progress: "waiting for the Ray cluster" in progress.text)
    assert await gone(child)
    head.start()
    result = await asyncio.wait_for(handle.wait(), 120)
    assert (result.outcome, result.reason, result.final) == ("failed", "infrastructure", False)
    second = handle.request.model_copy(update={"attempt": 2, "params": {"command": "true"}})
    assert (await bench.run(second)).outcome == "succeeded"
    await bench.dispatch.close()
