"""RayDispatch: the worker's end of the Ray side. It keeps one driver process and sends it attempts by key.

The driver is a process of its own because Ray ends a driver whose cluster is gone for a minute. When it ends, whatever
the cause, the next one gets all attempts in flight again and finds them by their keys. Imports no Ray.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

from cluster.driver import LONGEST_LINE, DriverConfig
from cluster.shape import ResourceShape
from steps import Frozen, Progress, StepRequest, StepResult

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 3.0
_EXIT_S = 2.0
_STABLE_S = 5.0
"""A driver that lived for so long counts as a cluster that was there."""


class RayLocation(Frozen):
    """Where the Ray cluster is."""

    address: str
    """`host:port` of the head's control service."""
    token_file: str = ""
    """File with the cluster's token; empty for a cluster without one."""


class ClusterUnusable(Exception):
    """There will be no cluster, however long one waits."""


Locate = Callable[[], Awaitable[RayLocation]]
"""Finds, or starts, the cluster; asked again for every driver, so a head that comes back elsewhere is found.

Raises `ClusterUnusable` when trying again is useless; after any other error it is asked again.
"""


class RayHandle:
    """One attempt on Ray."""

    def __init__(self, dispatch: "RayDispatch", request: StepRequest, shape: ResourceShape) -> None:
        self.request = request
        self.shape = shape
        self.result: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self.progress = Progress()
        self.cancelling = False
        self._dispatch = dispatch
        self._listeners: list[Callable[[Progress], None]] = []

    async def wait(self, on_progress: Callable[[Progress], None] = lambda progress: None) -> StepResult:
        """The result. `on_progress` is called with what the step does or waits for, whenever that changes."""
        self._listeners.append(on_progress)
        try:
            if self.progress != Progress():
                on_progress(self.progress)
            return await asyncio.shield(self.result)
        finally:
            self._listeners.remove(on_progress)

    async def cancel(self) -> None:
        """Ask the attempt to end within its grace period; `wait` then gives the outcome `cancelled`."""
        self.cancelling = True
        self._dispatch.send_cancel(self.request.key)

    def show(self, progress: Progress) -> None:
        """Tell the listeners."""
        self.progress = progress
        for listener in self._listeners:
            listener(progress)


class RayDispatch:
    """Runs step attempts on a Ray cluster; survives the cluster's death and its own driver's. Close it at the end."""

    def __init__(
        self, locate: Locate, *, patience_s: float = 60.0, idle_ttl_s: float = 60.0, driver_log: Path | None = None
    ) -> None:
        """`patience_s`: how long attempts wait for a cluster that cannot be reached before they fail.

        `idle_ttl_s`: how long an idle warm actor is kept. `driver_log`: where Ray's own messages go, by default stderr.
        """
        self._locate = locate
        self._patience_s = patience_s
        self._idle_ttl_s = idle_ttl_s
        self._driver_log = driver_log
        self._handles: dict[str, RayHandle] = {}
        self._driver: asyncio.subprocess.Process | None = None
        self._is_up = False
        self._keeper: asyncio.Task[None] | None = None

    async def attach_or_start(self, request: StepRequest, resources: ResourceShape) -> RayHandle:
        """The attempt of `request.key`: found where it runs or has ended, else started."""
        handle = self._handles.get(request.key)
        if handle is None:
            handle = RayHandle(self, request, resources)
            self._handles[request.key] = handle
            self._send_start(handle)
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep_driver())
        return handle

    async def close(self) -> None:
        """End the driver. Steps go on; another dispatch finds them."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._end_driver()

    def send_cancel(self, key: str) -> None:
        """Pass a cancel on; one that finds no driver is sent to the next."""
        self._send({"cancel": key})

    async def _keep_driver(self) -> None:
        """Keep a driver running while there are attempts; fail them when there is no cluster for too long."""
        pause_s, lost_at = _FIRST_PAUSE_S, time.monotonic()
        while True:
            started_at = time.monotonic()
            was_up, reason, is_final = await self._run_driver()
            if was_up and time.monotonic() - started_at > _STABLE_S:
                pause_s, lost_at = _FIRST_PAUSE_S, time.monotonic()
            if not self._handles:
                return
            if is_final or time.monotonic() - lost_at > self._patience_s:
                self._fail_all(reason, final=is_final)
                return
            for handle in list(self._handles.values()):
                handle.show(
                    handle.progress.model_copy(update={"text": f"waiting for the Ray cluster: {_line(reason)}"})
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _run_driver(self) -> tuple[bool, str, bool]:
        """One life of a driver: whether it was connected, why it ended, whether trying again is useless."""
        reason, was_up, is_final = "the Ray driver ended unexpectedly", False, False
        try:
            location = await self._locate()
            driver = await self._spawn(DriverConfig(**location.model_dump(), idle_ttl_s=self._idle_ttl_s))
            assert driver.stdout is not None
            while line := await driver.stdout.readline():
                message = json.loads(line)
                if "up" in message:
                    was_up = self._is_up = True
                    self._send_all()
                elif "down" in message:
                    reason, is_final = message["down"], message["final"]
                else:
                    self._receive(message)
        except ClusterUnusable as error:
            reason, is_final = str(error), True
        except Exception as error:
            # A full disk, too many processes, whatever: unnoticed, it would leave the attempts waiting for ever.
            reason, is_final = f"{type(error).__name__}: {error}", False
        finally:
            self._is_up = False
            await self._end_driver()
        return was_up, reason, is_final

    async def _spawn(self, config: DriverConfig) -> asyncio.subprocess.Process:
        log: IO[bytes] | None = self._driver_log.open("ab") if self._driver_log else None
        try:
            self._driver = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "cluster.driver", config.model_dump_json(),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONPATH": _import_path()}, limit=LONGEST_LINE, start_new_session=True,
            )  # fmt: skip
        finally:
            if log is not None:
                log.close()
        return self._driver

    def _receive(self, message: dict[str, Any]) -> None:
        handle = self._handles.get(message["key"])
        if handle is None:
            return
        if "progress" in message:
            handle.show(Progress.model_validate(message["progress"]))
        else:
            result = StepResult.model_validate(message["result"])
            del self._handles[message["key"]]
            handle.result.set_result(result)

    def _send_all(self) -> None:
        for handle in self._handles.values():
            self._send_start(handle)
            if handle.cancelling:
                self._send({"cancel": handle.request.key})

    def _send_start(self, handle: RayHandle) -> None:
        request, shape = handle.request.model_dump(mode="json"), handle.shape.model_dump(mode="json")
        self._send({"start": {"request": request, "shape": shape}})

    def _send(self, message: dict[str, Any]) -> None:
        if self._is_up and self._driver is not None and self._driver.stdin is not None:
            # A driver that has just died is noticed by its stdout; the next one is told everything again.
            with contextlib.suppress(OSError, RuntimeError):
                self._driver.stdin.write(json.dumps(message).encode() + b"\n")

    def _fail_all(self, reason: str, *, final: bool) -> None:
        for key, handle in list(self._handles.items()):
            del self._handles[key]
            handle.result.set_result(StepResult(outcome="failed", reason="infrastructure", error=reason, final=final))

    async def _end_driver(self) -> None:
        driver, self._driver = self._driver, None
        if driver is None:
            return
        if driver.stdin is not None:
            driver.stdin.close()
        try:
            await asyncio.wait_for(driver.wait(), _EXIT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            await driver.wait()


def _import_path() -> str:
    """This process's import path, so that the driver finds the same code."""
    own = str(Path(__file__).parent.parent)
    return os.pathsep.join([own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def _line(text: str) -> str:
    return text.partition("\n")[0]
