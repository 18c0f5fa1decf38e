"""Everything in this process: the trainer in a thread of its own, each engine in another.

    open_stack -> store (shared memory) -> TrainerHost -> GeneratorHost, ...

A generator is lost here when its engine breaks down, a trainer when one of its child processes does.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from rl.config import RunConfig
from rl.engine_environment import set_engine_environment
from rl.generator import GeneratorHost
from rl.hosting import model_folder, weight_store
from rl.trainer import TrainerHost
from rl.watchdog import register

if TYPE_CHECKING:
    from rl.weights import WeightStoreHandle


_SWITCH_INTERVAL_S = 0.0005
"""Python's own is 0.005: so long each operation of the trainer may wait for the engine's thread to let it go on."""


class LocalStack:
    """A `Stack` of plain objects."""

    def __init__(self, config: RunConfig, model: str, weights: "WeightStoreHandle") -> None:
        self._config = config
        self._model = model
        self._weights = weights
        self.trainer: TrainerHost
        self.generators: list[GeneratorHost] = []

    async def open(self, folder: str) -> None:
        """Open all parts."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        register("trainer")
        # Before the engines: vLLM takes the setting of threads away from all who come after it.
        await self.replace_trainer(folder)
        for number in range(self._config.num_generators):
            self.generators.append(self._generator(number))
            await self.generators[-1].open()

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
        """Another trainer in the place of one that lost a process."""
        if hasattr(self, "trainer"):
            await self.trainer.close()
        self.trainer = TrainerHost(self._config, self._model, self._weights, folder)
        await self.trainer.open()

    async def close(self) -> None:
        """End all parts that were opened."""
        async with AsyncExitStack() as ends:
            if hasattr(self, "trainer"):
                ends.push_async_callback(self.trainer.close)
            for generator in self.generators:
                ends.push_async_callback(generator.close)

    def _generator(self, number: int) -> GeneratorHost:
        return GeneratorHost(self._config, number, self._model, self._weights)


@asynccontextmanager
async def open_stack(config: RunConfig, folder: str = "") -> AsyncIterator[LocalStack]:
    """The parts in this process."""
    if config.engine.name == "vllm":
        set_engine_environment(config.engine, config.generator_gpus)
    model = await asyncio.to_thread(model_folder, config)
    with weight_store(config.transport or "shared_memory") as weights:
        stack, switch_interval_s = LocalStack(config, model, weights), sys.getswitchinterval()
        try:
            await stack.open(folder)
            yield stack
        finally:
            await stack.close()
            sys.setswitchinterval(switch_interval_s)
