"""Links between two actors of a Ray of its own: its object store, the argument of a call, and direct transport (gloo).

Imports ray when a link is opened, because Ray takes its settings when it is imported.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rl.bench.links import Link, LinkName, Move
from rl.bench.links.ends import Arrival, MessageLink, Receiver, Sender, StoreLink
from rl.ray_cluster import connected

_TIMEOUT_S = 120.0
_ROOM = 7
"""Versions that the object store has room for: three that are kept, the next one, one that is read, and some air."""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class RayEnd:
    """An end in an actor; goes to other processes of the cluster."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What its method returns or raises. Raises TimeoutError."""
        reference = getattr(self.actor, method).remote(*arguments)
        return await asyncio.wait_for(reference.as_future(), _TIMEOUT_S)


class DirectLink:
    """By Ray direct transport."""

    def __init__(self, sender: RayEnd, receiver: RayEnd) -> None:
        self._sender = sender
        self._receiver = receiver

    async def open(self, num_bytes: int) -> None:
        """Both ends."""
        await self._sender.ask("open", num_bytes)
        await self._receiver.ask("open", num_bytes)

    async def move(self, version: int) -> Move:
        """Only the reference goes through this process."""
        await self._sender.ask("prepare", version)
        arrival: Arrival = await self._receiver.ask("take", self._sender.actor.weights.remote(), version)
        began_s: float = await self._sender.ask("began_s")
        return Move(seconds=arrival.at_s - began_s, copy_s=arrival.copy_s)

    async def close(self) -> None:
        """Both ends."""
        await self._receiver.ask("close")
        await self._sender.ask("close")


@asynccontextmanager
async def open_link(name: LinkName, most_bytes: int) -> AsyncIterator[Link]:
    """The link of this name, on a Ray of its own."""
    with connected(object_store_bytes=_ROOM * most_bytes + (256 << 20)):
        if name == "ray_direct":
            yield await _direct_link()
            return
        sender, receiver = _end(Sender), _end(Receiver)
        yield MessageLink(sender.ask, receiver) if name == "ray_message" else StoreLink(name, sender.ask, receiver.ask)


async def _direct_link() -> DirectLink:
    from ray.experimental.collective import create_collective_group

    from rl.bench.links.ray_direct import DirectReceiver, DirectSender

    sender, receiver = _end(DirectSender, direct=True), _end(DirectReceiver, direct=True)
    group = asyncio.to_thread(create_collective_group, [sender.actor, receiver.actor], backend="gloo")
    await asyncio.wait_for(group, _TIMEOUT_S)
    return DirectLink(sender, receiver)


def _end(kind: type, direct: bool = False) -> RayEnd:
    import ray

    actor: Any = ray.remote(enable_tensor_transport=True)(kind) if direct else ray.remote(kind)
    return RayEnd(actor.options(num_cpus=0, runtime_env={"env_vars": _ENVIRONMENT}).remote())
