"""The pool: one detached named actor that leases step actors, warm ones first, and stops those nobody needs.

    lease(key, shape) -> an idle actor of that shape | a new one when its resources are free | wait, oldest first
    release(key)      -> the next waiting key of that shape | idle until `idle_ttl_s`, or until another shape needs room

A lease is found again by its key. The pool's memory is the actors themselves: after its own death it lists them and
asks each what it holds.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import Coroutine
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayError

from cluster.actor import ActorState, StepActor
from cluster.connect import NAMESPACE
from cluster.shape import ResourceShape, amount_text, lacking, quantity, why_infeasible
from steps import Frozen

log = logging.getLogger(__name__)

_MOST_PENDING = 8
"""Actors of one shape that may be on their way at a time."""
_TICK_S = 1.0
_VIEW_AGE_S = 0.3
_CHECK_INTERVAL_S = 5.0
_CHECK_TIMEOUT_S = 10.0
_FORGOTTEN_WAITER_S = 60.0
"""A waiting key nobody has asked about for so long is dropped."""
_UNUSED_LEASE_S = 60.0
"""A lease whose attempt was not started for so long is taken back."""
_UNCLAIMED_RESULT_S = 3600.0
"""An actor whose ended attempt nobody has fetched for so long is stopped; the attempt stays in its folder."""
_STARVING_S = 5.0
"""A key that waits for so long for resources which actors of another shape keep busy gets them first."""


class Lease(Frozen):
    """Answer to one `lease` call."""

    state: Literal["leased", "waiting", "infeasible", "failed"]
    actor: str = ""
    """Name of the actor, when leased."""
    node_id: str = ""
    folder: str = ""
    """Where the actor keeps its attempts, on that node."""
    fresh: bool = False
    """True when the actor was made for this key."""
    text: str = ""
    """What it waits for, or why there will be no lease."""


class _Member:
    """One step actor of the pool."""

    def __init__(self, name: str, handle: "ActorHandle[StepActor]", shape: ResourceShape) -> None:
        self.name = name
        self.handle: Any = handle
        self.shape = shape
        self.node_id = ""
        """Empty until the actor runs."""
        self.folder = ""
        self.key = ""
        self.served = 0
        self.since = time.monotonic()
        """When its key was last changed."""


class _Waiter:
    """One key that waits for an actor."""

    def __init__(self, key: str, shape: ResourceShape) -> None:
        self.key = key
        self.shape = shape
        self.lease: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.since = time.monotonic()
        self.asked_at = self.since


class _View(NamedTuple):
    """Ray's nodes and resources at one time."""

    nodes: list[dict[str, Any]]
    free: dict[str, float]
    total: dict[str, float]
    at: float


class Pool:
    """Made a detached Ray actor by `open_pool`."""

    def __init__(self, name: str, idle_ttl_s: float) -> None:
        self._prefix = _member_prefix(name)
        self._idle_ttl_s = idle_ttl_s
        self._members: dict[str, _Member] = {}
        self._waiters: dict[str, _Waiter] = {}
        self._waits_for: dict[str, set[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._view = _View([], {}, {}, at=-_VIEW_AGE_S)
        self._looking = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._open = False
        self._wake = asyncio.Event()
        self._checked_at = 0.0

    async def lease(self, key: str, shape: ResourceShape, wait_s: float) -> Lease:
        """The actor for `key`; waits at most `wait_s`, ask again when the state is `waiting`."""
        await self._ensure_open()
        for member in self._members.values():
            if member.key == key:
                return self._lease_of(member)
        waiter = self._waiters.get(key)
        if waiter is None:
            waiter = self._waiters[key] = _Waiter(key, shape)
            self._serve()
            if not waiter.lease.done():
                if reason := why_infeasible(shape, (await self._look_at_cluster()).nodes):
                    self._waiters.pop(key, None)
                    return Lease(state="infeasible", text=reason)
                self._wake.set()
        waiter.asked_at = time.monotonic()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(waiter.lease), wait_s)
        return Lease(state="waiting", text=await self._waiting_text(shape))

    async def release(self, key: str, discard: bool) -> None:
        """Give the actor of `key` back, or stop waiting for one. `discard` ends the actor."""
        await self._ensure_open()
        self._waiters.pop(key, None)
        for member in [member for member in self._members.values() if member.key == key]:
            member.key, member.since = "", time.monotonic()
            if discard or self._must_yield(member):
                self._stop(member)
        self._serve()
        if self._waiters and any(member.node_id and not member.key for member in self._members.values()):
            self._wake.set()

    async def members(self) -> list[dict[str, Any]]:
        """What the pool holds, for status displays."""
        await self._ensure_open()
        return [
            {"actor": member.name, "node_id": member.node_id, "key": member.key, "shape": str(member.shape)}
            for member in self._members.values()
        ]

    async def _ensure_open(self) -> None:
        async with self._opening:
            if not self._open:
                await self._find_members()
                self._spawn(self._housekeeping())
                self._open = True

    async def _find_members(self) -> None:
        """Take over the actors of an earlier life of this pool."""
        listed = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = [
            entry["name"]
            for entry in listed
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(self._prefix)
        ]
        await asyncio.gather(*(self._adopt(name) for name in names))

    async def _adopt(self, name: str) -> None:
        try:
            handle = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
            shape = await asyncio.wait_for(handle.shape.remote(), _CHECK_TIMEOUT_S)
            state: ActorState = await asyncio.wait_for(handle.state.remote(), _CHECK_TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            log.warning("step actor %s does not answer the new pool, it is stopped: %s", name, error)
            with contextlib.suppress(RayError, ValueError):
                ray.kill(await asyncio.to_thread(ray.get_actor, name, NAMESPACE), no_restart=True)
            return
        member = self._members[name] = _Member(name, handle, shape)
        member.node_id, member.folder, member.key, member.served = state.node_id, state.folder, state.key, 1

    def _lease_of(self, member: _Member) -> Lease:
        fresh = member.served == 1
        return Lease(state="leased", actor=member.name, node_id=member.node_id, folder=member.folder, fresh=fresh)

    def _serve(self) -> None:
        """Give idle actors to those who wait, oldest first."""
        idle: dict[ResourceShape | str, list[_Member]] = {}
        for member in self._members.values():
            if member.node_id and not member.key:
                idle.setdefault(member.shape.identity, []).append(member)
        for waiter in list(self._waiters.values()) if idle else []:
            if members := idle.get(waiter.shape.identity):
                member = members.pop()
                member.key, member.since = waiter.key, time.monotonic()
                member.served += 1
                del self._waiters[waiter.key]
                waiter.lease.set_result(self._lease_of(member))

    def _must_yield(self, member: _Member) -> bool:
        """True when the oldest waiting key is starved by actors of this one's shape."""
        oldest = next(iter(self._waiters.values()), None)
        return (
            oldest is not None
            and oldest.shape.identity != member.shape.identity
            and time.monotonic() - oldest.since > _STARVING_S
            and bool(self._waits_for.get(oldest.shape.identity, set()) & member.shape.amounts.keys())
        )

    async def _housekeeping(self) -> None:
        """Create, stop and check actors: when somebody waits, and every second."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _TICK_S)
            self._wake.clear()
            try:
                self._forget_waiters()
                await self._grow()
                self._shrink()
                if time.monotonic() - self._checked_at > _CHECK_INTERVAL_S:
                    self._checked_at = time.monotonic()
                    await asyncio.gather(*(self._check(member) for member in self._members.values() if member.node_id))
                self._serve()
            except RayError:
                log.exception("pool housekeeping failed, it is tried again")

    def _forget_waiters(self) -> None:
        now = time.monotonic()
        for waiter in [waiter for waiter in self._waiters.values() if now - waiter.asked_at > _FORGOTTEN_WAITER_S]:
            del self._waiters[waiter.key]

    async def _grow(self) -> None:
        """Start actors for waiting keys: as many as fit now, one to be in Ray's queue when nothing fits."""
        waiting: dict[str, list[_Waiter]] = {}
        for waiter in self._waiters.values():
            waiting.setdefault(waiter.shape.identity, []).append(waiter)
        self._waits_for = {identity: found for identity, found in self._waits_for.items() if identity in waiting}
        if not waiting:
            return
        free = dict((await self._look_at_cluster()).free)
        ordered = [member for member in self._members.values() if not member.node_id]
        for identity, waiters in waiting.items():
            shape = waiters[0].shape
            own = [member for member in ordered if member.shape.identity == identity]
            self._waits_for[identity] = short = lacking(shape, free)
            # An actor that is just starting has its resources already: they only look missing.
            if short and all(time.monotonic() - member.since > _TICK_S for member in own):
                self._make_room(shape, free, short)
            for _ in range(len(own), min(len(waiters), _MOST_PENDING)):
                if lacking(shape, _without(free, ordered)) and self._has_members(identity):
                    break
                ordered.append(self._create(shape))

    def _has_members(self, identity: str) -> bool:
        return any(member.shape.identity == identity for member in self._members.values())

    def _make_room(self, shape: ResourceShape, free: dict[str, float], short: set[str]) -> None:
        """Stop idle actors of other shapes, longest idle first, until the shape fits."""
        idle = [member for member in self._members.values() if member.node_id and not member.key]
        for member in sorted(idle, key=lambda member: member.since):
            if short and member.shape.identity != shape.identity and short & member.shape.amounts.keys():
                for name, amount in member.shape.amounts.items():
                    free[name] = free.get(name, 0.0) + amount
                self._stop(member)
                short = lacking(shape, free)

    def _shrink(self) -> None:
        """Stop what has been idle for long, and what was ordered for keys that wait no more."""
        now = time.monotonic()
        wanted = {waiter.shape.identity for waiter in self._waiters.values()}
        for member in list(self._members.values()):
            is_idle = bool(member.node_id) and not member.key and now - member.since > self._idle_ttl_s
            is_unwanted = not member.node_id and member.shape.identity not in wanted and now - member.since > _TICK_S
            if is_idle or is_unwanted:
                self._stop(member)

    async def _check(self, member: _Member) -> None:
        """Drop an actor that died, take back a lease that nobody uses."""
        try:
            state: ActorState = await asyncio.wait_for(member.handle.state.remote(), _CHECK_TIMEOUT_S)
        except (ActorUnavailableError, TimeoutError):
            return
        except RayError:
            self._members.pop(member.name, None)
            return
        age_s = time.monotonic() - member.since
        if member.key and state.key != member.key and age_s > _UNUSED_LEASE_S:
            member.key, member.since = "", time.monotonic()
        elif state.key and not state.running and min(state.contact_age_s, age_s) > _UNCLAIMED_RESULT_S:
            self._stop(member)

    def _create(self, shape: ResourceShape) -> _Member:
        name = f"{self._prefix}{uuid.uuid4().hex[:12]}"
        actor_class: Any = ray.remote(StepActor)
        handle = actor_class.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=100,
            **shape.actor_options,
        ).remote(name, shape)
        member = self._members[name] = _Member(name, handle, shape)
        self._spawn(self._welcome(member))
        return member

    async def _welcome(self, member: _Member) -> None:
        try:
            state: ActorState = await member.handle.state.remote()
        except RayError as error:
            if self._members.pop(member.name, None) is not None:
                self._fail_oldest(member.shape, str(error))
            return
        member.node_id, member.folder, member.since = state.node_id, state.folder, time.monotonic()
        self._serve()

    def _fail_oldest(self, shape: ResourceShape, reason: str) -> None:
        """The first key that waits for the shape learns why its actor could not start."""
        waiter = next((one for one in self._waiters.values() if one.shape.identity == shape.identity), None)
        if waiter is not None:
            del self._waiters[waiter.key]
            text = f"a step actor with {shape} cannot start: {reason}"
            waiter.lease.set_result(Lease(state="failed", text=text))

    def _stop(self, member: _Member) -> None:
        self._members.pop(member.name, None)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(member.handle, no_restart=True)

    async def _waiting_text(self, shape: ResourceShape) -> str:
        view = await self._look_at_cluster()
        if not lacking(shape, view.free):
            return f"starting an actor with {shape}"
        parts = [
            f"{quantity(name, view.free.get(name, 0))} of {amount_text(name, view.total.get(name, 0))} free"
            for name in sorted(shape.amounts)
        ]
        return f"waiting for a node with {shape} ({', '.join(parts)})"

    async def _look_at_cluster(self) -> "_View":
        """The cluster as it was at most `_VIEW_AGE_S` ago: hundreds of keys may wait at a time."""
        async with self._looking:
            if time.monotonic() - self._view.at > _VIEW_AGE_S:
                self._view = await asyncio.to_thread(_look)
        return self._view

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _look() -> _View:
    return _View(ray.nodes(), ray.available_resources(), ray.cluster_resources(), time.monotonic())


@lru_cache(maxsize=1)
def pool_name() -> str:
    """Name of the pool for this version of the code: actors that run other code are never leased to it."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted([*(root / "cluster").glob("*.py"), *(root / "steps").glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return f"pool-{digest.hexdigest()[:8]}"


def open_pool(name: str, idle_ttl_s: float) -> Any:
    """Handle of the pool called `name`; it is started when there is none."""
    actor_class: Any = ray.remote(Pool)
    return actor_class.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=10_000,
    ).remote(name, idle_ttl_s)


def _without(free: dict[str, float], members: list[_Member]) -> dict[str, float]:
    """What is free when these members have got their resources too."""
    left = dict(free)
    for member in members:
        for name, amount in member.shape.amounts.items():
            left[name] = left.get(name, 0.0) - amount
    return left


def _member_prefix(pool: str) -> str:
    return f"step-{pool.removeprefix('pool-')}-"
