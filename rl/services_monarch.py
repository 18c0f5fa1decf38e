"""Services over Monarch: the pool is an actor that owns its replicas' processes, and so hears when one dies.

    open_service -> ServiceActor (in this process) -> spawn_procs -> Process (actor) -> worker
                         '-- __supervise__(MeshFailure), one poll after a process died

Discovery is an actor too (`ServiceRegistry`), which any process of the mesh reaches: `get_service(name)`.
"""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from rl.process_end import process_end
from rl.services import Replica, ReplicaLost, ReplicaPool, Service, ServiceSettings, Worker, WorkerCalls

# How often Monarch looks whether processes live. It reads the variable when it is imported, so this module comes first.
os.environ.setdefault("HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY", "300ms")

import psutil
from monarch import actor
from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import (
    Actor,
    ActorError,
    MeshFailure,
    concurrent_endpoint,
    default_bootstrap_cmd,
    endpoint,
    get_or_spawn_controller,
    this_host,
    this_proc,
)

_STOP_TIMEOUT_S = 15.0
_LAST_WORDS_S = 0.5
_REGISTRY = "service_registry"


class Process(Actor):  # type: ignore[misc]  # Monarch has no types
    """The actor of a replica. One endpoint for all methods, so a worker may name and mix them as it likes."""

    def __init__(self, worker: Worker) -> None:
        self._calls = WorkerCalls(worker)

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def invoke(self, call_id: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call the worker."""
        return await self._calls.call(call_id, method, arguments)

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def pid(self) -> int:
        """Of this process, on its host."""
        return os.getpid()

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def forget(self, call_id: str) -> None:
        """Cancel a call."""
        self._calls.cancel(call_id)


class MonarchReplica:
    """Reference to an actor of this kind, from any process of the mesh."""

    def __init__(self, name: str, actor: Any, host: str = "", pid: int = 0) -> None:
        """`host` and `pid` say where its process is, if it has one of its own."""
        self.name = name
        self._actor = actor
        self._host = host
        self._pid = pid

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns or raises; a task that is cancelled ends it there too.

        Raises `ReplicaLost`.
        """
        call_id = uuid.uuid4().hex
        try:
            reply = asyncio.ensure_future(_reply(self._actor.invoke.call_one(call_id, method, arguments)))
            try:
                await self._reply_or_end(reply)
            except asyncio.CancelledError:
                reply.cancel()
                with suppress(SupervisionError):
                    self._actor.forget.broadcast(call_id)
                raise
            return reply.result()
        except ActorError as error:
            raise error.exception from None
        except SupervisionError as error:
            raise ReplicaLost(f"`{self.name}` is gone: {str(error).splitlines()[-1].strip()}") from None

    async def _reply_or_end(self, reply: "asyncio.Task[Any]") -> None:
        """Until the reply is there. Raises `ReplicaLost` where the process ends first.

        Monarch finds that out too, but where it has just asked the process something it waits 30 s for the answer.
        """
        if self._host != socket.gethostname():
            await asyncio.wait((reply,))
            return
        with process_end(self._pid) as end:
            await asyncio.wait((reply, end), return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            # Monarch knows how the process ended, if it knows at all by now; and a reply may be on its way.
            await asyncio.wait((reply,), timeout=_LAST_WORDS_S)
        if not reply.done():
            reply.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise ReplicaLost(f"`{self.name}` is gone: its process {self._pid} has ended")


async def _reply(future: Any) -> Any:
    """Monarch's futures can be awaited but are no coroutines."""
    return await future


class _Host:
    """Processes on this host, owned by the actor that starts them."""

    def __init__(self, worker: Worker, settings: ServiceSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._started: dict[str, tuple[Any, psutil.Process]] = {}

    async def start(self, name: str) -> Replica:
        command = default_bootstrap_cmd().with_env(self._settings.environment)
        processes = this_host().spawn_procs(per_host={"procs": 1}, name=f"{name}_procs", bootstrap_command=command)
        mesh = processes.spawn(name, Process, self._worker)
        async with asyncio.timeout(self._settings.ready_timeout_s):
            pid: int = await mesh.pid.call_one()
        self._started[name] = processes, psutil.Process(pid)
        return MonarchReplica(name, mesh, socket.gethostname(), pid)

    async def stop(self, replica: Replica) -> None:
        if replica.name in self._started:
            processes, process = self._started.pop(replica.name)
            # Monarch would wait for a worker that is in the middle of something, or that hangs.
            with suppress(psutil.NoSuchProcess):
                process.kill()
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await processes.stop()


class ServiceActor(Process):
    """A pool of replicas, and their supervisor."""

    def __init__(self, name: str, worker: Worker, settings: ServiceSettings) -> None:
        self._pool = ReplicaPool(name, _Host(worker, settings), settings)
        super().__init__(lambda: self._pool)

    async def __supervise__(self, failure: MeshFailure) -> bool:
        """A process died. All that this actor started are replicas, so nothing of it concerns the client."""
        # A mesh is named after the replica, with something behind it.
        self._pool.lost(failure.mesh_name.rpartition("-")[0])
        return True


class ServiceRegistry(Actor):  # type: ignore[misc]
    """Services by name."""

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}

    @endpoint  # type: ignore[untyped-decorator]
    async def register(self, service: Service) -> None:
        """Let others find it. Raises ValueError where the name is taken."""
        if service.name in self._services:
            raise ValueError(f"there is a service `{service.name}` already")
        self._services[service.name] = service

    @endpoint  # type: ignore[untyped-decorator]
    async def unregister(self, name: str) -> None:
        """Nobody finds it any more."""
        self._services.pop(name, None)

    @endpoint  # type: ignore[untyped-decorator]
    async def get(self, name: str) -> Service | None:
        """The service of this name."""
        return self._services.get(name)

    @endpoint  # type: ignore[untyped-decorator]
    async def list_services(self) -> list[str]:
        """The names of all."""
        return sorted(self._services)


@asynccontextmanager
async def open_service(name: str, worker: Worker, settings: ServiceSettings) -> AsyncIterator[Service]:
    """A service whose replicas run on this host, found by its name until it is closed.

    Raises ValueError where the name is taken or no identifier, and what the start of a worker raised.
    """
    if not name.isidentifier():
        raise ValueError(f"`{name}` is no name for a service\n\nhint: letters, digits and underscores")
    mesh = this_proc().spawn(name, ServiceActor, name, worker, settings)
    pool = MonarchReplica(name, mesh)
    service = Service(name, pool)
    registry = await _registry()
    try:
        await registry.register.call_one(service)
    except ActorError as error:
        raise error.exception from None
    # Of a replica that is being ended because its process is gone, Monarch may tell this process, not its supervisor.
    with faults_are_data(f"{name}_"):
        try:
            await pool.call("open")
            yield service
        finally:
            await registry.unregister.call_one(name)
            await pool.call("close")
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await mesh.stop()


@contextmanager
def faults_are_data(prefix: str = "") -> Iterator[None]:
    """A process that dies shows in the calls to it, where what it hosts has a name that begins like this. Monarch by
    itself would interrupt this process's main thread for one that no supervisor answers for."""
    before = actor.unhandled_fault_hook

    def note(failure: MeshFailure) -> None:
        if failure.mesh_name.startswith(prefix):
            logging.getLogger(__name__).warning("Monarch lost `%s`: %s", failure.mesh_name, failure.report())
        else:
            before(failure)

    actor.unhandled_fault_hook = note
    try:
        yield
    finally:
        actor.unhandled_fault_hook = before


async def get_service(name: str) -> Service:
    """The service of this name, from any process of the mesh. Raises KeyError."""
    found: Service | None = await (await _registry()).get.call_one(name)
    if found is None:
        raise KeyError(f"there is no service `{name}`, but {', '.join(await list_services()) or 'none at all'}")
    return found


async def list_services() -> list[str]:
    """The names of all services."""
    names: list[str] = await (await _registry()).list_services.call_one()
    return names


async def _registry() -> Any:
    return await get_or_spawn_controller(_REGISTRY, ServiceRegistry)
