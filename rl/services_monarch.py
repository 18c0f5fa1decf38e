"""Services over Monarch: the pool is an actor that owns its replicas' processes, and so hears when one dies.

    client --Service (actor in this process)--> spawn_procs --> Process (actor) --> worker
                 ^-- __supervise__(MeshFailure) --'

Whoever starts one calls `prepare_client` first.
"""

import asyncio
import os
import uuid
from typing import Any

from rl.services import (
    Replica,
    ReplicaLost,
    ReplicaPool,
    ServiceHealth,
    ServiceSettings,
    Worker,
    WorkerCalls,
)

POLL_VARIABLE = "HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY"
_POLL = "300ms"
"""How often Monarch looks for processes that died; it says so one poll later at most."""
os.environ.setdefault(POLL_VARIABLE, _POLL)

from monarch.actor import (  # noqa: E402 - Monarch reads the variable when it is loaded
    Actor,
    ActorError,
    MeshFailure,
    concurrent_endpoint,
    context,
    default_bootstrap_cmd,
    get_or_spawn_controller,
    this_host,
    this_proc,
)
from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError  # noqa: E402

_CONTROL_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


class Process(Actor):  # type: ignore[misc]  # Monarch has no types
    """The one actor of a replica's process. A single endpoint, so a worker's method may have any name."""

    def __init__(self, worker: Worker) -> None:
        self._calls = WorkerCalls(worker)

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def invoke(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call the worker."""
        return await self._calls.call(method, arguments)


class MonarchReplica:
    """Reference to a replica, from any process of the mesh."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns or raises. Raises `ReplicaLost`."""
        try:
            return await _done(self._actor.invoke.call_one(method, arguments))
        except ActorError as error:
            raise error.exception from None
        except SupervisionError as error:
            raise ReplicaLost(f"`{self.name}` is gone: {_first_line(error)}") from None


class _Host:
    """Processes on this host, owned by the actor that starts them."""

    def __init__(self, worker: Worker, settings: ServiceSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._processes: dict[str, Any] = {}

    async def start(self, name: str) -> Replica:
        command = default_bootstrap_cmd().with_env(self._settings.environment)
        processes = this_host().spawn_procs(
            per_host={"procs": 1}, name=f"{mesh_name(name)}procs", bootstrap_command=command
        )
        self._processes[name] = processes
        return MonarchReplica(name, processes.spawn(mesh_name(name), Process, self._worker))

    async def stop(self, replica: Replica) -> None:
        processes = self._processes.pop(replica.name, None)
        if processes is not None:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await _done(processes.stop())


class Service(Actor):  # type: ignore[misc]
    """A pool of replicas; the actor that others find by name."""

    def __init__(self, name: str, worker: Worker, settings: ServiceSettings) -> None:
        self._pool = ReplicaPool(name, _Host(worker, settings), settings)
        self._names: dict[str, str] = {}

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def invoke(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call the pool."""
        found = getattr(self._pool, method)(*arguments)
        return await found if asyncio.iscoroutine(found) else found

    async def __supervise__(self, failure: MeshFailure) -> bool:
        """A process died. Every one that may die is a replica, so nothing goes on to the client."""
        self._pool.lost(replica_name(failure.mesh_name))
        return True
