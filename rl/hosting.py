"""What all stacks have in common: the process that hosts a part, its environment, and the store of the weights.

    stack -> Host.prepare (imports, while nobody waits) -> open_trainer | open_generator -> call(method, ...) -> close

A host that is prepared but hosts nothing yet is a spare: a lost generator is replaced by one within seconds.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl.config import RunConfig, TransportName
from rl.engine_environment import engine_environment
from rl.watchdog import FOLDER_VARIABLE, register

if TYPE_CHECKING:
    from rl.generator import GeneratorHost
    from rl.trainer import TrainerHost
    from rl.weights import WeightStoreHandle

Kind = Literal["trainer", "generator"]
_PASSED_ON = (FOLDER_VARIABLE, "ORCHESTRATE_CACHE", "HF_HOME", "HF_HUB_OFFLINE")


def model_folder(config: RunConfig) -> str:
    """The folder of the run's model on this machine; made or downloaded where it is not there yet."""
    from rl.models import prepare

    return prepare(config.model, config.seed).path


def host_environment(config: RunConfig, kind: Kind) -> dict[str, str]:
    """Variables for a process that is to host a part, set before it starts."""
    root = str(Path(__file__).parents[1])
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    common = {**passed_on, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    if kind == "generator":
        return common | engine_environment(config.engine, config.generator_gpus)
    threads = str(config.learner.num_threads)
    # Threads that wait by spinning take the cores of the engines.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return common | waiting | ({} if config.trainer_gpus else {"OMP_NUM_THREADS": threads})


@contextmanager
def weight_store(transport: TransportName) -> "Iterator[WeightStoreHandle]":
    """A store of its own, removed at the end."""
    module: Any = import_module(f"rl.transports.{transport}")
    handle: WeightStoreHandle = module.create()
    try:
        yield handle
    finally:
        module.remove(handle)


class Host:
    """One process's part. A stack makes it in a process of its own kind; used from one event loop."""

    def __init__(self) -> None:
        self._part: TrainerHost | GeneratorHost | None = None

    async def prepare(self, config: RunConfig, kind: Kind) -> int:
        """Import what takes long. Returns the number of this process."""
        await asyncio.to_thread(_import, config, kind)
        return os.getpid()

    async def open_trainer(
        self, config: RunConfig, model: str, weights: "WeightStoreHandle | None", folder: str = ""
    ) -> int:
        """Become the trainer, restored from `folder` where one is given; `model` is the model's folder, where empty
        this machine's own is found. Returns the version of its weights."""
        from rl.trainer import TrainerHost

        register("trainer")
        trainer = TrainerHost(config, model or await asyncio.to_thread(model_folder, config), weights, folder)
        self._part = trainer
        await trainer.open()
        return trainer.version

    async def open_generator(
        self, config: RunConfig, number: int, model: str, weights: "WeightStoreHandle | None", version: int = 0
    ) -> None:
        """Become a generator with the weights of `version`; `model` as for the trainer."""
        from rl.generator import GeneratorHost

        register(f"generator {number}")
        generator = GeneratorHost(config, number, model or await asyncio.to_thread(model_folder, config), weights)
        self._part = generator
        await generator.open(version)

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the part's method returns."""
        assert self._part is not None, "nothing is hosted here yet"
        return await getattr(self._part, method)(*arguments)

    async def close(self) -> None:
        """End the part; a host without one stays as it is."""
        part, self._part = self._part, None
        if part is not None:
            await part.close()


def _import(config: RunConfig, kind: Kind) -> None:
    if config.engine.emulation is not None:
        modules = ["rl.learner_emulated", "rl.trainer"] if kind == "trainer" else ["rl.engine_emulated", "rl.weights"]
    elif kind == "trainer":
        modules = ["rl.learner", "rl.trainer"]
    elif config.engine.name == "vllm":
        modules = ["vllm", "vllm.v1.engine.llm_engine", "rl.engine_vllm", "rl.weights"]
    else:
        modules = ["rl.engine_hf", "rl.weights"]
    for module in modules:
        import_module(module)
