"""One attempt as the driver sees it: lease, start, pull logs, and find out what happened when something dies.

`dispatched.json` in the attempt's folder is written before the actor is told to start. From then on the attempt is only
ever looked for, never started a second time; except when the actor's folder shows that it was never begun.
"""

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    RayActorError,
    RayError,
    RaySystemError,
    RpcError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
from cluster.connect import NAMESPACE, ClusterError
from cluster.orphans import end_leftovers
from cluster.pool import Lease, open_pool
from cluster.shape import ResourceShape
from steps import Frozen, Progress, StepRequest, StepResult
from steps._files import RESULT, attempt_dir, read_json, read_result, write_whole

DISPATCHED = "dispatched.json"
_WAIT_S = 10.0
"""Longest wait inside one call; an answer comes as soon as there is something new."""
_ANSWER_S = 15.0
"""Time beyond `_WAIT_S` in which a living actor answers."""
_UNAVAILABLE_S = 30.0
"""An actor that cannot be reached for so long is given up and killed."""
_SALVAGE_S = 30.0
_MOST_ACTORS = 20
"""Actors that may refuse or lose an attempt before they begin it."""


class Dispatched(Frozen):
    """Where an attempt was sent: the content of `dispatched.json`."""

    key: str
    actor: str
    node_id: str
    folder: str
    """The actor's folder on its node."""
    pool: str
    at: float
    """Unix time, seconds."""


class ActorGone(Exception):
    """The actor of the attempt is dead; the argument says how."""


class Attempt:
    """Brings one attempt to its result. `run` is called once per driver, `cancel` at any time."""

    def __init__(
        self,
        request: StepRequest,
        shape: ResourceShape,
        pool: str,
        idle_ttl_s: float,
        report: Callable[[Progress], None],
    ) -> None:
        self._request = request
        self._shape = shape
        self._pool_name = pool
        self._idle_ttl_s = idle_ttl_s
        self._report = report
        self._folder = attempt_dir(request)
        self._cursor = Cursor()
        self._shown = Progress()
        self._cancelled = asyncio.Event()

    async def run(self) -> StepResult:
        """The result, from this run of the attempt or from an earlier driver's. Raises `ClusterError`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        dispatched = _read_dispatched(self._folder)
        if result := read_result(self._folder):
            return result
        self._cursor = local_cursor(self._folder)
        for _ in range(_MOST_ACTORS):
            if dispatched is None:
                lease = await self._lease()
                if isinstance(lease, StepResult):
                    return self._keep(lease)
                dispatched = self._mark(lease)
            result, discard = await self._bring_home(dispatched)
            if result is not None:
                result = self._keep(result)
            await self._release(dispatched, discard=discard)
            if result is not None:
                return result
            dispatched = None
        error = f"{_MOST_ACTORS} actors in a row did not begin the step"
        return self._keep(StepResult(outcome="failed", reason="infrastructure", error=error))

    async def _bring_home(self, dispatched: Dispatched) -> tuple[StepResult | None, bool]:
        """The result, None when this actor never began the attempt; and whether the actor is of no further use."""
        try:
            poll = await self._follow(dispatched)
        except ActorGone as gone:
            return await self._salvage(dispatched, str(gone)), True
        return poll.result, poll.stuck

    def cancel(self) -> None:
        """End the attempt: outcome `cancelled`."""
        self._cancelled.set()

    async def _lease(self) -> Lease | StepResult:
        """An actor, or the result when there will be none."""
        key, wait_s = self._request.key, 0.3
        while not self._cancelled.is_set():
            call = asyncio.ensure_future(self._ask_pool(wait_s))
            lease: Lease | None = await self._unless_cancelled(call)
            if lease is None:
                break
            if lease.state == "leased":
                return lease
            if lease.state == "infeasible":
                return StepResult(outcome="failed", reason="infeasible", error=lease.text, final=True)
            if lease.state == "failed":
                return StepResult(outcome="failed", reason="infrastructure", error=lease.text)
            self._show(text=lease.text)
            wait_s = 2.0
        pool = await _pool(self._pool_name, self._idle_ttl_s)
        pool.release.remote(key, False)
        return StepResult(outcome="cancelled", reason="cancelled", error="cancelled before it started")

    async def _ask_pool(self, wait_s: float) -> Lease:
        for attempts_left in (2, 1, 0):
            pool = await _pool(self._pool_name, self._idle_ttl_s)
            try:
                lease: Lease = await _call(
                    pool.lease.remote(self._request.key, self._shape, wait_s), wait_s + _ANSWER_S
                )
                return lease
            except (RayActorError, TimeoutError):
                _pools.pop(self._pool_name, None)
                if not attempts_left:
                    raise
        raise AssertionError

    async def _unless_cancelled(self, work: "asyncio.Future[Any]") -> Any:
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        await asyncio.wait({work, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        cancelled.cancel()
        if work.done():
            return work.result()
        work.cancel()
        return None

    def _mark(self, lease: Lease) -> Dispatched:
        dispatched = Dispatched(
            key=self._request.key,
            actor=lease.actor,
            node_id=lease.node_id,
            folder=lease.folder,
            pool=self._pool_name,
            at=time.time(),
        )
        write_whole(self._folder / DISPATCHED, dispatched.model_dump_json())
        return dispatched

    async def _follow(self, dispatched: Dispatched) -> Poll:
        """Start or attach, then pull until the attempt has ended. Raises `ActorGone`."""
        actor = await _actor(dispatched.actor)
        watch = asyncio.ensure_future(self._end_when_cancelled(actor, dispatched))
        try:
            poll = await self._ask(actor, dispatched, first=True)
            while poll.result is None and not poll.busy:
                if not poll.known:
                    raise ActorGone("the actor does not know the attempt any more")
                poll = await self._ask(actor, dispatched, first=False)
            return poll
        finally:
            watch.cancel()

    async def _ask(self, actor: Any, dispatched: Dispatched, *, first: bool) -> Poll:
        """One answer of the actor, copied into the attempt's folder; waits out a short loss of contact."""
        deadline = dispatched.at + self._request.timeout_s + 2 * self._request.grace_s + 2 * _ANSWER_S
        lost_at: float | None = None
        while True:
            if first:
                ref = actor.start.remote(self._request, self._cursor, _WAIT_S)
            else:
                ref = actor.poll.remote(self._request.key, self._cursor, _WAIT_S)
            try:
                poll: Poll = await _call(ref, _WAIT_S + _ANSWER_S)
            except TimeoutError:
                self._show(text="the actor does not answer, its step keeps the interpreter busy")
                if time.time() > deadline:
                    await _kill(actor, dispatched)
                    raise ActorGone(
                        f"the actor did not answer and was killed after {self._request.timeout_s:g} s"
                    ) from None
            except ActorUnavailableError as error:
                lost_at = lost_at or time.monotonic()
                self._show(text="the actor cannot be reached, trying again")
                if time.monotonic() - lost_at > _UNAVAILABLE_S:
                    await _kill(actor, dispatched)
                    raise ActorGone(_first_line(error)) from error
                await asyncio.sleep(0.2)
            except RayError as error:
                await _kill(actor, dispatched)
                raise ActorGone(_first_line(error)) from error
            else:
                self._copy(poll)
                return poll

    async def _end_when_cancelled(self, actor: Any, dispatched: Dispatched) -> None:
        await self._cancelled.wait()
        actor.cancel.remote(self._request.key)
        await asyncio.sleep(2 * self._request.grace_s + _ANSWER_S)
        await _kill(actor, dispatched)

    async def _salvage(self, dispatched: Dispatched, how: str) -> StepResult | None:
        """What became of an attempt whose actor is dead. None when it was never begun and may be started elsewhere."""
        error = f"the Ray actor of the step is gone: {how}"
        try:
            poll = await self._read_remains(dispatched)
        except (RayError, TimeoutError) as lost:
            error = f"{error}; its node does not answer: {_first_line(lost)}"
        else:
            # Another worker's driver may have fetched and released it in this moment.
            if known := poll.result or read_result(self._folder):
                return known
            if poll.begun is False and not self._shown.pid and not any(self._cursor.offsets):
                return None
        if self._cancelled.is_set():
            return StepResult(outcome="cancelled", reason="cancelled", error="cancelled; its actor had to be killed")
        if time.time() > dispatched.at + self._request.timeout_s + self._request.grace_s:
            return StepResult(
                outcome="timed_out", reason="timeout", error=f"not done after {self._request.timeout_s:g} s"
            )
        return StepResult(
            outcome="failed", reason="infrastructure", error=error, started_at=dispatched.at,
            duration_s=time.time() - dispatched.at, node=self._shown.node, pid=self._shown.pid,
        )  # fmt: skip

    async def _read_remains(self, dispatched: Dispatched) -> Poll:
        """Copy the rest of the logs from the actor's node; the last answer. Raises Ray's errors for a dead node."""
        nodes = await asyncio.to_thread(ray.nodes)
        if not any(node["Alive"] and node["NodeID"] == dispatched.node_id for node in nodes):
            raise NodeDiedError("it is dead")
        folder = str(within(Path(dispatched.folder), self._request.key))
        arguments = self._request.step_key, self._request.attempt
        while True:
            poll: Poll = await _call(_on_node(_look, dispatched.node_id, folder, self._cursor, *arguments), _SALVAGE_S)
            before, self._cursor = self._cursor, write_at(self._folder, self._cursor, poll)
            if poll.result is not None or self._cursor.offsets == before.offsets:
                _on_node(_remove, dispatched.node_id, folder)
                return poll

    def _copy(self, poll: Poll) -> None:
        self._cursor = write_at(self._folder, self._cursor, poll)
        text, fraction = progress_fields(poll.progress)
        line = last_line(poll.chunks[0]) or last_line(poll.chunks[1]) or self._shown.last_line
        if poll.result is None and poll.known and not poll.busy:
            self._show(text=text, fraction=fraction, node=poll.node, pid=poll.pid, last_line=line)

    def _show(self, **fields: Any) -> None:
        shown = self._shown.model_copy(update=fields)
        if shown != self._shown:
            self._shown = shown
            self._report(shown)

    def _keep(self, result: StepResult) -> StepResult:
        """Write `result.json` beside the copied logs: from here on the attempt has ended for everybody."""
        kept = result.model_copy(update={"attempt_dir": str(self._folder), "image": self._shape.image})
        write_whole(self._folder / RESULT, kept.model_dump_json())
        return kept

    async def _release(self, dispatched: Dispatched, *, discard: bool) -> None:
        """Best effort, and nobody waits for the answer: the pool finds out by itself when it gets lost."""
        if dispatched.actor in _actors and not discard:
            _actors[dispatched.actor].release.remote(dispatched.key)
        pool = await _pool(dispatched.pool, self._idle_ttl_s)
        pool.release.remote(dispatched.key, discard)


_actors: dict[str, Any] = {}
_pools: dict[str, Any] = {}


async def _pool(name: str, idle_ttl_s: float) -> Any:
    if name not in _pools:
        _pools[name] = await asyncio.to_thread(open_pool, name, idle_ttl_s)
    return _pools[name]


async def _actor(name: str) -> Any:
    """Handle of a step actor. Raises `ActorGone` when there is none of that name."""
    if name not in _actors:
        try:
            _actors[name] = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        except ValueError as error:
            raise ActorGone(f"there is no actor `{name}`") from error
    return _actors[name]


async def _call(ref: Any, timeout_s: float) -> Any:
    """Await a Ray call. Raises `TimeoutError`, Ray's errors, and `ClusterError` when the cluster is lost."""
    try:
        return await asyncio.wait_for(ref.as_future(), timeout_s)
    except (LocalRayletDiedError, RaySystemError, RpcError) as error:
        raise ClusterError(f"the Ray cluster does not answer: {_first_line(error)}") from error


async def _kill(actor: Any, dispatched: Dispatched) -> None:
    _actors.pop(dispatched.actor, None)
    await asyncio.to_thread(ray.kill, actor, no_restart=True)
    await asyncio.sleep(0.5)


def _on_node(function: Callable[..., Any], node_id: str, *arguments: Any) -> Any:
    """Run a function on one node, without asking it for resources."""
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    return remote.options(scheduling_strategy=affinity).remote(*arguments)


def _look(folder: str, cursor: Cursor, step_key: str, attempt: int) -> Poll:
    """On the node: end what the attempt left running, then read what it left in its folder."""
    end_leftovers(step_key, attempt)
    return read_beyond(Path(folder), cursor, ended=True)


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _read_dispatched(folder: Path) -> Dispatched | None:
    content = read_json(folder / DISPATCHED)
    return None if content is None else Dispatched.model_validate(content)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
