"""The floor: what a hand-written workflow costs on the same Temporal server with the same flags.

With `--work true` the activity starts the program `true`, otherwise it does nothing. Server, worker and client are
three processes, as they are in ours.
"""

import asyncio
import importlib.metadata
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

TASK_QUEUE = "floor"
MAX_IN_FLIGHT = 500
LIMIT_S = 120


@activity.defn
async def nothing() -> None:
    """Return at once."""


@activity.defn(name="true")
async def start_true() -> None:
    """Start a process and wait for its end."""
    process = await asyncio.create_subprocess_exec("true")
    if await process.wait() != 0:
        raise RuntimeError("`true` failed")


@workflow.defn(sandboxed=False)
class Shape:
    """A chain or a fan of the same activity."""

    @workflow.run
    async def run(self, work: str, shape: str, count: int) -> None:
        if shape == "chain":
            for _ in range(count):
                await self._step(work)
            return
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def limited() -> None:
            async with room:
                await self._step(work)

        await asyncio.gather(*(limited() for _ in range(count)))

    async def _step(self, work: str) -> None:
        await workflow.execute_activity(work, start_to_close_timeout=timedelta(seconds=LIMIT_S))


async def connect(address: str) -> Client:
    """A client of the server at `address`, which may still be starting."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            client = await Client.connect(address)
            await client.count_workflows()
            return client
        except (RPCError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)


async def work_for(address: str) -> None:
    """The worker process."""
    worker = Worker(
        await connect(address),
        task_queue=TASK_QUEUE,
        workflows=[Shape],
        activities=[nothing, start_true],
        max_concurrent_activities=MAX_IN_FLIGHT,
    )
    await worker.run()


async def run_shape(client: Client, work: str, shape: str, count: int) -> float:
    started = time.perf_counter()
    await client.execute_workflow(Shape.run, args=[work, shape, count], id=str(uuid.uuid4()), task_queue=TASK_QUEUE)
    return time.perf_counter() - started


@contextmanager
def opened(folder: Path) -> Iterator[object]:
    """A server on disk and a worker; yields the function that measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    server = [
        str(Path(sys.executable).with_name("temporal")),
        *("server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(port), "--log-level", "never"),
        *("--db-filename", str(folder / "temporal.db")),
        *("--dynamic-config-value", "history.transferProcessorMaxPollRPS=2000"),
        *("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"),
    ]
    processes = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in (server, [*_self(), "--worker", address])
    ]
    work = "true" if "true" in sys.argv else "nothing"
    loop = asyncio.new_event_loop()
    try:
        client = loop.run_until_complete(connect(address))
        yield (
            lambda shape, count: (
                None if shape == "cached" else loop.run_until_complete(run_shape(client, work, shape, count))
            )
        )
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        loop.close()


def _self() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve())]


if __name__ == "__main__":
    if "--worker" in sys.argv:
        asyncio.run(work_for(sys.argv[-1]))
    else:
        from runner import serve

        serve(importlib.metadata.version("temporalio"), opened)  # type: ignore[arg-type]
