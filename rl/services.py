"""Named pools of replicas: callers get the least loaded one, and a replica that dies is replaced.

    caller --get_replica--> Service --least loaded--> Replica (a worker in a process of its own)
                              '-- lost --> back-off --> a spare process, or another one --> healthy

The pool is the same for all; `rl.services_monarch` and `rl.services_ray` host it, its replicas and the registry of
their framework. Light: imports neither.
"""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field

from rl.types import Frozen

Worker = Callable[[], Any]
"""Makes the object behind a replica, in the replica's process; picklable. Its methods that others call are async. It
may have `ready`, which is awaited before it counts as healthy, and `ping`, which says that it is well."""


class ReplicaLost(Exception):
    """The process behind a replica is gone. The argument says which."""


class NoReplica(Exception):
    """No replica is healthy, and none became so in time. The argument names the service."""


class ServiceSettings(Frozen):
    """How a service treats its replicas."""

    num_replicas: Annotated[int, Field(ge=1)] = 1
    num_spares: Annotated[int, Field(ge=0)] = 0
    """Processes that are ready to take the place of one that is lost."""
    spare_delay_s: Annotated[float, Field(ge=0)] = 0
    """From the moment in which a spare took a place until its successor begins, so that the two do not share cores
    while the one that was a spare is being opened."""
    environment: dict[str, str] = {}
    """Variables that are set before a replica's process starts."""
    cpus: Annotated[float, Field(ge=0)] = 0
    gpus: Annotated[float, Field(ge=0)] = 0
    ready_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Until a new process is ready."""
    ping_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """Before a place is filled again for the second time in a row, doubled each time; the first time is at once."""
    longest_backoff_s: Annotated[float, Field(gt=0)] = 30.0
    stable_after_s: Annotated[float, Field(gt=0)] = 60.0
    """A replica that was healthy for so long counts as the first in its row."""


class ServiceHealth(Frozen):
    """The replicas of a service at one moment."""

    total: int
    healthy: tuple[int, ...]
    """Their indices."""
    unhealthy: tuple[int, ...]
    num_calls: tuple[int, ...]
    """[total] Calls that each was chosen for and that are not done."""
    num_respawns: int
    num_spares: int
    """That are ready now."""


class Replica(Protocol):
    """Reference to one replica; picklable."""

    @property
    def name(self) -> str:
        """Another one for each process."""
        ...

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns or raises. Raises `ReplicaLost`."""
        ...


class ReplicaHost(Protocol):
    """Starts and ends the processes of replicas."""

    async def start(self, name: str) -> Replica:
        """A process with a worker, which need not be ready. May not wait for more than the start of the process."""
        ...

    async def stop(self, replica: Replica) -> None:
        """End the process; it may be gone already."""
        ...


@dataclass
class _Place:
    replica: Replica | None = None
    healthy: bool = False
    since_s: float = 0.0
    num_calls: int = 0
    num_losses: int = 0
    """In a row."""


class ReplicaPool:
    """The replicas of one service. Used from one event loop."""

    def __init__(self, name: str, host: ReplicaHost, settings: ServiceSettings) -> None:
        self._name = name
        self._host = host
        self._settings = settings
        self._places = [_Place() for _ in range(settings.num_replicas)]
        self._spares: list[asyncio.Task[Replica]] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0
        self._num_started = 0
        self._num_respawns = 0
        self._closed = False

    async def open(self) -> None:
        """Start every replica, and the spares beside them. Raises what a worker's start raised."""
        starting = asyncio.gather(*(self._started() for _ in self._places))
        self._add_spares()
        replicas = await starting
        for place, replica in zip(self._places, replicas, strict=True):
            await self._fill(place, replica)

    async def close(self) -> None:
        """End every process."""
        self._closed = True
        tasks = [*self._tasks, *self._spares]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        replicas = [place.replica for place in self._places if place.replica is not None]
        replicas += [spare.result() for spare in self._spares if _is_ready(spare)]
        await asyncio.gather(*(self._host.stop(replica) for replica in replicas), return_exceptions=True)

    async def get_replica(self, timeout_s: float = 60.0) -> tuple[Replica, int]:
        """A healthy replica that has the fewest calls, in turn among equals, and its index; `release` it afterwards.

        Waits for one. Raises `NoReplica`.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: any(place.healthy for place in self._places))
        except TimeoutError:
            raise NoReplica(f"no replica of `{self._name}` is healthy, for {timeout_s:g} s") from None
        total = len(self._places)
        in_turn = [(self._next + step) % total for step in range(total)]
        index = min(
            (index for index in in_turn if self._places[index].healthy), key=lambda index: self._places[index].num_calls
        )
        self._next = (index + 1) % total
        place = self._places[index]
        place.num_calls += 1
        assert place.replica is not None
        return place.replica, index

    def release(self, replica: Replica, index: int) -> None:
        """The call that the replica was chosen for is done."""
        place = self._places[index]
        if place.replica is not None and place.replica.name == replica.name:
            place.num_calls -= 1

    async def replica_at(self, index: int, timeout_s: float = 60.0) -> Replica:
        """The replica of one place, once it is healthy. Raises `NoReplica`."""
        place = self._places[index]
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: place.healthy)
        except TimeoutError:
            raise NoReplica(f"replica {index} of `{self._name}` is not healthy, for {timeout_s:g} s") from None
        assert place.replica is not None
        return place.replica

    def mark_unhealthy(self, index: int) -> None:
        """Choose it no more until `mark_healthy`, or until `check_health` finds it well."""
        self._places[index].healthy = False

    async def mark_healthy(self, index: int) -> None:
        """Choose it again; a place whose process is gone stays as it is."""
        async with self._changed:
            self._places[index].healthy = self._places[index].replica is not None
            self._changed.notify_all()

    async def check_health(self) -> ServiceHealth:
        """Ping all at once: those that answer in time are healthy, those that do not are replaced."""

        async def check(index: int, replica: Replica) -> None:
            try:
                async with asyncio.timeout(self._settings.ping_timeout_s):
                    await replica.call("ping")
            except (ReplicaLost, TimeoutError):
                self.lost(replica.name)
            except Exception:
                self.mark_unhealthy(index)
            else:
                await self.mark_healthy(index)

        present = [(index, place.replica) for index, place in enumerate(self._places)]
        await asyncio.gather(*(check(index, replica) for index, replica in present if replica is not None))
        return self.health()

    def health(self) -> ServiceHealth:
        """As known now; asks nobody."""
        healthy = [index for index, place in enumerate(self._places) if place.healthy]
        return ServiceHealth(
            total=len(self._places),
            healthy=tuple(healthy),
            unhealthy=tuple(index for index in range(len(self._places)) if index not in healthy),
            num_calls=tuple(place.num_calls for place in self._places),
            num_respawns=self._num_respawns,
            num_spares=sum(map(_is_ready, self._spares)),
        )

    def lost(self, name: str) -> bool:
        """The replica of this name is gone or of no use any more: end what is left of it and fill its place.

        False where it has no place, as when this was said before.
        """
        if self._closed:
            return False
        for spare in self._spares:
            if _is_ready(spare) and spare.result().name == name:
                self._spares.remove(spare)
                self._begin(self._end(spare.result()))
                self._add_spares()
                return True
        for place in self._places:
            if place.replica is not None and place.replica.name == name:
                stable = place.healthy and self._now - place.since_s > self._settings.stable_after_s
                place.num_losses = 1 if stable else place.num_losses + 1
                self._begin(self._end(place.replica))
                place.replica, place.healthy, place.num_calls = None, False, 0
                self._begin(self._refill(place))
                return True
        return False

    async def _refill(self, place: _Place) -> None:
        """Until it holds."""
        while True:
            if place.num_losses > 1:
                exponent = min(place.num_losses - 2, 32)
                await asyncio.sleep(min(self._settings.backoff_s * 2**exponent, self._settings.longest_backoff_s))
            try:
                # One that is still getting ready began earlier than another one would.
                replica = await (self._spares.pop(0) if self._spares else self._started())
            except Exception:
                place.num_losses += 1
            else:
                self._num_respawns += 1
                await self._fill(place, replica)
                await asyncio.sleep(self._settings.spare_delay_s)
                self._add_spares()
                return

    def _add_spares(self) -> None:
        for _ in range(self._settings.num_spares - len(self._spares)):
            spare = asyncio.get_running_loop().create_task(self._started())
            # One that does not start is found out when it is wanted.
            spare.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._spares.append(spare)

    async def _started(self) -> Replica:
        """A new replica that is ready."""
        self._num_started += 1
        replica = await self._host.start(f"{self._name}_{self._num_started}")
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                await replica.call("ready")
        except BaseException:
            await self._end(replica)
            raise
        return replica

    async def _fill(self, place: _Place, replica: Replica) -> None:
        async with self._changed:
            place.replica, place.healthy, place.since_s, place.num_calls = replica, True, self._now, 0
            self._changed.notify_all()

    async def _end(self, replica: Replica) -> None:
        with suppress(Exception):
            await self._host.stop(replica)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _is_ready(spare: asyncio.Task[Replica]) -> bool:
    return spare.done() and not spare.cancelled() and spare.exception() is None


class WorkerCalls:
    """Calls the methods of a worker by their names, for a framework's actor."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker()
        self._running: dict[str, asyncio.Task[Any]] = {}

    async def call(self, call_id: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """What the method returns, None when it was cancelled; `ready` and `ping` need not be there."""
        found = getattr(self._worker, method, None)
        if found is None and method in ("ready", "ping"):
            return None
        if found is None:
            raise AttributeError(f"`{type(self._worker).__name__}` has no `{method}`")
        result = found(*arguments)
        if not inspect.isawaitable(result):
            return result
        task = self._running[call_id] = asyncio.ensure_future(result)
        try:
            await asyncio.wait([task])
            return None if task.cancelled() else task.result()
        finally:
            self._running.pop(call_id).cancel()

    def cancel(self, call_id: str) -> None:
        """Nobody waits for this call any more."""
        if call_id in self._running:
            self._running[call_id].cancel()


class Service:
    """A service, for whoever found it; picklable, and the same over every framework."""

    def __init__(self, name: str, pool: Replica) -> None:
        self.name = name
        self._pool = pool

    async def call(self, method: str, *arguments: Any, timeout_s: float = 60.0, most_attempts: int = 3) -> Any:
        """What the least loaded replica returns or raises; of another where it was lost. A method that may not run
        twice has `most_attempts` 1.

        Raises `ReplicaLost` when all attempts were, `NoReplica`, and TimeoutError: the replica is then not chosen
        again before `check_health` found it well.
        """
        attempt = 1
        while True:
            replica, index = await self.get_replica(timeout_s)
            try:
                async with asyncio.timeout(timeout_s):
                    return await replica.call(method, *arguments)
            except ReplicaLost:
                await self.replace(replica)
                if attempt == most_attempts:
                    raise
                attempt += 1
            except TimeoutError:
                await self.mark_unhealthy(index)
                raise
            finally:
                await self.release(replica, index)

    async def get_replica(self, timeout_s: float = 60.0) -> tuple[Replica, int]:
        """The least loaded healthy replica and its index, to be given back by `release`. Raises `NoReplica`."""
        found: tuple[Replica, int] = await self._pool.call("get_replica", timeout_s)
        return found

    async def release(self, replica: Replica, index: int) -> None:
        """A call on it is done."""
        await self._pool.call("release", replica, index)

    async def replica_at(self, index: int, timeout_s: float = 60.0) -> Replica:
        """The replica in one place, once it is healthy. Raises `NoReplica`."""
        found: Replica = await self._pool.call("replica_at", index, timeout_s)
        return found

    async def replace(self, replica: Replica) -> bool:
        """End it where it still runs, and fill its place; False where that was begun already."""
        begun: bool = await self._pool.call("lost", replica.name)
        return begun

    async def mark_unhealthy(self, index: int) -> None:
        """Choose it no more, until it is marked healthy or found so."""
        await self._pool.call("mark_unhealthy", index)

    async def mark_healthy(self, index: int) -> None:
        """Choose it again."""
        await self._pool.call("mark_healthy", index)

    async def check_health(self) -> ServiceHealth:
        """Ask every replica; those that do not answer are replaced."""
        found: ServiceHealth = await self._pool.call("check_health")
        return found

    async def health(self) -> ServiceHealth:
        """As the service knows it now."""
        found: ServiceHealth = await self._pool.call("health")
        return found
