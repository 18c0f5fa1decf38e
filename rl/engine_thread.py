"""The one thread that owns an engine: commands in their order, then a step, for as long as there is something to do.

    event loop --commands of one tick, together--> inbox --> thread: [ commands, then Driver.step ]*
               <--futures------------------------- deliver

The thread sleeps when no request runs and wakes by a command. What a task submits in one tick of the event loop arrives
together, so the samples of a group begin in one step.
"""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from rl.engine import EngineClosed, ScoreRequest, Swapped
from rl.generate import GenerateRequest, Sample

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Request = GenerateRequest | ScoreRequest
Answer = Sample | tuple[float, ...]
Deliver = Callable[[int, Answer], None]
Command = tuple[Callable[[], None], "Future[Any] | None"]
"""What the thread is to do, and who waits for it."""
_CLOSE_TIMEOUT_S = 60


class Driver(Protocol):
    """An engine as its own thread sees it. Answers go to the `deliver` that it was opened with."""

    version: int

    @property
    def busy(self) -> bool:
        """Whether a request runs."""
        ...

    def add(self, key: int, request: Request) -> None:
        """Take a request; ValueError for one that cannot be taken."""
        ...

    def drop(self, key: int) -> Sample | None:
        """Take a request out, wherever it is: what was sampled so far, finish `abort`; None for one to be scored."""
        ...

    def step(self, between: Callable[[], bool]) -> None:
        """Sample a token for each running request, or several, with a call of `between` before each further one.

        `between` says whether to go on.
        """
        ...

    def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Copy other weights in."""
        ...

    def close(self) -> None:
        """Let go of memory and processes."""
        ...


class EngineThread:
    """An `Engine` made of a `Driver`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._keys = count()
        self._outbox: list[Command] = []
        self._inbox: list[Command] = []
        self._wake = threading.Condition()
        self._closing = False
        self._ended = False
        self._error: BaseException | None = None
        self._answers: dict[int, Future[Any]] = {}
        self._driver: Driver
        self._thread: threading.Thread
        self._name = name

    @classmethod
    async def open(cls, driver: Callable[[Deliver], Driver], name: str) -> Self:
        """Start the thread and wait until its engine is open; raises what opening it raised."""
        engine = cls(name)
        # vLLM collects garbage when it closes, in the engine's thread. What others have left in this process by now,
        # such as a client that waits for its own threads when it goes, must not be collected there.
        gc.collect()
        opened: Future[None] = Future()
        engine._thread = threading.Thread(target=engine._run, args=(driver, opened), name=name, daemon=True)
        engine._thread.start()
        await asyncio.wrap_future(opened)
        return engine

    @property
    def version(self) -> int:
        """Of the weights that the next token comes from."""
        return self._driver.version

    async def __call__(self, request: GenerateRequest) -> Sample:
        """One turn."""
        sample: Sample = await self._ask(request)
        return sample

    async def submit(self, requests: Sequence[GenerateRequest]) -> list[Sample]:
        """Several turns that begin in one step."""
        samples: list[Sample] = await asyncio.gather(*(self._ask(request) for request in requests))
        return samples

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probabilities of given tokens."""
        scores: tuple[float, ...] = await self._ask(ScoreRequest(token_ids=tuple(token_ids)))
        return scores

    async def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> Swapped:
        """Other weights from the next step on."""
        swapped: Future[Swapped] = Future()
        self._post(partial(self._swap, tensors, version, swapped), swapped)
        # The thread may be copying the tensors, which are the caller's again when this returns: it cannot be cancelled.
        return await asyncio.shield(asyncio.wrap_future(swapped))

    async def close(self) -> None:
        """Answer what runs, end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise TimeoutError(f"thread `{self._name}` still runs {_CLOSE_TIMEOUT_S} s after it was told to end")

    def _ask(self, request: Request) -> asyncio.Future[Any]:
        key = next(self._keys)
        answer: Future[Any] = Future()
        self._post(partial(self._add, key, request, answer), answer)
        waiting = asyncio.wrap_future(answer)
        waiting.add_done_callback(lambda done: self._post(partial(self._drop, key)) if done.cancelled() else None)
        return waiting

    def _post(self, command: Callable[[], None], answer: "Future[Any] | None" = None) -> None:
        """Hand a command over at the end of this tick of the event loop."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append((command, answer))

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        with self._wake:
            if not self._ended:
                self._inbox += commands
                self._wake.notify()
                return
        self._refuse(commands)

    def _refuse(self, commands: list[Command]) -> None:
        for _, answer in commands:
            if answer is not None:
                self._settle(answer, self._closed())

    def _run(self, driver: Callable[[Deliver], Driver], opened: Future[None]) -> None:
        try:
            self._driver = driver(self._deliver)
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            while self._between(wait=not self._driver.busy):
                if self._driver.busy:
                    self._driver.step(self._between)
        except BaseException as error:
            self._error = error
        finally:
            self._end()

    def _between(self, wait: bool = False) -> bool:
        """Execute what has come in; False when the thread is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._closing or not wait)
            commands, self._inbox = self._inbox, []
        try:
            while commands:
                command, _ = commands.pop(0)
                command()
        finally:
            # What came in with a command that fails is refused with the rest.
            with self._wake:
                self._inbox[:0] = commands
        return not self._closing

    def _add(self, key: int, request: Request, answer: Future[Any]) -> None:
        if answer.cancelled():
            return
        self._answers[key] = answer
        try:
            self._driver.add(key, request)
        except ValueError as error:
            self._settle(self._answers.pop(key), error)

    def _drop(self, key: int) -> None:
        if self._answers.pop(key, None) is not None:
            self._driver.drop(key)

    def _swap(self, tensors: "Mapping[str, torch.Tensor]", version: int, swapped: Future[Swapped]) -> None:
        started, busy = time.perf_counter(), self._driver.busy
        try:
            self._driver.swap(tensors, version)
        except BaseException as error:
            # Some weights may be new and some old: an engine in that state must not sample.
            self._settle(swapped, error)
            raise
        took = time.perf_counter() - started
        self._settle(swapped, Swapped(reload_s=took, pause_s=took if busy else 0.0))

    def _deliver(self, key: int, answer: Answer) -> None:
        if (future := self._answers.pop(key, None)) is not None:
            self._settle(future, answer)

    def _end(self) -> None:
        """Answer everything that is still asked, whether the end was wanted or not."""
        with self._wake:
            self._ended = True
            commands, self._inbox = self._inbox, []
        for key, answer in list(self._answers.items()):
            sample = None if self._error is not None else self._driver.drop(key)
            self._settle(answer, self._closed() if sample is None else sample)
        self._answers.clear()
        self._refuse(commands)
        self._driver.close()

    def _closed(self) -> EngineClosed:
        closed = EngineClosed(f"`{self._name}` is closed" if self._error is None else f"`{self._name}`: {self._error}")
        closed.__cause__ = self._error
        return closed

    @staticmethod
    def _settle(future: "Future[Any]", outcome: Any) -> None:
        if not future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
