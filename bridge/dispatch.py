"""Where a step runs: the two-verb protocol of `activities`, and the dispatch for steps that need no Ray node.

`attach_or_start` finds the attempt's folder by its key: a result is taken, a living process is awaited, a dead one
without a result is an `infrastructure` failure, and only an attempt nobody has claimed is started.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from steps import Progress, StepRequest, StepResult
from steps._files import HOST, PROGRESS, REQUEST, RESULT, attempt_dir, read_json, read_result, write_whole
from steps._logs import tail
from steps._process import is_same_process, kill_leftovers
from steps._spawn import Adopted, Child, Spawner

PROGRESS_INTERVAL_S = 0.5


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
    """Runs steps beside the worker, each in a session of its own that outlives it."""

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
        """See `Dispatch`. Raises `WrongNode` for an attempt that another machine has claimed."""
        folder = attempt_dir(request)
        host = read_json(folder / HOST)
        if host is None and read_result(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / REQUEST, request.model_dump_json(), mode=0o600)
            return LocalHandle(request, folder, self._spawner.spawn(folder / REQUEST))
        if host is not None and host["node"] != self._node and read_result(folder) is None:
            raise WrongNode(f"step `{request.step_id}` runs on `{host['node']}`, this worker is on `{self._node}`")
        return LocalHandle(request, folder, _adopt(host))


class LocalHandle:
    """One attempt in its own process on this machine."""

    def __init__(self, request: StepRequest, folder: Path, child: Child | None) -> None:
        self._request = request
        self._folder = folder
        self._child = child

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        """Wait for the process to end and take its result."""
        while self._child is not None:
            try:
                await asyncio.wait_for(self._child.wait(), PROGRESS_INTERVAL_S)
            except TimeoutError:
                on_progress(read_progress(self._folder))
                continue
            except asyncio.CancelledError:
                self._child.close()
                raise
            # A process that lost the race for the claim ends at once; the one that won it may still run.
            self._child = _adopt(read_json(self._folder / HOST))
        return read_result(self._folder) or self._lost()

    async def cancel(self) -> StepResult:
        """SIGTERM to the host, which ends the tree within the grace period; by force when it does not."""
        host = read_json(self._folder / HOST)
        if host is not None and is_same_process(host["pid"], host["created_at"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(host["pid"], signal.SIGTERM)
            child = _adopt(host)
            if child is not None:
                # One grace for the step's children, one for its own code: see Host._watch.
                limit_s = 2 * max(self._request.grace_s, 0.5) + 3
                try:
                    await asyncio.wait_for(child.wait(), limit_s)
                except TimeoutError:
                    child.close()
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(host["pid"], signal.SIGKILL)
                    await asyncio.to_thread(kill_leftovers, self._request.step_key)
        return read_result(self._folder) or self._conclude("cancelled", "cancelled", "cancelled")

    def _lost(self) -> StepResult:
        return self._conclude("failed", "infrastructure", "the process that ran the step was killed")

    def _conclude(self, outcome: Any, reason: str, error: str) -> StepResult:
        """Write the result that the host could not; whoever asks later gets the same."""
        host = read_json(self._folder / HOST) or {}
        started_at = host.get("created_at", time.time())
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
        write_whole(self._folder / RESULT, result.model_dump_json())
        return result


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


def _adopt(host: dict[str, Any] | None) -> Child | None:
    """Watch the process that claimed the attempt, None when it is gone."""
    if host is None or not is_same_process(host["pid"], host["created_at"]):
        return None
    with contextlib.suppress(ProcessLookupError):
        return Adopted(host["pid"])
    return None
