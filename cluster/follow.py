"""One actor's part of an attempt as the driver sees it: start it there, pull its logs, learn how it ended.

start -> poll, poll, ... -> result
  | the actor is gone                  -> what it left on its node, else a failure of the infrastructure
  | the node has no such folder (away) -> send the plan's folder, start again; bring the artifacts back at the end
"""

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError

from cluster import remote
from cluster.attempt_folder import (
    Cursor,
    Poll,
    last_line,
    local_cursor,
    progress_fields,
    read_beyond,
    within,
    write_at,
)
from cluster.lease import Place
from cluster.orphans import end_leftovers
from cluster.package import PackageError
from cluster.remote import ActorGone, first_line
from cluster.shipping import ArtifactError, fetch_artifacts, send_folder
from cluster.witness import look_at
from steps import Progress, StepRequest, StepResult
from steps._files import read_result

_WAIT_S = 10.0
"""Longest wait inside one call; an answer comes as soon as there is something new."""
_ANSWER_S = 15.0
"""Time beyond `_WAIT_S` in which a living actor answers."""
_UNAVAILABLE_S = 30.0
"""An actor that cannot be reached for so long is given up and killed."""
_SALVAGE_S = 30.0
_MOST_SENDINGS = 3
"""A copy of a plan's folder may be removed between its coming and the start."""

_NEVER_STARTED = StepResult(outcome="cancelled", reason="cancelled", error="cancelled before it started")


class Follower:
    """Brings the part of an attempt that one actor runs to its end."""

    def __init__(
        self,
        request: StepRequest,
        place: Place,
        folder: Path,
        since: float,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`folder` is where logs are copied to; `since` is when the attempt was sent (Unix time, seconds)."""
        self.place = place
        self.folder = folder
        self.stuck = False
        """The actor is of no further use."""
        self._request = request
        self._since = since
        self._report = report
        self._cursor = Cursor()
        self._shown = Progress()
        self._witness = look_at(Path(request.plan_dir))
        self._content_hash = ""
        self._ending = asyncio.Event()
        self._cancelled = False

    async def run(self) -> StepResult | None:
        """How it ended; None when this actor never began it. Raises `ClusterError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._cursor = local_cursor(self.folder)
        try:
            poll = await self._follow()
        except ActorGone as gone:
            self.stuck = True
            return await self._salvage(str(gone))
        except PackageError as error:
            return StepResult(outcome="failed", reason="files", error=str(error), final=True)
        self.stuck = poll.stuck
        return await self._with_artifacts(poll)

    def end(self, *, cancelled: bool) -> None:
        """End it early; `cancelled` when somebody asked for it, and not when another part of the attempt has failed."""
        self._cancelled = self._cancelled or cancelled
        self._ending.set()

    async def _follow(self) -> Poll:
        """Start or attach, then pull until the attempt has ended. Raises `ActorGone`."""
        actor = await remote.actor_handle(self.place.actor)
        watch = asyncio.ensure_future(self._end_when_told(actor))
        try:
            poll = await self._ask(actor, first=True)
            for _ in range(_MOST_SENDINGS):
                if not poll.away:
                    break
                await self._send_folder(actor)
                if self._ending.is_set():
                    return Poll(result=_NEVER_STARTED)
                poll = await self._ask(actor, first=True)
            while poll.result is None and not poll.busy:
                if not poll.known:
                    raise ActorGone("the actor does not know the attempt any more")
                if poll.away:
                    raise ActorGone("the copy of the plan's folder is gone as soon as it is there")
                poll = await self._ask(actor, first=False)
            return poll
        finally:
            watch.cancel()

    async def _ask(self, actor: Any, *, first: bool) -> Poll:
        """One answer of the actor, copied into the attempt's folder; waits out a short loss of contact."""
        deadline = self._since + self._request.timeout_s + 2 * self._request.grace_s + 2 * _ANSWER_S
        lost_at: float | None = None
        while True:
            if first:
                ref = actor.start.remote(self._request, self._cursor, _WAIT_S, self._witness, self._content_hash)
            else:
                ref = actor.poll.remote(self._request.key, self._cursor, _WAIT_S)
            try:
                poll: Poll = await remote.call(ref, _WAIT_S + _ANSWER_S)
            except TimeoutError:
                self._show(text="the actor does not answer, its step keeps the interpreter busy")
                if time.time() > deadline:
                    await remote.kill(self.place.actor)
                    raise ActorGone(
                        f"the actor did not answer and was killed after {self._request.timeout_s:g} s"
                    ) from None
            except ActorUnavailableError as error:
                lost_at = lost_at or time.monotonic()
                self._show(text="the actor cannot be reached, trying again")
                if time.monotonic() - lost_at > _UNAVAILABLE_S:
                    await remote.kill(self.place.actor)
                    raise ActorGone(first_line(error)) from error
                await asyncio.sleep(0.2)
            except RayError as error:
                await remote.kill(self.place.actor)
                raise ActorGone(first_line(error)) from error
            else:
                self._copy(poll)
                return poll

    async def _send_folder(self, actor: Any) -> None:
        """Raises `ActorGone`, `PackageError`."""
        self._show(text="sending the plan's folder to the node")
        try:
            self._content_hash = await send_folder(actor, self.place, self._request)
        except (RayError, TimeoutError) as error:
            await remote.kill(self.place.actor)
            raise ActorGone(f"it did not take the plan's folder: {first_line(error)}") from error

    async def _with_artifacts(self, poll: Poll) -> StepResult | None:
        """The result, once the files it promises are in the plan's folder beside the worker."""
        result = poll.result
        if result is None or result.outcome != "succeeded" or not poll.copy_dir or not result.artifacts:
            return result
        self._show(text="bringing the artifacts home")
        try:
            await fetch_artifacts(self.place, poll.copy_dir, Path(self._request.plan_dir), result.artifacts)
        except ArtifactError as error:
            lost = {"reason": "artifacts", "error": str(error), "final": True}
        except (OSError, RayError, TimeoutError) as error:
            text = f"the artifacts did not come back from `{result.node}`: {first_line(error)}"
            lost = {"reason": "infrastructure", "error": text}
        else:
            return result
        return result.model_copy(update={"outcome": "failed", "exit_code": None, "outputs": {}, **lost})

    async def _end_when_told(self, actor: Any) -> None:
        await self._ending.wait()
        actor.cancel.remote(self._request.key)
        await asyncio.sleep(2 * self._request.grace_s + _ANSWER_S)
        await remote.kill(self.place.actor)

    async def _salvage(self, how: str) -> StepResult | None:
        """What became of an attempt whose actor is dead. None when it was never begun and may be started elsewhere."""
        error = f"the Ray actor of the step is gone: {how}"
        try:
            poll = await self._read_remains()
        except (RayError, TimeoutError) as lost:
            error = f"{error}; its node does not answer: {first_line(lost)}"
        else:
            # Another worker's driver may have fetched and released it in this moment.
            if poll.result is not None:
                return await self._with_artifacts(poll)
            if known := read_result(self.folder):
                return known
            if poll.begun is False and not self._shown.pid and not any(self._cursor.offsets):
                return None
        if self._cancelled:
            return StepResult(outcome="cancelled", reason="cancelled", error="cancelled; its actor had to be killed")
        if time.time() > self._since + self._request.timeout_s + self._request.grace_s:
            return StepResult(
                outcome="timed_out", reason="timeout", error=f"not done after {self._request.timeout_s:g} s"
            )
        return StepResult(
            outcome="failed", reason="infrastructure", error=error, started_at=self._since,
            duration_s=time.time() - self._since, node=self._shown.node, pid=self._shown.pid,
        )  # fmt: skip

    async def _read_remains(self) -> Poll:
        """Copy the rest of the logs from the actor's node; the last answer. Raises Ray's errors for a dead node."""
        await remote.check_alive(self.place.node_id)
        folder = str(within(Path(self.place.folder), self._request.key))
        arguments = self._request.step_key, self._request.attempt
        while True:
            looked = remote.on_node(_look, self.place.node_id, folder, self._cursor, *arguments)
            poll: Poll = await remote.call(looked, _SALVAGE_S)
            before, self._cursor = self._cursor, write_at(self.folder, self._cursor, poll)
            if poll.result is not None or self._cursor.offsets == before.offsets:
                remote.on_node(_remove, self.place.node_id, folder)
                return poll

    def _copy(self, poll: Poll) -> None:
        self._cursor = write_at(self.folder, self._cursor, poll)
        text, fraction = progress_fields(poll.progress)
        line = last_line(poll.chunks[0]) or last_line(poll.chunks[1]) or self._shown.last_line
        if poll.result is None and poll.known and not poll.busy and not poll.away:
            self._show(text=text, fraction=fraction, node=poll.node, pid=poll.pid, last_line=line)

    def _show(self, **fields: Any) -> None:
        shown = self._shown.model_copy(update=fields)
        if shown != self._shown:
            self._shown = shown
            self._report(shown)


def _look(folder: str, cursor: Cursor, step_key: str, attempt: int) -> Poll:
    """On the node: end what the attempt left running, then read what it left in its folder."""
    end_leftovers(step_key, attempt)
    return read_beyond(Path(folder), cursor, ended=True)


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
