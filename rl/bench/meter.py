"""Every call over the seam between the loop and a stack, written down: the measurement is the same on all stacks.

    loop -> MeteredStack -> MeteredTrainer | MeteredGenerator -> the stack's own
                 '--------> Trace: who, what, from when to when, with what

Sizes of messages are found after the run, so that they cost nothing while it goes on.
"""

import asyncio
import os
import pickle
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from rl.config import RunConfig
from rl.stack import Generator, GroupRequest, Loaded, Published, Stack, Trainer
from rl.types import Batch, Group, TrainMetrics

Result = TypeVar("Result")
Method = Literal["update", "publish", "save", "generate", "load"]
OpenStack = Callable[[RunConfig, str], AbstractAsyncContextManager[Stack]]

_PINGS = 200


@runtime_checkable
class Pinged(Protocol):
    """A part that answers a call without work."""

    async def ping(self) -> int:
        """The number of its process."""
        ...


@dataclass
class Call:
    """One call of a part. Times are of `time.perf_counter`."""

    part: str
    """`trainer`, `generator 0`, ..."""
    method: Method
    request: Any
    begin_s: float
    end_s: float = 0.0
    reply: Any = None
    """None where the call failed or was cancelled."""

    @property
    def done(self) -> bool:
        """Whether an answer came; `save` has none."""
        return self.reply is not None

    @property
    def num_bytes(self) -> int:
        """Request and reply as a message between processes, pickled."""
        return len(pickle.dumps(self.request)) + len(pickle.dumps(self.reply))


@dataclass
class Trace:
    """What was written down, in the order in which the calls began."""

    calls: list[Call] = field(default_factory=list)
    opened_at: float = 0.0
    """When the stack was open, in seconds since 1970."""
    opened_s: float = 0.0
    """The same moment by `time.perf_counter`."""
    processes: dict[str, int] = field(default_factory=dict)
    """Part -> number of the process that hosts it."""
    pings_s: list[float] = field(default_factory=list)
    """Round trips of calls without work to every part in another process, in turn, when nothing else went on."""

    def of(self, method: Method) -> list[Call]:
        """Calls that were answered, in the order of their ends."""
        return sorted((call for call in self.calls if call.method == method and call.done), key=lambda one: one.end_s)


class MeteredTrainer:
    """A `Trainer` that is watched."""

    def __init__(self, inner: Trainer, meter: "Meter") -> None:
        self._inner = inner
        self._meter = meter

    async def update(self, batch: Batch) -> TrainMetrics:
        """One optimizer step."""
        metrics = await self._meter.watch("trainer", "update", batch, self._inner.update(batch))
        self._meter.updated(metrics)
        return metrics

    async def publish(self) -> Published:
        """Let generators load the weights."""
        return await self._meter.watch("trainer", "publish", None, self._inner.publish())

    async def save(self, folder: str) -> None:
        """Into a folder."""
        await self._meter.watch("trainer", "save", folder, self._inner.save(folder))


class MeteredGenerator:
    """A `Generator` that is watched."""

    def __init__(self, inner: Generator, number: int, meter: "Meter") -> None:
        self._inner = inner
        self._name = f"generator {number}"
        self._meter = meter

    async def generate(self, request: GroupRequest) -> Group:
        """The finished group."""
        return await self._meter.watch(self._name, "generate", request, self._inner.generate(request))

    async def load(self, version: int) -> Loaded:
        """Go on with other weights."""
        return await self._meter.watch(self._name, "load", version, self._inner.load(version))


class Meter:
    """Writes down what goes on in one run."""

    def __init__(self, updated: Callable[[TrainMetrics], None] = lambda metrics: None) -> None:
        """`updated` is called at the end of every update, before the loop goes on."""
        self.trace = Trace()
        self.updated = updated

    async def watch(self, part: str, method: Method, request: Any, work: Awaitable[Result]) -> Result:
        """The result of the work."""
        call = Call(part=part, method=method, request=request, begin_s=time.perf_counter())
        self.trace.calls.append(call)
        try:
            result = await work
            call.reply = result
        finally:
            call.end_s = time.perf_counter()
        return result

    def metered(self, inner: OpenStack) -> OpenStack:
        """The same stacks, watched."""

        @asynccontextmanager
        async def opened(config: RunConfig, folder: str) -> AsyncIterator[Stack]:
            async with inner(config, folder) as stack:
                self.trace.opened_at, self.trace.opened_s = time.time(), time.perf_counter()
                await self._find(stack)
                yield MeteredStack(stack, self)
                await self._ping(stack)

        return opened

    async def _find(self, stack: Stack) -> None:
        for name, part in _parts(stack).items():
            self.trace.processes[name] = await part.ping()

    async def _ping(self, stack: Stack) -> None:
        # What the loop had let go of when it ended is over first.
        await asyncio.sleep(0.2)
        parts = [part for name, part in _parts(stack).items() if self.trace.processes[name] != os.getpid()]
        for part in parts:
            for _ in range(_PINGS):
                began = time.perf_counter()
                await part.ping()
                self.trace.pings_s.append(time.perf_counter() - began)


class MeteredStack:
    """A `Stack` whose parts are watched; each is the same object for as long as the one behind it lives."""

    def __init__(self, inner: Stack, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter
        self._trainer: tuple[Trainer, MeteredTrainer] | None = None
        self._generators: dict[int, tuple[Generator, MeteredGenerator]] = {}

    @property
    def trainer(self) -> MeteredTrainer:
        """The trainer that lives now."""
        inner = self._inner.trainer
        if self._trainer is None or self._trainer[0] is not inner:
            self._trainer = (inner, MeteredTrainer(inner, self._meter))
        return self._trainer[1]

    @property
    def generators(self) -> Sequence[MeteredGenerator]:
        """The generators that live now."""
        return [self._generator(number, inner) for number, inner in enumerate(self._inner.generators)]

    async def replace_generator(self, number: int, version: int) -> None:
        """Another one in the place."""
        await self._inner.replace_generator(number, version)

    async def replace_trainer(self, folder: str) -> None:
        """Another one in the place."""
        await self._inner.replace_trainer(folder)

    def _generator(self, number: int, inner: Generator) -> MeteredGenerator:
        known = self._generators.get(number)
        if known is None or known[0] is not inner:
            known = self._generators[number] = (inner, MeteredGenerator(inner, number, self._meter))
        return known[1]


def _parts(stack: Stack) -> dict[str, Pinged]:
    """Those that can be pinged, by name."""
    parts = {"trainer": stack.trainer, **{f"generator {number}": one for number, one in enumerate(stack.generators)}}
    return {name: part for name, part in parts.items() if isinstance(part, Pinged)}
