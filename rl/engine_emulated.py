"""An engine whose device is slept: turns are scheduled as one that batches continuously would, and nothing is computed.

    requests, swaps --arrive--> the next boundary between two steps --> running, a token each per step --> Samples
                                                                        (one timer, for the next boundary that matters)

Tokens are drawn evenly from the vocabulary, so their log-probabilities are known. There are no weights behind them:
nothing can be scored, and trainer and engine cannot be compared.
"""

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rl.config import EngineConfig
from rl.emulation import EngineEmulation
from rl.engine import EngineClosed, Swapped
from rl.gather import gather
from rl.generate import Finish, GenerateRequest, Sample
from rl.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

_SPECIAL_TOKENS = 16
"""The first ids of a vocabulary are not drawn: what ends a turn is among them."""
_ROUNDING = 1e-9
"""Steps by which a boundary may be missed because times are floats."""


class _Turn:
    """A request that waits or runs."""

    def __init__(self, request: GenerateRequest, length: int, finish: Finish) -> None:
        self.request = request
        self.length = length
        self.finish = finish
        self.versions: list[int] = []
        self.answer: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()

    def sample(self, vocabulary: int, finish: Finish) -> Sample:
        first = min(_SPECIAL_TOKENS, vocabulary - 1)
        count = len(self.versions)
        drawn = random.Random(self.request.seed).choices(range(first, vocabulary), k=count)
        logprob = -math.log(vocabulary - first)
        return Sample(token_ids=tuple(drawn), logprobs=(logprob,) * count, versions=tuple(self.versions), finish=finish)


class _Swap:
    """Other weights, which wait for a boundary."""

    def __init__(self, num_bytes: int, version: int) -> None:
        self.num_bytes = num_bytes
        self.version = version
        self.done: asyncio.Future[Swapped] = asyncio.get_running_loop().create_future()


class EmulatedEngine:
    """An `Engine` on the clock of its event loop."""

    def __init__(self, config: EngineConfig, emulation: EngineEmulation, tokenizer: Tokenizer, version: int) -> None:
        self._config = config
        self._emulation = emulation
        self._vocabulary = len(tokenizer)
        self._loop = asyncio.get_running_loop()
        self._outbox: list[_Turn | _Swap] = []
        """What came in during this tick of the event loop, and arrives together."""
        self._waiting: list[tuple[float, _Turn | _Swap]] = []
        """With the time of arrival, for the next boundary."""
        self._running: list[_Turn] = []
        self._boundary = 0.0
        """When the steps of those that run now began, or begin once the device is free."""
        self._owed = 0
        """Steps that come before anyone else is let in: 1 behind others' prompts or weights."""
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.version = version
        """Of the weights that the next token comes from."""

    async def __call__(self, request: GenerateRequest) -> Sample:
        """One turn."""
        if len(request.token_ids) >= self._config.max_model_tokens:
            raise ValueError(
                f"a conversation of {len(request.token_ids)} tokens leaves no room in an engine of "
                f"{self._config.max_model_tokens}\n\nhint: raise `engine.max_model_tokens`"
            )
        turn = self._turn(request)
        self._post(turn)
        return await turn.answer

    async def submit(self, requests: Sequence[GenerateRequest]) -> list[Sample]:
        """Several turns that begin in one step."""
        return await gather(self(request) for request in requests)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """ValueError: there are no weights that would say anything."""
        raise ValueError(f"an emulated engine cannot score {len(token_ids)} tokens: it has no weights")

    async def swap(self, tensors: "Mapping[str, torch.Tensor]", version: int) -> Swapped:
        """Take the time that weights of this size take; they are not kept."""
        swap = _Swap(sum(tensor.nbytes for tensor in tensors.values()), version)
        self._post(swap)
        return await asyncio.shield(swap.done)

    async def close(self) -> None:
        """Answer what runs with what it has, and what waits with nothing."""
        self._advance()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._step(self._whole_steps(self._loop.time()))
        waiting = [arrived for _, arrived in self._waiting] + self._outbox
        for turn in [*self._running, *(one for one in waiting if isinstance(one, _Turn))]:
            _settle(turn.answer, turn.sample(self._vocabulary, "abort"))
        for swap in waiting:
            if isinstance(swap, _Swap) and not swap.done.done():
                swap.done.set_exception(EngineClosed("the emulated engine is closed"))
        self._running, self._waiting, self._outbox = [], [], []

    def _turn(self, request: GenerateRequest) -> _Turn:
        emulation = self._emulation
        room = min(request.max_tokens, self._config.max_model_tokens - len(request.token_ids))
        drawn = random.Random(f"length/{request.seed}").lognormvariate(
            math.log(emulation.median_tokens), emulation.sigma
        )
        length = room if request.to_the_end else max(1, min(room, round(drawn)))
        return _Turn(request, length, "stop" if length < room else "length")

    def _post(self, arrived: _Turn | _Swap) -> None:
        if self._closed:
            raise EngineClosed("the emulated engine is closed")
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(arrived)

    def _flush(self) -> None:
        now = self._loop.time()
        self._waiting += [(now, arrived) for arrived in self._outbox]
        self._outbox = []
        self._advance()

    def _advance(self) -> None:
        """All that happened on the device until now, and the timer for what happens next."""
        if self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while (steps := self._steps_to_next()) is not None:
            at = self._boundary + steps * self._emulation.step_s(len(self._running))
            if at > self._loop.time():
                self._timer = self._loop.call_at(at, self._advance)
                return
            self._boundary = at
            self._step(steps)
            self._admit()

    def _steps_to_next(self) -> int | None:
        """Steps until a turn ends or until who waits can begin; None when there is nothing to do."""
        self._running = [turn for turn in self._running if not turn.answer.done()]
        ends = [turn.length - len(turn.versions) for turn in self._running]
        if self._waiting and not self._running:
            self._boundary = max(self._boundary, self._waiting[0][0])
            return 0
        if self._waiting:
            late = (self._waiting[0][0] - self._boundary) / self._emulation.step_s(len(self._running))
            ends.append(max(self._owed, math.ceil(late - _ROUNDING)))
        return min(ends, default=None)

    def _whole_steps(self, now: float) -> int:
        if not self._running:
            return 0
        return max(0, math.floor((now - self._boundary) / self._emulation.step_s(len(self._running)) + _ROUNDING))

    def _step(self, steps: int) -> None:
        self._owed = 0
        for turn in self._running:
            turn.versions += [self.version] * steps
            if len(turn.versions) >= turn.length:
                _settle(turn.answer, turn.sample(self._vocabulary, turn.finish))
        self._running = [turn for turn in self._running if not turn.answer.done()]

    def _admit(self) -> None:
        """Who has arrived by this boundary begins; the device is busy with it until the next one."""
        began = self._boundary
        late = [arrived for at, arrived in self._waiting if at <= self._boundary + _ROUNDING]
        self._waiting = self._waiting[len(late) :]
        newcomers = [one for one in late if isinstance(one, _Turn) and not one.answer.done()]
        for swap in late:
            if isinstance(swap, _Swap):
                self._change(swap)
        self._boundary += self._emulation.prefill_s(turn.request.token_ids for turn in newcomers)
        self._owed = int(self._boundary > began)
        self._running += newcomers

    def _change(self, swap: _Swap) -> None:
        reload_s = self._emulation.reload_s(swap.num_bytes)
        again_s = 0.0
        if self._config.kv_policy == "recompute":
            again_s = self._emulation.prefill_s_per_token * sum(
                len(turn.request.token_ids) + len(turn.versions) for turn in self._running
            )
        pause_s = reload_s + again_s if self._running else 0.0
        self._boundary += reload_s + again_s
        self.version = swap.version
        swapped = Swapped(reload_s=reload_s + again_s, pause_s=pause_s)
        self._loop.call_at(self._boundary, _settle, swap.done, swapped)


def _settle(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)
