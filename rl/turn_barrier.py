"""The conversations of a group in step: their turns begin together, so what an engine computes at a time is always the
same, and with it every bit of what it says.

    conversation 0 --turn--+
    conversation 1 --turn--+--> when all that go on have one: Engine.submit, in the conversations' order --> answers
    conversation 2 (ended) -
"""

import asyncio
from collections.abc import Awaitable, Callable

from rl.engine import Engine
from rl.gather import gather
from rl.generate import Generate, GenerateRequest, Sample
from rl.types import Trajectory


class TurnBarrier:
    """One group of conversations on an engine that nobody else uses meanwhile."""

    def __init__(self, engine: Engine, num_conversations: int) -> None:
        self._engine = engine
        self._live = num_conversations
        self._num_conversations = num_conversations
        self._waiting: dict[int, tuple[GenerateRequest, asyncio.Future[Sample]]] = {}

    async def run(self, conversation: Callable[[int, Generate], Awaitable[Trajectory]]) -> list[Trajectory]:
        """All conversations, each made by its number and its way to the engine. The first error ends them all."""

        async def one(number: int) -> Trajectory:
            async def generate(request: GenerateRequest) -> Sample:
                answer: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
                self._waiting[number] = (request, answer)
                await self._go_on()
                return await answer

            trajectory = await conversation(number, generate)
            self._live -= 1
            await self._go_on()
            return trajectory

        return await gather(one(number) for number in range(self._num_conversations))

    async def _go_on(self) -> None:
        """Sample the turns that wait, if no conversation is still to bring one."""
        if len(self._waiting) < max(1, self._live):
            return
        turns = [turn for _, turn in sorted(self._waiting.items())]
        self._waiting.clear()
        samples = await self._engine.submit([request for request, _ in turns])
        for (_, answer), sample in zip(turns, samples, strict=True):
            if not answer.done():
                answer.set_result(sample)
