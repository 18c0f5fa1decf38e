"""The quick way a step begins: as a local activity, which costs less than a scheduled one and ends after half a second.

While a local activity runs, Temporal holds back what else happens to the run. So there are only so many at a time, the
run rests for one scheduled activity now and then, and none may run when the run leaves its execution. Workflow code.
"""

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy

from bridge.calls import StepCall
from steps import StepResult

MOST_AT_ONCE = 32
"""Steps that begin at a time."""
BETWEEN_RESTS = 100
"""Steps that begin before the run attends to cancels and questions."""


class Beginnings:
    """Those of one execution of one run."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._num_begun = 0
        self._num_running = 0
        self._is_stopped = False
        self._resting: asyncio.Task[None] | None = None

    async def begin(self, call: StepCall) -> StepResult | None:
        """The result of a step that ends soon; None for one that goes on. Raises `ActivityError`.

        Once `stop` was called it waits for `resume`: the execution is about to end.
        """
        async with self._places:
            await self._rest_now_and_then()
            if self._is_stopped:
                await workflow.wait_condition(lambda: not self._is_stopped)
            self._num_running += 1
            try:
                begun: StepResult | None = await workflow.execute_local_activity(
                    "begin_step",
                    call,
                    result_type=StepResult,
                    start_to_close_timeout=timedelta(seconds=60),
                    retry_policy=RetryPolicy(maximum_attempts=1),
                )
                return begun
            finally:
                self._num_running -= 1

    async def stop(self) -> None:
        """Begin no more, and wait until none runs."""
        self._is_stopped = True
        await workflow.wait_condition(lambda: not self._num_running)

    def resume(self) -> None:
        """Begin again: the execution goes on after all."""
        self._is_stopped = False

    async def _rest_now_and_then(self) -> None:
        """Hold back local activities for one scheduled one: only then does Temporal pass on cancels and questions."""
        self._num_begun += 1
        if self._resting is None and self._num_begun % BETWEEN_RESTS == 0:
            self._resting = asyncio.create_task(self._rest())
        if self._resting is not None:
            await asyncio.shield(self._resting)

    async def _rest(self) -> None:
        await workflow.execute_activity("rest", start_to_close_timeout=timedelta(seconds=2))
        self._resting = None
