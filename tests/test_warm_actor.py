"""Steps that name an actor share its process: what one keeps the next finds, and what a step starts ends with it."""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster.dispatch import RayDispatch, RayHandle, RayLocation
from cluster.shape import ResourceShape
from steps import StepRequest, StepResult

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module")]

MODEL = ResourceShape(cpus=0.1, actor="model")

WORK = '''
import os, subprocess, sys, time

loaded = []

class Model:
    """Answers with the help of a process of its own, as engines do."""

    def __init__(self):
        self.helper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def answer(self, question):
        self.helper.stdin.write(question.encode() + b"\\n")
        self.helper.stdin.flush()
        return self.helper.stdout.readline().decode().strip()

def load():
    loaded.append(1)
    return Model()

def ask(question, context):
    model = context.keep("model", load)
    stray = subprocess.Popen(["sleep", "600"], start_new_session=True)
    return {
        "answer": model.answer(question), "pid": os.getpid(), "loads": len(loaded),
        "helper": model.helper.pid, "stray": stray.pid,
    }

def hold(context):
    context.keep("model", load)
    print("holds", flush=True)
    while not context.cancelled:
        time.sleep(0.02)
    context.check_cancelled()

def fail(context):
    context.keep("model", lambda: 1 / 0)

def fork(how):
    if os.fork() == 0:
        if how == "raise":
            raise ValueError("from the child")
        if how == "exit":
            sys.exit(3)
        return {"from": "child"}
    _, status = os.wait()
    time.sleep(0.3)
    return {"from": "parent", "code": os.waitstatus_to_exitcode(status)}
'''


class Bench:
    """A dispatch on one node."""

    def __init__(self, head: Any, folder: Path) -> None:
        self.head = head
        self.folder = folder
        self.run_id = uuid.uuid4().hex[:8]
        (folder / "work.py").write_text(WORK)

        async def locate() -> RayLocation:
            return RayLocation(address=head.address, token_file=str(head.token_file))

        self.dispatch = RayDispatch(locate, driver_log=folder / "driver.log", idle_ttl_s=5.0)

    def call(self, function: str, plan_dir: Path | None = None, **arguments: Any) -> StepRequest:
        names = {"workflow_id": "flow", "run_id": self.run_id, "step_id": uuid.uuid4().hex[:8], "step_name": "step"}
        paths = {"plan_dir": str(plan_dir or self.folder), "working_dir": str(self.folder)}
        known: dict[str, Any] = {**names, **paths, "attempt": 1, "timeout_s": 60, "grace_s": 0.5}
        params = {"call": f"work:{function}", "arguments": arguments}
        return StepRequest(type="python", params=params, log_dir=str(self.folder / "logs"), **known)

    async def start(self, request: StepRequest, shape: ResourceShape = MODEL) -> RayHandle:
        return await self.dispatch.attach_or_start(request, shape)

    async def run(self, request: StepRequest, shape: ResourceShape = MODEL) -> StepResult:
        return await asyncio.wait_for((await self.start(request, shape)).wait(), 120)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(ray_head: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    bench = Bench(ray_head, tmp_path_factory.mktemp("warm"))
    yield bench
    await bench.dispatch.close()


async def gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_loaded_model_serves_one_step_after_another(bench: Bench) -> None:
    results = await asyncio.gather(*(bench.run(bench.call("ask", question=f"q{number}")) for number in range(3)))
    assert {result.outcome for result in results} == {"succeeded"}, results
    assert [result.outputs["answer"] for result in results] == ["q0", "q1", "q2"]
    assert {(result.outputs["pid"], result.outputs["loads"]) for result in results} == {(results[0].pid, 1)}
    assert len({result.outputs["helper"] for result in results}) == 1
    for result in results:
        await gone(result.outputs["stray"])
    nameless = await bench.run(bench.call("ask", question="q"), ResourceShape(cpus=0.1))
    assert nameless.pid != results[0].pid
    await gone(nameless.outputs["helper"])


async def test_the_next_step_waits_and_a_cancel_leaves_the_model(bench: Bench) -> None:
    first = await bench.run(bench.call("ask", question="a"))
    holder, texts = await bench.start(bench.call("hold")), []
    while holder.progress.last_line != "holds":
        await asyncio.sleep(0.02)
    waiter = await bench.start(bench.call("ask", question="b"))
    waiting = asyncio.ensure_future(waiter.wait(lambda progress: texts.append(progress.text)))
    deadline = time.monotonic() + 60
    while "waiting for the actor `model`, which runs another step" not in texts:
        assert time.monotonic() < deadline, texts
        await asyncio.sleep(0.02)
    await holder.cancel()
    assert (await holder.wait()).outcome == "cancelled"
    second = await asyncio.wait_for(waiting, 120)
    assert second.outputs["answer"] == "b"
    assert second.outputs["helper"] == first.outputs["helper"]


async def test_an_error_keeps_nothing_and_another_plan_has_an_actor_of_its_own(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    result = await bench.run(bench.call("fail", plan_dir=tmp_path))
    assert "division by zero" in result.error
    other = await bench.run(bench.call("ask", plan_dir=tmp_path, question="c"))
    assert (other.pid, other.outputs["loads"]) == (result.pid, 1)
    assert other.pid != (await bench.run(bench.call("ask", question="d"))).pid


async def test_what_is_kept_ends_with_the_actor(bench: Bench) -> None:
    result = await bench.run(bench.call("ask", question="a"))
    os.kill(result.pid, signal.SIGKILL)
    await gone(result.outputs["helper"])
    idle = await bench.run(bench.call("ask", question="b"))
    assert idle.pid != result.pid
    await gone(idle.pid)
    await gone(idle.outputs["helper"])


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("raise", 1), ("exit", 3)])
async def test_a_forked_child_has_no_result(bench: Bench, how: str, code: int) -> None:
    result = await bench.run(bench.call("fork", how=how), ResourceShape(cpus=0.1))
    assert (result.outcome, result.outputs) == ("succeeded", {"from": "parent", "code": code})
