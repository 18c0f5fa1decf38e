"""Every part in a process of its own under Monarch, on this host: a service of one trainer, a service of generators.

    loop -> HostedTrainer | HostedGenerator -> ReplicaHost -> Part (in its process) -> TrainerHost | GeneratorHost

The services (`rl.services_monarch`) own the processes and are told when one dies. To the loop that is `PartLost`; a
generator's place is taken by a spare whose imports are done, while its own successor gets ready in the background.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import RunConfig
from rl.gather import gather
from rl.hosted import OPEN_TIMEOUT_S, HostedGenerator, HostedTrainer
from rl.hosting import Host, Kind, host_environment, model_folder, weight_store
from rl.services import Replica, ReplicaLost, Service, ServiceSettings
from rl.stack import PartLost
from rl.stacks.composed import ComposedStack

if TYPE_CHECKING:
    from rl.weights import WeightStoreHandle

_CLOSE_TIMEOUT_S = 15.0
_OPENING_S = 10.0
"""A generator whose process is ready is open by then."""
_MOST_OPENINGS = 3
"""Processes in a row that may be lost while they open."""


class Part(Host):
    """What a replica of the services hosts."""

    def __init__(self, config: RunConfig, kind: Kind) -> None:
        super().__init__()
        self._config = config
        self._kind = kind

    async def ready(self) -> None:
        """With all imports done."""
        await self.prepare(self._config, self._kind)

    async def take_gpus(self, devices: str) -> None:
        """Use these GPUs of the host and no others; CUDA has not been used before."""
        os.environ["CUDA_VISIBLE_DEVICES"] = devices


class ReplicaHost:
    """A replica that became a part of the run."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the part's method returns or raises. Raises `PartLost` when the process is gone."""
        return await _ask(self.replica, "call", method, *arguments)


class MonarchTrainers:
    """The trainer of a run, one after the other."""

    def __init__(self, config: RunConfig, model: str, weights: "WeightStoreHandle", service: Service) -> None:
        self._config = config
        self._model = model
        self._weights = weights
        self._service = service
        self.living: HostedTrainer[ReplicaHost] | None = None

    async def replace(self, folder: str) -> None:
        """Open the trainer, or another one where there was one, restored from `folder`."""
        restored = str(Path(folder).absolute()) if folder else ""
        devices = _devices(0, self._config.trainer_gpus)
        replica = await _opened(
            self._service,
            0,
            None if self.living is None else self.living.host.replica,
            devices,
            ("open_trainer", self._config, self._model, self._weights, restored),
        )
        self.living = HostedTrainer(ReplicaHost(replica))

    async def close(self) -> None:
        """End what is hosted; the process ends with the service."""
        if self.living is not None:
            await _close(self.living.host.replica)


class MonarchGenerators:
    """The generators of a run."""

    def __init__(self, config: RunConfig, model: str, weights: "WeightStoreHandle", service: Service) -> None:
        self._config = config
        self._model = model
        self._weights = weights
        self._service = service
        self.living: list[HostedGenerator[ReplicaHost]] = []

    async def open(self) -> None:
        """All of them, with the model's own weights."""
        replicas = await gather(self._opened(number, None, 0) for number in range(self._config.num_generators))
        self.living = [HostedGenerator(ReplicaHost(replica)) for replica in replicas]

    async def replace(self, number: int, version: int) -> None:
        """Another generator in the place of one that is lost."""
        replica = await self._opened(number, self.living[number].host.replica, version)
        self.living[number] = HostedGenerator(ReplicaHost(replica))

    async def close(self) -> None:
        """End what is hosted; the processes end with the service."""
        await gather(_close(generator.host.replica) for generator in self.living)

    async def _opened(self, number: int, lost: Replica | None, version: int) -> Replica:
        config = self._config
        devices = _devices(config.trainer_gpus + number * config.generator_gpus, config.generator_gpus)
        opening = ("open_generator", config, number, self._model, self._weights, version)
        return await _opened(self._service, number, lost, devices, opening)


@asynccontextmanager
async def open_trainers(
    config: RunConfig, model: str, weights: "WeightStoreHandle", folder: str
) -> AsyncIterator[MonarchTrainers]:
    """The trainer, restored from `folder` where one is given, and its service."""
    async with _service(config, "trainer", ServiceSettings()) as service:
        trainers = MonarchTrainers(config, model, weights, service)
        try:
            await trainers.replace(folder)
            yield trainers
        finally:
            await trainers.close()


@asynccontextmanager
async def open_generators(
    config: RunConfig, model: str, weights: "WeightStoreHandle"
) -> AsyncIterator[MonarchGenerators]:
    """All generators, their service and its spare."""
    settings = ServiceSettings(num_replicas=config.num_generators, num_spares=1, spare_delay_s=_OPENING_S)
    async with _service(config, "generator", settings) as service:
        generators = MonarchGenerators(config, model, weights, service)
        try:
            await generators.open()
            yield generators
        finally:
            await generators.close()


@asynccontextmanager
async def open_stack(config: RunConfig, folder: str = "") -> AsyncIterator[ComposedStack]:
    """The parts in processes of this host."""
    from rl.services_monarch import faults_are_data

    model = await asyncio.to_thread(model_folder, config)
    with faults_are_data(), weight_store(config.transport or "shared_memory") as weights:
        async with (
            open_trainers(config, model, weights, folder) as trainers,
            open_generators(config, model, weights) as generators,
        ):
            yield ComposedStack(trainers, generators)


@asynccontextmanager
async def _service(config: RunConfig, kind: Kind, settings: ServiceSettings) -> AsyncIterator[Service]:
    from rl.services_monarch import open_service

    there = settings.model_copy(
        update={"environment": host_environment(config, kind), "ready_timeout_s": OPEN_TIMEOUT_S}
    )
    async with open_service(f"rl_{kind}_{uuid.uuid4().hex[:8]}", partial(Part, config, kind), there) as service:
        yield service


async def _opened(
    service: Service, index: int, lost: Replica | None, devices: str, opening: tuple[str, *tuple[Any, ...]]
) -> Replica:
    """The replica in this place once it hosts its part; another than `lost`, whose process is ended."""
    for attempt in range(_MOST_OPENINGS):
        if lost is not None:
            await service.replace(lost)
        replica = await service.replica_at(index, OPEN_TIMEOUT_S)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                if devices:
                    await _ask(replica, "take_gpus", devices)
                await _ask(replica, *opening)
        except PartLost:
            if attempt + 1 == _MOST_OPENINGS:
                raise
            lost = replica
        except TimeoutError:
            raise PartLost(f"`{replica.name}` has not done `{opening[0]}` within {OPEN_TIMEOUT_S:g} s") from None
        else:
            return replica
    raise AssertionError("the loop ends by return or raise")


async def _ask(replica: Replica, method: str, *arguments: Any) -> Any:
    try:
        return await replica.call(method, *arguments)
    except ReplicaLost as lost:
        raise PartLost(str(lost)) from None


async def _close(replica: Replica) -> None:
    """End the part, where the process still answers."""
    with suppress(Exception):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await replica.call("close")


def _devices(first: float, number: float) -> str:
    """The numbers of a part's GPUs, the ones before taken by others; parts that want less than one share it."""
    if not number:
        return ""
    return ",".join(str(device) for device in range(int(first), int(first) + max(1, round(number))))
