"""Links between two actors under Monarch: one-sided reads of the trainer's memory, and a message to an endpoint."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from monarch.actor import Actor, default_bootstrap_cmd, endpoint, this_host

from rl.bench.links import Link, LinkName
from rl.bench.links.ends import MessageLink, Receiver, Sender, StoreLink

_TIMEOUT_S = 120.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class HostedEnd(Actor):  # type: ignore[misc]  # Monarch has no types
    """An end in a process of its own."""

    def __init__(self, kind: str) -> None:
        self._end = Sender() if kind == "sender" else Receiver()

    @endpoint  # type: ignore[untyped-decorator]
    async def call(self, method: str, *arguments: Any) -> Any:
        """What the end's method returns."""
        return await getattr(self._end, method)(*arguments)


class MonarchEnd:
    """Reference to an end, from any process of the mesh."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What its method returns or raises. Raises TimeoutError."""

        async def call() -> Any:
            return await self._actor.call.call_one(method, *arguments)

        return await asyncio.wait_for(call(), _TIMEOUT_S)


@asynccontextmanager
async def open_link(name: LinkName, most_bytes: int) -> AsyncIterator[Link]:
    """The link of this name."""
    processes = [
        this_host().spawn_procs(
            per_host={"procs": 1},
            name=f"bench_{kind}",
            bootstrap_command=default_bootstrap_cmd().with_env(_ENVIRONMENT),
        )
        for kind in ("sender", "receiver")
    ]
    try:
        sender, receiver = (
            MonarchEnd(mesh.spawn(kind, HostedEnd, kind))
            for mesh, kind in zip(processes, ("sender", "receiver"), strict=True)
        )
        if name == "monarch_message":
            yield MessageLink(sender.ask, receiver)
        else:
            yield StoreLink(name, sender.ask, receiver.ask)
    finally:
        for mesh in processes:
            await asyncio.wait_for(_stopped(mesh), _TIMEOUT_S)


async def _stopped(mesh: Any) -> None:
    await mesh.stop()
