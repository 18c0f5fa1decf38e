"""The Ray driver: a child process of the worker that brings attempts to their results (`python -m cluster.driver`).

    stdin   {"start": {"request": ..., "shape": ...}} | {"cancel": key}
    stdout  {"up": true} | {"down": text, "final": bool} | {"key": key, "progress": ...} | {"key": key, "result": ...}

It never repairs a connection: when the cluster is lost it says so and ends, and the dispatch starts another. All it
knows is in the attempts' folders, so it may be killed at any time. It ends when its stdin does.
"""

import asyncio
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from cluster.connect import ClusterAuthError, ClusterError, answers, connect, connection_lives
from cluster.shape import ResourceShape
from steps import Frozen, Progress, StepRequest, StepResult

LONGEST_LINE = 1 << 24
_WATCH_INTERVAL_S = 1.0


class DriverConfig(Frozen):
    """The only argument of the process, as JSON."""

    address: str
    token_file: str = ""
    idle_ttl_s: float = 60.0


class Driver:
    """Attempts in flight, by key."""

    def __init__(self, config: DriverConfig, output: BinaryIO) -> None:
        self._config = config
        self._output = output
        self._attempts: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(self) -> None:
        """Connect, then do what stdin says until it ends or the cluster is lost."""
        token_file = Path(self._config.token_file) if self._config.token_file else None
        try:
            await connect(self._config.address, token_file)
        except ClusterError as error:
            self.send({"down": str(error), "final": isinstance(error, ClusterAuthError)})
            return
        self.send({"up": True})
        ends: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(self._read_commands()),
            asyncio.ensure_future(self._watch_cluster()),
            self._lost,
        }
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            self.send({"down": self._lost.result(), "final": False})
        for end in done:
            end.result()

    async def _read_commands(self) -> None:
        reader = asyncio.StreamReader(limit=LONGEST_LINE)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command = json.loads(line)
            if "start" in command:
                self._start(
                    StepRequest.model_validate(command["start"]["request"]),
                    ResourceShape.model_validate(command["start"]["shape"]),
                )
            elif command["cancel"] in self._attempts:
                self._attempts[command["cancel"]].cancel()

    def _start(self, request: StepRequest, shape: ResourceShape) -> None:
        from cluster.attempt import Attempt
        from cluster.pool import pool_name

        if request.key in self._attempts:
            return

        def report(progress: Progress) -> None:
            self.send({"key": request.key, "progress": progress.model_dump(mode="json")})

        attempt = Attempt(request, shape, pool_name(), self._config.idle_ttl_s, report)
        self._attempts[request.key] = attempt
        task = asyncio.create_task(self._finish(request, attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, request: StepRequest, attempt: Any) -> None:
        try:
            result = await attempt.run()
        except (ClusterError, ConnectionError) as error:
            if not self._lost.done():
                self._lost.set_result(str(error))
            return
        except Exception as error:
            result = StepResult(outcome="failed", reason="infrastructure", error=f"{type(error).__name__}: {error}")
        finally:
            del self._attempts[request.key]
        self.send({"key": request.key, "result": result.model_dump(mode="json")})

    async def _watch_cluster(self) -> None:
        """End as soon as the head or this machine's node process is gone; Ray itself would wait for a minute."""
        missed = 0
        while missed < 2:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            alive = await asyncio.to_thread(answers, self._config.address) and await asyncio.to_thread(connection_lives)
            missed = 0 if alive else missed + 1
        if not self._lost.done():
            self._lost.set_result(f"the Ray cluster at `{self._config.address}` is gone")

    def send(self, message: dict[str, Any]) -> None:
        """Write one message to the dispatch."""
        self._output.write(json.dumps(message).encode() + b"\n")
        self._output.flush()


async def _main() -> None:
    config = DriverConfig.model_validate_json(sys.argv[1])
    # Ray prints to stdout now and then; our lines must stay alone.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    driver = Driver(config, output)
    try:
        await driver.serve()
    except Exception as error:
        traceback.print_exc()
        driver.send({"down": f"the Ray driver failed: {type(error).__name__}: {error}", "final": False})
    output.close()
    # Ray's own farewell can take seconds and tells the cluster nothing it does not find out.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main())
