"""One attempt as the driver sees it: lease actors, follow them to the end, keep the result beside the worker.

`dispatched.json` in the attempt's folder is written before the first actor is told to start. From then on the attempt
is only ever looked for, never started a second time; except when the actors' folders show that it was never begun.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError

from cluster import gang, remote
from cluster.follow import Follower
from cluster.lease import Lease, Place
from cluster.pins import pin, pinned_shape, with_content_hash
from cluster.shape import ResourceShape
from steps import Frozen, Gang, Progress, StepRequest, StepResult
from steps._files import RESULT, attempt_dir, read_json, read_result, write_whole

DISPATCHED = "dispatched.json"
_ANSWER_S = 15.0
"""Time in which the pool and a living actor answer, beyond what they are asked to wait."""
_MOST_ACTORS = 20
"""Leases whose actors may refuse or lose an attempt before they begin it."""


class Dispatched(Frozen):
    """Where an attempt was sent: the content of `dispatched.json`."""

    key: str
    places: tuple[Place, ...]
    """In the order of the ranks."""
    master_port: int = 0
    """Where the members of a gang meet on the node of rank 0."""
    pool: str
    at: float
    """Unix time, seconds."""


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
        shape = shape.model_copy(update={"actor_scope": request.plan_dir}) if shape.actor else shape
        self._shape = pinned_shape(shape, request)
        self._pool_name = pool
        self._idle_ttl_s = idle_ttl_s
        self._report = report
        self._folder = attempt_dir(request)
        self._cancelled = asyncio.Event()
        self._followers: list[Follower] = []

    async def run(self) -> StepResult:
        """The result, from this run of the attempt or from an earlier driver's. Raises `ClusterError`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        dispatched = _read_dispatched(self._folder)
        if result := read_result(self._folder):
            return result
        for _ in range(_MOST_ACTORS):
            self._followers = []
            if dispatched is None:
                lease = await self._lease()
                if isinstance(lease, StepResult):
                    return self._keep(lease)
                dispatched = await self._mark(lease)
            found = await self._bring_home(dispatched) if dispatched is not None else None
            if found is not None:
                found = self._keep(found)
            await self._release(dispatched)
            if found is not None:
                return found
            dispatched = None
        error = f"{_MOST_ACTORS} actors in a row did not begin the step"
        return self._keep(StepResult(outcome="failed", reason="infrastructure", error=error))

    def cancel(self) -> None:
        """End the attempt: outcome `cancelled`."""
        self._cancelled.set()
        for follower in self._followers:
            follower.end(cancelled=True)

    async def _bring_home(self, dispatched: Dispatched) -> StepResult | None:
        """The result, None when the actors never began the attempt."""
        self._followers = [
            Follower(request, place, folder, dispatched.at, report)
            for request, place, folder, report in self._parts(dispatched)
        ]
        if self._cancelled.is_set():
            self.cancel()
        if len(self._followers) == 1:
            return await self._followers[0].run()
        return await gang.bring_home(self._followers)

    def _parts(self, dispatched: Dispatched) -> list[tuple[StepRequest, Place, Path, Callable[[Progress], None]]]:
        """What each actor is asked to run, and where its logs are copied to: `rank-<n>` for all but the first."""
        places = dispatched.places
        if not self._shape.nodes:
            return [(self._request, places[0], self._folder, self._report)]
        meeting = {"master_address": places[0].address, "master_port": dispatched.master_port}
        processes = max(1, int(self._shape.gpus))
        parts = []
        for rank, place in enumerate(places):
            member = Gang(rank=rank, size=len(places), processes_per_node=processes, **meeting)
            request = self._request.model_copy(update={"gang": member})
            if rank == 0:
                parts.append((request, place, self._folder, self._report))
            else:
                own = {"expected_outputs": (), "artifacts": (), "cached_artifacts": ()}
                request = request.model_copy(update=own)
                parts.append((request, place, self._folder / f"rank-{rank}", _nobody))
        return parts

    async def _lease(self) -> Lease | StepResult:
        """An actor, or the result when there will be none."""
        key, wait_s = self._request.key, 0.3
        if self._shape.image and not self._shape.pinned:
            self._shape = await asyncio.to_thread(with_content_hash, self._shape)
        while not self._cancelled.is_set():
            call = asyncio.ensure_future(self._ask_pool(wait_s))
            lease: Lease | None = await self._unless_cancelled(call)
            if lease is None:
                break
            if lease.state == "leased":
                return lease
            if lease.state == "pinned":
                self._shape = pin(self._shape, self._request, lease.text)
                continue
            if lease.state == "unfit":
                return StepResult(outcome="failed", reason="image", error=lease.text, final=True)
            if lease.state == "infeasible":
                return StepResult(outcome="failed", reason="infeasible", error=lease.text, final=True)
            if lease.state == "failed":
                return StepResult(outcome="failed", reason="infrastructure", error=lease.text)
            self._report(Progress(text=lease.text))
            wait_s = 2.0
        pool = await remote.pool_handle(self._pool_name, self._idle_ttl_s)
        pool.release.remote(key, False)
        return StepResult(outcome="cancelled", reason="cancelled", error="cancelled before it started")

    async def _ask_pool(self, wait_s: float) -> Lease:
        for attempts_left in (2, 1, 0):
            pool = await remote.pool_handle(self._pool_name, self._idle_ttl_s)
            try:
                lease: Lease = await remote.call(
                    pool.lease.remote(self._request.key, self._shape, wait_s), wait_s + _ANSWER_S
                )
                return lease
            except (RayActorError, TimeoutError):
                remote.forget_pool(self._pool_name)
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

    async def _mark(self, lease: Lease) -> Dispatched | None:
        """Write down where the attempt is sent; None when the actors are gone already."""
        try:
            port = await self._free_port(lease.places[0]) if self._shape.nodes else 0
        except (remote.ActorGone, RayError, TimeoutError):
            return None
        dispatched = Dispatched(
            key=self._request.key, places=lease.places, master_port=port, pool=self._pool_name, at=time.time()
        )
        write_whole(self._folder / DISPATCHED, dispatched.model_dump_json())
        return dispatched

    async def _free_port(self, place: Place) -> int:
        actor = await remote.actor_handle(place.actor)
        port: int = await remote.call(actor.free_port.remote(), _ANSWER_S)
        return port

    def _keep(self, result: StepResult) -> StepResult:
        """Write `result.json` beside the copied logs: from here on the attempt has ended for everybody."""
        kept = result.model_copy(update={"attempt_dir": str(self._folder), "image": self._shape.image_text})
        write_whole(self._folder / RESULT, kept.model_dump_json())
        return kept

    async def _release(self, dispatched: Dispatched | None) -> None:
        """Best effort, and nobody waits for the answer: the pool finds out by itself when it gets lost."""
        for follower in self._followers:
            if not follower.stuck:
                remote.release(follower.place.actor, self._request.key)
        discard = dispatched is None or any(follower.stuck for follower in self._followers)
        pool = await remote.pool_handle(dispatched.pool if dispatched else self._pool_name, self._idle_ttl_s)
        pool.release.remote(self._request.key, discard)


def _nobody(progress: Progress) -> None:
    """Listens to the progress of ranks that nobody is shown."""


def _read_dispatched(folder: Path) -> Dispatched | None:
    content = read_json(folder / DISPATCHED)
    return None if content is None else Dispatched.model_validate(content)
