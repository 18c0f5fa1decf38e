"""Where a step runs: the two-verb protocol of `activities`, and the dispatch for steps that need no Ray node.

`attach_or_start` finds the attempt's folder by its key: a result is taken, a living process is awaited, a dead one
without a result is an `infrastructure` failure, and only an attempt nobody has claimed is started.
"""

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from steps import Progress, StepError, StepRequest, StepResult
from steps._files import (
    CANCEL,
    HOST,
    PROGRESS,
    REQUEST,
    RESULT,
    attempt_dir,
    read_json,
    read_result,
    write_once,
    write_whole,
)
from steps._logs import tail
from steps._process import is_alive, kill_leftovers
from steps._spawn import Adopted, Child, Spawner

PROGRESS_INTERVAL_S = 0.5
_MOST_STARTS = 3
"""How often an attempt that nobody has claimed is started; the claim keeps it from running twice."""


class Handle(Protocol):
    """A step that was started or found again."""

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        """Wait for the end; `on_progress` is called at least every second while the step runs."""

    async def cancel(self) -> StepResult:
        """End the step and everything it started; how it ended."""


class Dispatch(Protocol):
    """A place where steps run."""

    async def attach_or_start(self, request: StepRequest) -> Handle:
        """The running or ended attempt with this key, or a new one. Never a second run of the same key."""


class WrongNode(Exception):
    """The attempt runs on another machine; only a worker there can see it."""


class LocalDispatch:
    """Runs steps beside the worker, each in a session that outlives it and runs nothing else meanwhile."""

    def __init__(self) -> None:
        self._spawner = Spawner()
        self._node = socket.gethostname()

    def start(self) -> None:
        """Make the first step quick: start the spawner before it is needed."""
        self._spawner.start()

    def close(self) -> None:
        """Let go; running steps stay."""
        self._spawner.close()

    async def attach_or_start(self, request: StepRequest) -> "LocalHandle":
        """See `Dispatch`. Raises `WrongNode` for an attempt that another machine has claimed.

        Raises `StepError` when the attempt's folder belongs to another step, whose id gives the same file name.
        """
        folder = attempt_dir(request)
        host = read_json(folder / HOST)
        if host is None:
            if read_result(folder) is not None:
                return LocalHandle(request, folder, self._spawner, None)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / REQUEST, request.model_dump_json(), mode=0o600)
            return LocalHandle(request, folder, self._spawner, await self._spawner.spawn(folder / REQUEST))
        if host["key"] != request.key:
            raise StepError(
                f"`{folder}` belongs to `{host['key']}`, wanted it for `{request.key}`\n\nhint: rename one of the steps"
            )
        if host["node"] != self._node and read_result(folder) is None:
            raise WrongNode(f"step `{request.step_id}` runs on `{host['node']}`, this worker is on `{self._node}`")
        return LocalHandle(request, folder, self._spawner, self._spawner.find(folder / REQUEST) or _adopt(host))


class LocalHandle:
    """One attempt in its own process on this machine."""

    def __init__(self, request: StepRequest, folder: Path, spawner: Spawner, child: Child | None) -> None:
        self._request = request
        self._folder = folder
        self._spawner = spawner
        self._child = child
        self._starts_left = _MOST_STARTS - 1

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        """Wait for the end of the attempt and take its result."""
        while True:
            await self._wait_for_child(on_progress)
            if (result := read_result(self._folder)) is not None:
                return result
            host = read_json(self._folder / HOST)
            if host is not None:
                # A process that lost the race for the claim ends at once; the one that won it may still run.
                self._child = _adopt(host)
                if self._child is None:
                    return read_result(self._folder) or await self._lost("the process that ran the step was killed")
            elif self._starts_left:
                self._starts_left -= 1
                self._child = await self._spawner.spawn(self._folder / REQUEST)
            else:
                return await self._lost(f"no process could start the step in {_MOST_STARTS} tries")

    async def cancel(self) -> StepResult:
        """SIGTERM to the host, which ends the tree within the grace period; by force when it does not."""
        if (result := read_result(self._folder)) is not None:
            return result
        if self._claim_unstarted():
            return self._conclude("cancelled", "cancelled", "cancelled before it started")
        child = _adopt(read_json(self._folder / HOST))
        if child is not None:
            (self._folder / CANCEL).touch()
            if (result := read_result(self._folder)) is not None:
                child.close()
                return result
            # The result is not there, so the process will find the marker and run no other attempt: neither this signal
            # nor SIGKILL later can meet one. See Host.left_no_trace.
            child.signal(signal.SIGTERM)
            # Graces for callbacks, children, children born since, and its own code: see Host._end_early.
            limit_s = 4 * max(self._request.grace_s, 0.5) + 3
            try:
                async with asyncio.timeout(limit_s):
                    await child.wait()
            except TimeoutError:
                child.signal(signal.SIGKILL)
            finally:
                child.close()
        if (result := read_result(self._folder)) is not None:
            return result
        await self._kill_leftovers()
        return self._conclude("cancelled", "cancelled", "cancelled")

    async def _wait_for_child(self, on_progress: Callable[[Progress], None]) -> None:
        """Until the child has ended. What a killed host has forked may hold its pipe open: so look for the host too."""
        if self._child is None:
            return
        try:
            # The process may live on with another attempt, so its end is not all there is to look for.
            while not (self._folder / RESULT).exists():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PROGRESS_INTERVAL_S):
                        return await self._child.wait()
                on_progress(read_progress(self._folder))
                host = read_json(self._folder / HOST)
                if host is not None and not is_alive(host):
                    return
        finally:
            if isinstance(self._child, Adopted):
                self._child.close()

    def _claim_unstarted(self) -> bool:
        """Take the claim that a process on its way has not taken yet, so that it never runs the step."""
        nobody = {"pid": 0, "start_ticks": 0, "boot_id": "", "isolated": True, "started_at": time.time()}
        claim = json.dumps({**nobody, "key": self._request.key, "node": socket.gethostname()})
        return write_once(self._folder / HOST, claim)

    async def _lost(self, error: str) -> StepResult:
        """What a killed process has left behind ends with it, whether or not another attempt follows."""
        await self._kill_leftovers()
        return self._conclude("failed", "infrastructure", error)

    async def _kill_leftovers(self) -> None:
        before = self._request.attempt + 1
        await asyncio.to_thread(kill_leftovers, self._request.step_key, before_attempt=before)

    def _conclude(self, outcome: Any, reason: str, error: str) -> StepResult:
        """Write the result that the host could not; whoever asks later gets the same."""
        host = read_json(self._folder / HOST) or {}
        started_at = host.get("started_at", time.time())
        result = StepResult(
            outcome=outcome,
            reason=reason,
            error=error,
            started_at=started_at,
            duration_s=max(0.0, time.time() - started_at),
            node=host.get("node", socket.gethostname()),
            pid=host.get("pid", 0),
            attempt_dir=str(self._folder),
        )
        if write_once(self._folder / RESULT, result.model_dump_json()):
            return result
        return read_result(self._folder) or result


def read_progress(folder: Path) -> Progress:
    """What the attempt in `folder` last said, from its files."""
    with contextlib.suppress(json.JSONDecodeError):
        value = read_json(folder / PROGRESS) or {}
    host = read_json(folder / HOST) or {}
    newest = max((folder / f"{stream}.log" for stream in ("stdout", "stderr")), key=_modified_at)
    lines = tail(newest, 400)[0].replace("\r", "\n").strip().splitlines()
    return Progress(
        text=str(value.get("text", "")),
        fraction=value.get("fraction"),
        node=host.get("node", ""),
        pid=host.get("pid", 0),
        last_line=lines[-1][-200:] if lines else "",
    )


def _modified_at(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _adopt(host: Mapping[str, Any] | None) -> Adopted | None:
    """Watch the process that claimed the attempt, None when it is gone."""
    if host is not None and host["pid"]:
        with contextlib.suppress(ProcessLookupError):
            return Adopted(host)
    return None
