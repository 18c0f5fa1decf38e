"""The bridge as a library: the plugin in a worker of its own, on the local services."""

import asyncio
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from temporalio import workflow
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from bridge import services
    from bridge.plugin import RayCall, RayPlugin, ResourceShape, run_on_ray
    from bridge.state import State

pytestmark = [pytest.mark.temporal, pytest.mark.ray]

PATIENCE_S = 120.0
FUNCTIONS = """
import os, subprocess, time

def trace(name):
    with open(f"{name}.started", "a") as file:
        file.write(f"{os.getpid()}\\n")

def count(name):
    trace(name)
    for number in range(20):
        print(f"line {number}", flush=True)
        time.sleep(0.2)
    return {"pid": os.getpid()}

def fail(name):
    trace(name)
    raise KeyError("no such thing")

def wait(name):
    child = subprocess.Popen(["sleep", "1000"])
    with open(f"{name}.child", "w") as file:
        file.write(str(child.pid))
    while True:
        time.sleep(0.1)
"""


@workflow.defn
class OneCall:
    """Calls one function on Ray."""

    @workflow.run
    async def run(self, function: str, name: str, folder: str, limit_s: float) -> dict[str, Any]:
        return await workflow.execute_activity(
            run_on_ray,
            RayCall(
                function=f"functions:{function}",
                arguments={"name": name},
                resources=ResourceShape(cpus=0.5),
                plan_dir=folder,
                grace_s=1,
            ),
            start_to_close_timeout=timedelta(seconds=limit_s),
            heartbeat_timeout=timedelta(seconds=2),
            retry_policy=RetryPolicy(maximum_attempts=3, initial_interval=timedelta(milliseconds=100)),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


async def connected(state: State, log_dir: Path) -> Client:
    address = (await asyncio.to_thread(services.ensure, state)).address
    return await Client.connect(address, plugins=[RayPlugin(log_dir=log_dir, state=state)])


@asynccontextmanager
async def worker_process(state: State, log_dir: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """This file as a worker in a process of its own; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, str(log_dir), env={**os.environ, "ORCHESTRATE_HOME": str(state.dir)}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def serve(log_dir: Path) -> None:
    client = await connected(State.from_environment(), log_dir)
    async with Worker(client, task_queue="calls", workflows=[OneCall]):
        await asyncio.sleep(PATIENCE_S)


async def until(what: str, holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for: {what}"
        await asyncio.sleep(0.05)


async def test_calls_of_another_workflow(local_state: State, tmp_path: Path) -> None:
    """One after the other on one Ray: found again, counted by Temporal's policy, cancelled, ended at its limit."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    client = await connected(local_state, tmp_path / "calls")

    async def start(function: str, name: str, limit_s: float = 60) -> Any:
        arguments = [function, name, str(tmp_path), limit_s]
        return await client.start_workflow(OneCall.run, args=arguments, id=uuid.uuid4().hex, task_queue="calls")

    async with worker_process(local_state, tmp_path / "calls") as first:
        found_again = await start("count", "a")
        await until("the function runs", (tmp_path / "a.started").exists)
        first.kill()
        await first.wait()
    async with worker_process(local_state, tmp_path / "calls"):
        pid = (await found_again.result())["pid"]
        assert (tmp_path / "a.started").read_text() == f"{pid}\n"
        (log,) = (tmp_path / "calls" / found_again.id).rglob("stdout.log")
        assert log.read_text() == "".join(f"line {number}\n" for number in range(20))

        with pytest.raises(WorkflowFailureError) as failure:
            await (await start("fail", "b")).result()
        assert isinstance(failure.value.cause, ActivityError)
        assert isinstance(failure.value.cause.cause, ApplicationError)
        assert "no such thing" in str(failure.value.cause.cause)
        assert (tmp_path / "b.started").read_text().count("\n") == 3

        for name, limit_s in (("c", 60.0), ("d", 2.0)):
            waiting = await start("wait", name, limit_s)
            child_file = tmp_path / f"{name}.child"
            await until("the child runs", lambda path=child_file: path.exists() and path.read_text())
            child = int(child_file.read_text())
            await waiting.cancel() if name == "c" else None
            with pytest.raises(WorkflowFailureError) as failure:
                await waiting.result()
            if name == "c":
                cause = failure.value.cause
                assert isinstance(cause.cause if isinstance(cause, ActivityError) else cause, CancelledError)
            await until("the child is gone", lambda pid=child: not psutil.pid_exists(pid))


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
