"""The pool: one detached named actor that leases step actors, warm ones first, and stops those nobody needs.

    lease(key, shape) -> an idle actor of that shape | a new one when its resources are free | wait, oldest first
    release(key)      -> the next waiting key of that shape | idle until `idle_ttl_s`, or until another shape needs room

A shape that names its `actor` has one actor, whose keys wait for each other. A gang's actors end with its lease: idle,
they would keep whole nodes. A lease is found again by its key, and ends what earlier attempts of its step hold. The
pool's memory is the actors themselves: after its own death it lists them and asks each what it holds.
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
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, RayError

from cluster.connect import NAMESPACE, is_outside
from cluster.images import Images, ImagesUnfit, Placing
from cluster.lease import Lease
from cluster.lost_nodes import LostNodes, death_times
from cluster.member import Member, actor_name, group_names, member_name, remove_group
from cluster.room import Room
from cluster.shape import ResourceShape, why_infeasible

log = logging.getLogger(__name__)

_MOST_PENDING = 8
"""Actors of one shape that may be on their way at a time."""
_CREATION_TIMEOUT_S = 20.0
_CREATION_POLL_S = 0.05
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
_UNCLAIMED_GANG_S = 120.0
"""The same for a gang, which keeps whole nodes."""
_DEAD_GANG_S = 60.0
"""A gang with a dead actor is stopped after so long at the latest, held or not."""
_STARVING_S = 5.0
"""A key that waits for so long for resources which actors of another shape keep busy gets them first."""


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
    free: dict[str, dict[str, float]]
    """By node id."""
    at: float


class Pool:
    """Made a detached Ray actor by `open_pool`."""

    def __init__(self, name: str, idle_ttl_s: float) -> None:
        self._prefix = _member_prefix(name)
        self._idle_ttl_s = idle_ttl_s
        self._members: dict[str, Member] = {}
        self._waiters: dict[str, _Waiter] = {}
        self._waits_for: dict[str, set[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._view = _View([], {}, at=-_VIEW_AGE_S)
        self._lost = LostNodes()
        self._looking = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._open = False
        self._wake = asyncio.Event()
        self._images = Images(self._wake.set)
        self._checked_at = 0.0

    async def lease(self, key: str, shape: ResourceShape, wait_s: float) -> Lease:
        """The actor for `key`; waits at most `wait_s`, ask again when the state is `waiting`."""
        await self._ensure_open()
        self._end_earlier(key)
        for member in self._members.values():
            if member.key == key:
                return member.lease
        if shape.image and not shape.pinned:
            return await self._pin(shape, wait_s)
        waiter = self._waiters.get(key)
        if is_new := waiter is None:
            waiter = self._waiters[key] = _Waiter(key, shape)
            self._serve()
        if not waiter.lease.done():
            # Asked every time: what was possible may be so no more.
            if reason := await self._why_impossible(shape):
                self._waiters.pop(key, None)
                return Lease(state="infeasible", text=reason)
            if is_new:
                self._wake.set()
        waiter.asked_at = time.monotonic()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(waiter.lease), wait_s)
        return Lease(state="waiting", text=await self._waiting_text(shape))

    def _end_earlier(self, key: str) -> None:
        """End what earlier attempts of the same step hold: whoever starts the next one has given them up.

        They may run all the same, when their worker could not reach the cluster for long. Two must never run at a time.
        """
        for member in [member for member in self._members.values() if _is_earlier(member.key, key)]:
            log.warning("attempt %s is ended, its step is tried again", member.key)
            self._stop(member)
        for earlier in [waiting for waiting in self._waiters if _is_earlier(waiting, key)]:
            del self._waiters[earlier]

    async def _pin(self, shape: ResourceShape, wait_s: float) -> Lease:
        """What the shape's image stands for, for whoever will ask again with that."""
        if reason := await self._why_impossible(shape):
            return Lease(state="infeasible", text=reason)
        nodes = (await self._look_at_cluster()).nodes
        try:
            pinned = await self._images.pin(shape, nodes, wait_s)
        except ImagesUnfit as error:
            return Lease(state="unfit", text=str(error))
        if pinned:
            return Lease(state="pinned", text=pinned)
        return Lease(state="waiting", text=f"looking for image `{shape.image}`, or pulling it")

    async def release(self, key: str, discard: bool) -> None:
        """Give the actor of `key` back, or stop waiting for one. `discard` ends the actor."""
        await self._ensure_open()
        self._waiters.pop(key, None)
        for member in [member for member in self._members.values() if member.key == key]:
            member.hold("")
            if discard or member.shape.nodes > 1 or self._must_yield(member):
                self._stop(member)
        self._serve()
        if self._waiters:
            self._wake.set()

    async def members(self) -> list[dict[str, Any]]:
        """What the pool holds, for status displays."""
        await self._ensure_open()
        return [
            {
                "actor": actor_name(member.name, member.shape, rank),
                "node_id": member.places[rank].node_id if member.runs else "",
                "key": member.key,
                "shape": str(member.shape),
            }
            for member in self._members.values()
            for rank in range(member.shape.num_nodes)
        ]

    async def _ensure_open(self) -> None:
        async with self._opening:
            if not self._open:
                await self._find_members()
                self._spawn(self._housekeeping())
                self._open = True

    async def _find_members(self) -> None:
        """Take over the actors of an earlier life of this pool; what is left of incomplete gangs is removed."""
        listed = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names: dict[str, list[str]] = {}
        for entry in listed:
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(self._prefix):
                names.setdefault(member_name(entry["name"]), []).append(entry["name"])
        await asyncio.gather(*(self._adopt(name, sorted(actors, key=_rank)) for name, actors in names.items()))
        for group in await asyncio.to_thread(group_names):
            if group.startswith(self._prefix) and group not in self._members:
                await asyncio.to_thread(remove_group, group)

    async def _adopt(self, name: str, actors: list[str]) -> None:
        handles: list[Any] = []
        try:
            for actor in actors:
                handles.append(await asyncio.to_thread(ray.get_actor, actor, NAMESPACE))
            shape = await asyncio.wait_for(_shape_of(handles[0]), _CHECK_TIMEOUT_S)
            if len(actors) != shape.num_nodes:
                raise ValueError(f"{len(actors)} of {shape.num_nodes} actors are left")
            member = Member(name, handles, shape)
            states = await member.states(_CHECK_TIMEOUT_S)
            if refusal := next((state.refused for state in states if state.refused), ""):
                raise ValueError(refusal)
        except (RayError, ValueError, TimeoutError) as error:
            log.warning("step actor %s does not answer the new pool, it is stopped: %s", name, error)
            for handle in handles:
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(handle, no_restart=True)
            return
        member.settle(states)
        member.hold(next((state.key for state in states if state.key), ""))
        member.served = 1
        self._members[name] = member

    def _serve(self) -> None:
        """Give idle actors to those who wait, oldest first."""
        idle: dict[str, list[Member]] = {}
        for member in self._members.values():
            if member.is_idle:
                idle.setdefault(member.shape.identity, []).append(member)
        for waiter in list(self._waiters.values()) if idle else []:
            if members := idle.get(waiter.shape.identity):
                member = members.pop()
                member.hold(waiter.key)
                member.served += 1
                del self._waiters[waiter.key]
                waiter.lease.set_result(member.lease)

    def _must_yield(self, member: Member) -> bool:
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
                    await asyncio.gather(*(self._check(member) for member in self._members.values() if member.runs))
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
        view = await self._look_at_cluster()
        room = Room(view.nodes, view.free)
        ordered = [member for member in self._members.values() if not member.runs]
        for identity, waiters in waiting.items():
            shape = waiters[0].shape
            if shape.actor and self._has_members(identity):
                continue
            own = [member for member in ordered if member.shape.identity == identity]
            self._waits_for[identity] = room.lacking(shape)
            # An actor that is just starting has its resources already: they only look missing.
            if all(time.monotonic() - member.since > _TICK_S for member in own):
                self._make_room(shape, room)
            try:
                placing = self._images.placing(shape, view.nodes, room)
            except ImagesUnfit as error:
                self._fail_all(identity, Lease(state="unfit", text=str(error)))
                continue
            if placing is None and shape.is_contained:
                continue
            for _ in range(len(own), min(len(waiters), 1 if shape.actor else _MOST_PENDING)):
                left = room.without(member.shape for member in ordered)
                if not left.fits(shape) and self._has_members(identity):
                    break
                member = await self._create(shape, placing)
                if member is None:
                    break
                ordered.append(member)

    def _has_members(self, identity: str) -> bool:
        return any(member.shape.identity == identity for member in self._members.values())

    def _make_room(self, shape: ResourceShape, room: Room) -> None:
        """Stop idle actors of other shapes until the shape fits: nameless ones first, then the longest idle."""
        able = room.able(shape)
        idle = [member for member in self._members.values() if member.is_idle]
        for member in sorted(idle, key=lambda member: (bool(member.shape.actor), member.since)):
            node_ids = [place.node_id for place in member.places]
            short = room.lacking(shape)
            if (
                short & member.shape.amounts.keys()
                and member.shape.identity != shape.identity
                and not able.isdisjoint(node_ids)
            ):
                room.give(member.shape, node_ids)
                self._stop(member)

    def _shrink(self) -> None:
        """Stop what has been idle for long, and what was ordered for keys that wait no more."""
        now = time.monotonic()
        wanted = {waiter.shape.identity for waiter in self._waiters.values()}
        for member in list(self._members.values()):
            is_idle = member.is_idle and now - member.since > self._idle_ttl_s
            is_unwanted = not member.runs and member.shape.identity not in wanted and now - member.since > _TICK_S
            if is_idle or is_unwanted:
                self._stop(member)

    async def _check(self, member: Member) -> None:
        """Drop an actor that died, take back a lease that nobody uses."""
        try:
            states = await member.states(_CHECK_TIMEOUT_S)
        except (ActorUnavailableError, TimeoutError):
            return
        except RayError:
            self._lose(member)
            return
        age_s = time.monotonic() - member.since
        held = [state for state in states if state.key]
        contact_s = min([age_s, *(state.contact_age_s for state in held)])
        longest_s = _UNCLAIMED_GANG_S if member.shape.nodes > 1 else _UNCLAIMED_RESULT_S
        if member.key and all(state.key != member.key for state in states) and age_s > _UNUSED_LEASE_S:
            member.hold("")
        elif held and not any(state.running for state in held) and contact_s > longest_s:
            self._stop(member)

    def _lose(self, member: Member) -> None:
        """Drop a dead actor. What is left of a gang is its attempt's to end, if that takes no time at all."""
        member.died_at = member.died_at or time.monotonic()
        if member.shape.nodes > 1 and member.key and time.monotonic() - member.died_at < _DEAD_GANG_S:
            return
        self._stop(member)

    async def _create(self, shape: ResourceShape, placing: Placing | None) -> Member | None:
        name = f"{self._prefix}{uuid.uuid4().hex[:12]}"
        try:
            member = await asyncio.to_thread(Member.create, name, shape, placing)
        except (RayError, ValueError, TypeError) as error:
            self._fail_oldest(shape, str(error))
            return None
        self._members[name] = member
        self._spawn(self._welcome(member))
        return member

    async def _welcome(self, member: Member) -> None:
        try:
            states = await member.states()
        except RayError as error:
            if member.name in self._members:
                self._stop(member)
                self._fail_oldest(member.shape, str(error))
            return
        if refusing := next((state for state in states if state.refused), None):
            self._stop(member)
            if self._images.refused(member.shape):
                image = f" in image `{member.shape.image}`" if member.shape.image else ""
                text = f"no actor comes up{image} on `{refusing.node}`: {refusing.refused}"
                self._fail_all(member.shape.identity, Lease(state="unfit", text=text))
            self._wake.set()
            return
        self._images.came_up(member.shape)
        member.settle(states)
        member.since = time.monotonic()
        self._serve()

    def _fail_all(self, identity: str, lease: Lease) -> None:
        """All keys that wait for a shape get this answer."""
        for waiter in [waiter for waiter in self._waiters.values() if waiter.shape.identity == identity]:
            del self._waiters[waiter.key]
            waiter.lease.set_result(lease)

    def _fail_oldest(self, shape: ResourceShape, reason: str) -> None:
        """The first key that waits for the shape learns why its actor could not start."""
        waiter = next((one for one in self._waiters.values() if one.shape.identity == shape.identity), None)
        if waiter is not None:
            del self._waiters[waiter.key]
            text = f"a step actor with {shape} cannot start: {reason}"
            waiter.lease.set_result(Lease(state="failed", text=text))

    def _stop(self, member: Member) -> None:
        self._members.pop(member.name, None)
        member.stop()

    async def _why_impossible(self, shape: ResourceShape) -> str:
        """Why no node can ever run the shape, for people; empty when one can, or may come back that could."""
        nodes = (await self._look_at_cluster()).nodes
        reason = why_infeasible(shape, nodes)
        return "" if reason and self._lost.could_run(shape, nodes) else reason

    async def _waiting_text(self, shape: ResourceShape) -> str:
        if shape.actor and any(one.key and one.shape.identity == shape.identity for one in self._members.values()):
            return f"waiting for the actor `{shape.actor}`, which runs another step"
        view = await self._look_at_cluster()
        if why_infeasible(shape, view.nodes) and (names := self._lost.could_run(shape, view.nodes)):
            return f"waiting for a node to come back that was lost: {', '.join(sorted(set(names)))}"
        room = Room(view.nodes, view.free)
        if room.fits(shape):
            return f"starting an actor with {shape}"
        what = "" if shape.nodes > 1 else "a node with "
        return f"waiting for {what}{shape} ({room.text(shape)})"

    async def _look_at_cluster(self) -> "_View":
        """The cluster as it was at most `_VIEW_AGE_S` ago: hundreds of keys may wait at a time."""
        async with self._looking:
            if time.monotonic() - self._view.at > _VIEW_AGE_S:
                self._view = await asyncio.to_thread(_look, self._lost)
        return self._view

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _look(lost: LostNodes) -> _View:
    nodes = ray.nodes()
    lost.note(nodes, death_times)
    return _View(nodes, ray._private.state.available_resources_per_node(), time.monotonic())


def _is_earlier(one: str, other: str) -> bool:
    """True when `one` is the key of an earlier attempt of the same step: `STEP_KEY/ATTEMPT`."""
    (step, _, attempt), (other_step, _, other_attempt) = one.rpartition("/"), other.rpartition("/")
    is_same_step = step == other_step and attempt.isdigit() and other_attempt.isdigit()
    return is_same_step and int(attempt) < int(other_attempt)


async def _shape_of(handle: Any) -> ResourceShape:
    shape: ResourceShape = await handle.shape.remote()
    return shape


def _rank(actor: str) -> int:
    return int(actor.partition(".")[2] or 0)


@lru_cache(maxsize=1)
def pool_name() -> str:
    """Name of the pool for this version of the code: actors that run other code are never leased to it."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(
        [*(root / "cluster").glob("*.py"), *(root / "container").glob("*.py"), *(root / "steps").glob("*.py")]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return f"pool-{digest.hexdigest()[:8]}"


def open_pool(name: str, idle_ttl_s: float) -> Any:
    """Handle of the pool called `name`; it is started when there is none. Raises `ValueError` when it cannot be."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(name, NAMESPACE)
    actor_class: Any = ray.remote(Pool)
    pool = actor_class.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=10_000,
    ).remote(name, idle_ttl_s)
    # A driver outside gets a handle at once, and a void one when another created the pool in the same moment.
    return _find_named(name) if is_outside() else pool


def _find_named(name: str) -> Any:
    deadline = time.monotonic() + _CREATION_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ValueError):
            return ray.get_actor(name, NAMESPACE)
        time.sleep(_CREATION_POLL_S)
    raise ValueError(f"the actor `{name}` was not created within {_CREATION_TIMEOUT_S:g} s")


def _member_prefix(pool: str) -> str:
    return f"step-{pool.removeprefix('pool-')}-"
