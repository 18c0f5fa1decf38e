"""Every part in an actor of Ray: one for the trainer, one for each generator, and a spare.

    loop -> HostedTrainer | HostedGenerator -> HostActor -> Ray -> Host (in its process) -> TrainerHost | GeneratorHost

Ray restarts nothing (`max_restarts=0`): an actor that dies is `PartLost` to the loop, which says what comes in its
place. That is the spare, whose imports are done; its own successor gets ready in the background. Where generators have
GPUs there is no spare, because it would hold some.
"""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import RunConfig
from rl.gather import gather
from rl.hosted import HostedGenerator, HostedTrainer, opened
from rl.hosting import Host, Kind, host_environment, model_folder, weight_store
from rl.ray_cluster import connected, is_one_host
from rl.stack import PartLost

if TYPE_CHECKING:
    from rl.weights import WeightStoreHandle

_CLOSE_TIMEOUT_S = 15.0
_MOST_CALLS = 1000
"""Calls that run in one actor at a time; the loop has far fewer."""


class HostActor:
    """One process of the cluster, and the part in it."""

    def __init__(self, config: RunConfig, kind: Kind, name: str) -> None:
        import ray

        gpus = config.trainer_gpus if kind == "trainer" else config.generator_gpus
        self.name = name
        self._pid = 0
        self._actor: Any = (
            ray.remote(Host)
            .options(
                name=name,
                num_cpus=0,
                num_gpus=gpus,
                max_restarts=0,
                max_concurrency=_MOST_CALLS,
                scheduling_strategy="DEFAULT" if gpus else "SPREAD",
                runtime_env={"env_vars": host_environment(config, kind)},
            )
            .remote()
        )

    async def prepare(self, config: RunConfig, kind: Kind) -> None:
        """Wait until its imports are done. Raises `PartLost`."""
        self._pid = await self.begin("prepare", config, kind)

    async def begin(self, method: str, *arguments: Any) -> Any:
        """A call that belongs to the opening, and so has a limit. Raises `PartLost`."""
        return await opened(self.ask(method, *arguments), f"`{self.name}`", method)

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the part's method returns or raises. Raises `PartLost` when the process is gone."""
        return await self.ask("call", method, *arguments)

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What the host's method returns or raises; it is cancelled there when it is cancelled here.

        Raises `PartLost` when the process is gone.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            reference = getattr(self._actor, method).remote(*arguments)
            answer = asyncio.ensure_future(reference.as_future())
            try:
                return await asyncio.shield(answer)
            except asyncio.CancelledError:
                answer.add_done_callback(lambda done: done.cancelled() or done.exception())
                ray.cancel(reference)
                raise
        except RayActorError as gone:
            raise PartLost(f"`{self.name}` (process {self._pid}): {_how(gone)}") from None
        except RayTaskError as failed:
            if isinstance(failed.cause, Exception):
                raise failed.cause from None
            raise

    async def close(self) -> None:
        """End the part, then the process, whether it answers or not."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self.ask("close")
        self.kill()

    def kill(self) -> None:
        """End the process."""
        import ray

        ray.kill(self._actor)


class RayGenerators:
    """The generators of a run, and the spare."""

    def __init__(self, config: RunConfig, model: str, weights: "WeightStoreHandle") -> None:
        self._config = config
        self._model = model
        self._weights = weights
        self._name = f"rl-{uuid.uuid4().hex[:8]}-generator"
        self._numbers = itertools.count()
        self._hosts: list[HostActor] = []
        self._spare: asyncio.Task[HostActor] | None = None
        self.living: list[HostedGenerator[HostActor]] = []

    async def open(self) -> None:
        """All of them, with the model's own weights; nobody waits for the spare."""
        self._prepare_spare()
        self.living = list(await gather(self._opened(number) for number in range(self._config.num_generators)))

    async def replace(self, number: int, version: int) -> None:
        """Make the spare generator `number`, or a process that begins now where the spare is gone too."""
        self._forget(self.living[number].host)
        try:
            spare = await self._taken_spare()
            self.living[number] = await self._opened(number, version, spare)
        except PartLost:
            self.living[number] = await self._opened(number, version)
        finally:
            self._prepare_spare()

    async def close(self) -> None:
        """End all processes."""
        if self._spare is not None:
            self._spare.cancel()
            await asyncio.wait([self._spare])
        await asyncio.gather(*(host.close() for host in self._hosts))
        self._hosts = []

    async def _opened(self, number: int, version: int = 0, host: HostActor | None = None) -> HostedGenerator[HostActor]:
        host = host or await self._prepared()
        await host.begin("open_generator", self._config, number, self._model, self._weights, version)
        return HostedGenerator(host)

    async def _taken_spare(self) -> HostActor | None:
        """The spare, once it is ready; None where there is none. Raises `PartLost`."""
        spare = self._spare
        if spare is None:
            return None
        # Whoever waits may be cancelled, and another one wait for it then.
        await asyncio.wait([spare])
        if self._spare is not spare:
            return await self._taken_spare()
        self._spare = None
        return spare.result()

    async def _prepared(self) -> HostActor:
        host = HostActor(self._config, "generator", f"{self._name}-{next(self._numbers)}")
        self._hosts.append(host)
        try:
            await host.prepare(self._config, "generator")
        except PartLost:
            self._forget(host)
            raise
        return host

    def _prepare_spare(self) -> None:
        if not self._config.generator_gpus and self._spare is None:
            self._spare = asyncio.create_task(self._prepared())
            # A spare that is lost is found out when it is wanted.
            self._spare.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _forget(self, host: HostActor) -> None:
        host.kill()
        if host in self._hosts:
            self._hosts.remove(host)


class RayStack:
    """A `Stack` of actors."""

    def __init__(self, config: RunConfig, model: str, weights: "WeightStoreHandle") -> None:
        self._config = config
        self._model = model
        self._weights = weights
        self._name = f"rl-{uuid.uuid4().hex[:8]}-trainer"
        self._numbers = itertools.count()
        self._trainer_host: HostActor | None = None
        self._generators = RayGenerators(config, model, weights)
        self.trainer: HostedTrainer[HostActor]

    @property
    def generators(self) -> Sequence[HostedGenerator[HostActor]]:
        """Those that live now."""
        return self._generators.living

    async def open(self, folder: str) -> None:
        """All parts, at the same time."""
        await gather([self.replace_trainer(folder), self._generators.open()])

    async def replace_generator(self, number: int, version: int) -> None:
        """The spare takes the place."""
        await self._generators.replace(number, version)

    async def replace_trainer(self, folder: str) -> None:
        """Another process, restored from `folder`."""
        if self._trainer_host is not None:
            self._trainer_host.kill()
        self._trainer_host = host = HostActor(self._config, "trainer", f"{self._name}-{next(self._numbers)}")
        await host.prepare(self._config, "trainer")
        restored = str(Path(folder).absolute()) if folder else ""
        await host.begin("open_trainer", self._config, self._model, self._weights, restored)
        self.trainer = HostedTrainer(host)

    async def close(self) -> None:
        """End all processes, those too that are only half open."""
        trainer = [] if self._trainer_host is None else [self._trainer_host.close()]
        await asyncio.gather(self._generators.close(), *trainer)


@asynccontextmanager
async def open_stack(config: RunConfig, folder: str = "") -> AsyncIterator[RayStack]:
    """The parts in actors of the cluster that `rl.ray_cluster` finds or begins."""
    gpus = config.trainer_gpus + config.num_generators * config.generator_gpus
    with connected(gpus):
        together = is_one_host()
        if config.transport == "shared_memory" and not together:
            raise ValueError(
                "`transport` is `shared_memory`, but the Ray cluster has other machines than this one\n\n"
                "hint: `ray_objects` brings weights to every machine"
            )
        local = Path(config.model).expanduser()
        if local.is_dir():
            config = config.model_copy(update={"model": str(local.absolute())})
        # On other machines each host finds the model by its name.
        model = await asyncio.to_thread(model_folder, config) if together else ""
        with weight_store(config.transport or ("shared_memory" if together else "ray_objects")) as weights:
            stack = RayStack(config, model, weights)
            try:
                await stack.open(folder)
                yield stack
            finally:
                await stack.close()


def _how(gone: Exception) -> str:
    """What Ray knows of the death of an actor, in one line."""
    text = " ".join(str(gone).split())
    text = text.partition("The actor is dead because")[2].strip() or text
    return text.partition(" Some common causes include")[0]
