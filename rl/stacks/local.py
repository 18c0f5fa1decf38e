"""Everything on this machine, without a framework: the trainer in a child process, each engine in a thread of this one.

    open_stack -> store (shared memory) -> HostedTrainer -> HostProcess -> TrainerHost
                                       '-> GeneratorHost, ...

The trainer has an interpreter of its own, so neither side waits for the other's. A generator is lost
here when its engine breaks down, a trainer when one of its processes does.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rl.config import RunConfig
from rl.engine_environment import set_engine_environment
from rl.generator import GeneratorHost
from rl.host_process import HostProcess
from rl.hosted import HostedTrainer
from rl.hosting import model_folder, weight_store

if TYPE_CHECKING:
    from rl.weights import WeightStoreHandle


class LocalStack:
    """A `Stack` of one child process, and of plain objects."""

    def __init__(self, config: RunConfig, model: str, weights: "WeightStoreHandle") -> None:
        self._config = config
        self._model = model
        self._weights = weights
        self._trainer_host: HostProcess | None = None
        self.trainer: HostedTrainer[HostProcess]
        self.generators: list[GeneratorHost] = []

    async def open(self, folder: str) -> None:
        """Open all parts."""
        self.generators = [self._generator(number) for number in range(self._config.num_generators)]
        # An engine that is being opened cannot be told to stop: whatever becomes of the trainer, it is waited for.
        for failed in await asyncio.gather(
            self.replace_trainer(folder), self._open_generators(), return_exceptions=True
        ):
            if failed is not None:
                raise failed

    async def replace_generator(self, number: int, version: int) -> None:
        """Another engine in the place of one that broke down."""
        generator = self._generator(number)
        try:
            await generator.open(version)
        except BaseException:
            await generator.close()
            raise
        # Until here, calls of the lost one say that it is lost.
        lost, self.generators[number] = self.generators[number], generator
        await lost.close()

    async def replace_trainer(self, folder: str) -> None:
        """Another process, restored from `folder`."""
        if self._trainer_host is not None:
            await self._trainer_host.close()
        self._trainer_host = host = HostProcess("the trainer")
        await host.prepare(self._config, "trainer")
        restored = str(Path(folder).absolute()) if folder else ""
        await host.begin("open_trainer", self._config, self._model, self._weights, restored)
        self.trainer = HostedTrainer(host)

    async def close(self) -> None:
        """End all parts that were opened."""
        async with AsyncExitStack() as ends:
            if self._trainer_host is not None:
                ends.push_async_callback(self._trainer_host.close)
            for generator in self.generators:
                ends.push_async_callback(generator.close)

    async def _open_generators(self) -> None:
        for generator in self.generators:
            await generator.open()

    def _generator(self, number: int) -> GeneratorHost:
        return GeneratorHost(self._config, number, self._model, self._weights)


@asynccontextmanager
async def open_stack(config: RunConfig, folder: str = "") -> AsyncIterator[LocalStack]:
    """The parts on this machine."""
    if config.engine.name == "vllm":
        set_engine_environment(config.engine, config.generator_gpus)
    model = await asyncio.to_thread(model_folder, config)
    with weight_store(config.transport or "shared_memory") as weights:
        stack = LocalStack(config, model, weights)
        try:
            await stack.open(folder)
            yield stack
        finally:
            await stack.close()
