"""Services over Ray: the pool is a named actor, each replica an actor of its own, and a call that never ends tells of
its death.

    open_service -> ServiceActor (named) -> Process (actor, max_restarts=0) -> worker
                         '-- RayActorError of the call that never ends

Discovery is Ray's own register of named actors. The process is connected to a cluster already (`rl.ray_cluster`).
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import list_named_actors

from rl.services import Replica, ReplicaLost, ReplicaPool, Service, ServiceSettings, Worker, WorkerCalls

_PREFIX = "service:"
_MOST_CALLS = 1000
"""Calls that run in one actor at a time."""


class Process:
    """The actor of a replica."""

    def __init__(self, worker: Worker) -> None:
        self._calls = WorkerCalls(worker)

    async def invoke(self, call_id: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call the worker."""
        return await self._calls.call(call_id, method, arguments)

    async def forget(self, call_id: str) -> None:
        """Cancel a call."""
        self._calls.cancel(call_id)

    async def live(self) -> None:
        """Ends with the process."""
        await asyncio.Event().wait()


class RayReplica:
    """Reference to an actor of this kind, from any process of the cluster."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns or raises; a task that is cancelled ends it there too.

        Raises `ReplicaLost`.
        """
        call_id = uuid.uuid4().hex
        try:
            return await asyncio.shield(self._actor.invoke.remote(call_id, method, arguments).as_future())
        except asyncio.CancelledError:
            self._actor.forget.remote(call_id)
            raise
        except RayActorError as gone:
            raise ReplicaLost(f"`{self.name}` is gone: {' '.join(str(gone).split())}") from None
        except RayTaskError as failed:
            raise (failed.cause if isinstance(failed.cause, Exception) else failed) from None


class _Host:
    """Actors somewhere on the cluster, owned by the actor that starts them."""

    def __init__(self, worker: Worker, settings: ServiceSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._actors: dict[str, Any] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self.pool: ReplicaPool

    async def start(self, name: str) -> Replica:
        settings = self._settings
        self._actors[name] = actor = _actor(
            Process,
            num_cpus=settings.cpus,
            num_gpus=settings.gpus,
            max_restarts=0,
            runtime_env={"env_vars": settings.environment},
        ).remote(self._worker)
        watch = asyncio.ensure_future(self._watch(name, actor))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return RayReplica(name, actor)

    async def stop(self, replica: Replica) -> None:
        actor = self._actors.pop(replica.name, None)
        if actor is not None:
            ray.kill(actor)

    async def _watch(self, name: str, actor: Any) -> None:
        with suppress(RayActorError):
            await actor.live.remote()
        self.pool.lost(name)


class ServiceActor(Process):
    """A pool of replicas, and their supervisor."""

    def __init__(self, name: str, worker: Worker, settings: ServiceSettings) -> None:
        host = _Host(worker, settings)
        host.pool = ReplicaPool(name, host, settings)
        super().__init__(lambda: host.pool)


@asynccontextmanager
async def open_service(name: str, worker: Worker, settings: ServiceSettings) -> AsyncIterator[Service]:
    """A service whose replicas run on the cluster, found by its name until it is closed.

    Raises ValueError where the name is taken or no identifier, and what the start of a worker raised.
    """
    if not name.isidentifier():
        raise ValueError(f"`{name}` is no name for a service\n\nhint: letters, digits and underscores")
    actor = _actor(ServiceActor, name=f"{_PREFIX}{name}", num_cpus=0).remote(name, worker, settings)
    pool = RayReplica(name, actor)
    try:
        await pool.call("open")
        yield Service(name, pool)
    finally:
        await pool.call("close")
        ray.kill(actor)


async def get_service(name: str) -> Service:
    """The service of this name, from any process of the cluster and the namespace. Raises KeyError."""
    try:
        return Service(name, RayReplica(name, await asyncio.to_thread(ray.get_actor, f"{_PREFIX}{name}")))
    except ValueError:
        raise KeyError(
            f"there is no service `{name}`, but {', '.join(await list_services()) or 'none at all'}"
        ) from None


async def list_services() -> list[str]:
    """The names of all services of the namespace."""
    names: list[str] = await asyncio.to_thread(list_named_actors)
    return sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))


def _actor(of: type, **options: Any) -> Any:
    return ray.remote(of).options(max_concurrency=_MOST_CALLS, **options)
