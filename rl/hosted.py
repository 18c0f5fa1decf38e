"""The parts of a run that live in another process, as the loop sees them.

    loop -> HostedTrainer | HostedGenerator -> PartHost.call -> (the other process) rl.hosting.Host.call -> the part

Each stack brings its own way to reach a process; everything else is the same.
"""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rl.stack import GroupRequest, Loaded, PartLost, Published
from rl.types import Batch, Group, TrainMetrics

OPEN_TIMEOUT_S = 900.0
"""For a process with all its imports, a model that has to be downloaded, and an engine."""


async def opened(answer: Awaitable[Any], name: str, method: str) -> Any:
    """The answer to a call that belongs to the opening of the host `name`, and so has a limit. Raises `PartLost`."""
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            return await answer
    except TimeoutError as error:
        raise PartLost(f"{name} has not done `{method}` within {OPEN_TIMEOUT_S:g} s") from error


class PartHost(Protocol):
    """A way to the process that hosts a part."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the part's method returns or raises. Raises `PartLost` when the process is gone."""
        ...


HostT = TypeVar("HostT", bound=PartHost)


class Hosted(Generic[HostT]):
    """A part behind its host."""

    def __init__(self, host: HostT) -> None:
        self.host = host

    async def ping(self) -> int:
        """A call without work; the number of its process."""
        process: int = await self.host.call("ping")
        return process


class HostedTrainer(Hosted[HostT]):
    """A `Trainer`."""

    async def update(self, batch: Batch) -> TrainMetrics:
        """One optimizer step."""
        metrics: TrainMetrics = await self.host.call("update", batch)
        return metrics

    async def publish(self) -> Published:
        """Let generators load the weights."""
        published: Published = await self.host.call("publish")
        return published

    async def save(self, folder: str) -> None:
        """Into a folder that the trainer's machine sees too."""
        await self.host.call("save", str(Path(folder).absolute()))


class HostedGenerator(Hosted[HostT]):
    """A `Generator`."""

    async def generate(self, request: GroupRequest) -> Group:
        """The finished group."""
        group: Group = await self.host.call("generate", request)
        return group

    async def load(self, version: int) -> Loaded:
        """Go on with other weights."""
        loaded: Loaded = await self.host.call("load", version)
        return loaded
