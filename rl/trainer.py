"""The trainer as every stack hosts it: a learner, in a thread of its own, and its end of the weight store.

    update: Batch -> learner's thread -> TrainMetrics
    publish: snapshot in the learner's thread -> push beside the next update -> Published

Nothing heavy is imported before `open`.
"""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from rl.config import RunConfig
from rl.stack import Published
from rl.types import Batch, TrainMetrics

if TYPE_CHECKING:
    from rl.learner_processes import LearnerProcesses
    from rl.weights import WeightStoreHandle, WeightWriter

P = ParamSpec("P")
R = TypeVar("R")


class TrainerHost:
    """The trainer in this process, with child processes where it is data-parallel. Used from one event loop."""

    def __init__(
        self, config: RunConfig, model_folder: str, weights: "WeightStoreHandle | None" = None, folder: str = ""
    ) -> None:
        self._config = config
        self._model_folder = model_folder
        self._handle = weights
        self._folder = folder
        self._processes: LearnerProcesses | None = None
        self._writer: WeightWriter | None = None
        # One thread for all that computes: updates follow each other, and keep their number of threads.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._one_publication = asyncio.Lock()

    async def open(self) -> None:
        """Load the model, or what was saved to `folder`. Raises `PartLost`."""
        from rl.weights import open_writer

        self._processes = await self._run(self._start)
        if self._handle is not None:
            self._writer = open_writer(self._handle, self._opened.first.manifest)

    @property
    def version(self) -> int:
        """Of the weights as they are now; once open."""
        return self._opened.first.version

    async def update(self, batch: Batch) -> TrainMetrics:
        """One optimizer step; the weights are then of version `batch.version + 1`. Raises `PartLost`."""
        metrics: TrainMetrics = await self._run(self._opened.together, "update", batch)
        return metrics

    async def publish(self) -> Published:
        """Let generators load the weights as they are now. The next update need not wait for more than the snapshot,
        which is taken before it whenever `publish` was called before. Raises `PartLost`."""
        assert self._writer is not None, "weights are published to a store, and there is none"
        async with self._one_publication:
            version, snapshot_s = await self._run(self._snapshot)
            started = time.perf_counter()
            num_bytes = await self._writer.push()
            push_s = time.perf_counter() - started
        return Published(version=version, num_bytes=num_bytes, snapshot_s=snapshot_s, push_s=push_s)

    async def ping(self) -> int:
        """Nothing but the number of this process."""
        return os.getpid()

    async def save(self, folder: str) -> None:
        """Model, optimizer and random state as files in `folder`, which exists. Raises `PartLost`."""
        await self._run(self._opened.together, "save", folder)

    async def close(self) -> None:
        """End the processes and leave the store; what was published stays."""
        if self._processes is not None:
            await self._run(self._processes.close)
            self._processes = None
        self._thread.shutdown()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def _opened(self) -> "LearnerProcesses":
        assert self._processes is not None, "the trainer is not open"
        return self._processes

    def _start(self) -> "LearnerProcesses":
        from rl.learner_processes import LearnerProcesses

        return LearnerProcesses(self._config, self._model_folder, self._folder)

    def _snapshot(self) -> tuple[int, float]:
        from rl.weights import Header

        assert self._writer is not None
        started = time.perf_counter()
        probe = self._opened.together("probe")
        state = self._opened.together("state")
        version = self._opened.first.version
        self._writer.snapshot(Header(version=version, probe=probe), state)
        return version, time.perf_counter() - started

    async def _run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        def call() -> R:
            return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
