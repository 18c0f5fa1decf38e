"""The runs Temporal knows: find, watch and list them, whatever became of them.

A run is a chain of executions (see continue-as-new in `workflow`); its id is that of the first one, its report and
progress are asked of the last. A run that has ended gives its report as its result, or as the detail of its failure;
only a cancelled one is asked by a query.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any, TypeVar

from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from bridge.calls import RunInput
from bridge.report import RunProgress, RunReport, RunSummary, State, StepState, progress_of, with_tails
from steps import Progress

_POLL_S = 0.1
_QUERY_TIMEOUT = timedelta(seconds=30)
_KEEP_END_S = 5.0
_GOES_ON = (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)
_STATES: dict[WorkflowExecutionStatus | None, State] = {
    WorkflowExecutionStatus.RUNNING: "running",
    WorkflowExecutionStatus.COMPLETED: "succeeded",
    WorkflowExecutionStatus.FAILED: "failed",
    WorkflowExecutionStatus.CANCELED: "cancelled",
    WorkflowExecutionStatus.TERMINATED: "cancelled",
    WorkflowExecutionStatus.TIMED_OUT: "timed_out",
}
T = TypeVar("T")


class ClientError(Exception):
    """A request about a run that cannot be met."""


class RunNotFound(ClientError):
    """There is no such run."""


class RunConflict(ClientError):
    """The run goes on, or has ended, and what was asked wants the contrary."""


class Runs:
    """The runs of one Temporal namespace."""

    def __init__(self, temporal: Client) -> None:
        self._temporal = temporal
        self._ends: dict[tuple[str, str], asyncio.Task[RunReport]] = {}

    async def newest(self, workflow_id: str) -> str:
        """Run id of the newest run with this workflow id."""
        description = await _found(self._temporal.get_workflow_handle(workflow_id).describe(), workflow_id)
        return str(description.raw_description.workflow_execution_info.first_run_id or description.run_id)

    async def is_running(self, workflow_id: str, run_id: str) -> bool:
        """True while the run goes on."""
        handle = await self._last_execution(workflow_id, run_id)
        return (await _found(handle.describe(), workflow_id)).status in _GOES_ON

    async def wait(self, workflow_id: str, run_id: str | None) -> RunReport:
        """Wait for the end of a run; its report, whatever the outcome."""
        run_id = run_id or await self.newest(workflow_id)
        return await asyncio.shield(self._end(workflow_id, run_id))

    async def report(self, workflow_id: str, run_id: str | None) -> RunReport:
        """The report so far, with the ends of the logs; of a run that goes on only the steps that have an outcome."""
        run_id = run_id or await self.newest(workflow_id)
        if await self.is_running(workflow_id, run_id):
            now = time.time()
            report = await self._ask_report(workflow_id, run_id)
            report = report.model_copy(update={"finished_at": now, "duration_s": now - report.started_at})
        else:
            report = await self.wait(workflow_id, run_id)
        return await asyncio.to_thread(with_tails, report)

    async def progress(self, workflow_id: str, run_id: str | None, since: int, wait_s: float) -> RunProgress:
        """What changed since sequence number `since`: at once when something did, else after `wait_s` seconds.

        Running steps come with what they last said even when their state has not changed.
        """
        run_id = run_id or await self.newest(workflow_id)
        end = self._end(workflow_id, run_id)
        deadline = time.monotonic() + wait_s
        while True:
            await asyncio.wait([end], timeout=max(0.0, min(_POLL_S, deadline - time.monotonic())))
            if end.done():
                return progress_of(end.result())
            progress = await self._ask_progress(workflow_id, since)
            is_ours, is_late = progress.run_id == run_id, time.monotonic() >= deadline
            if is_ours and (progress.sequence > since or is_late):
                return progress.model_copy(update={"steps": await self._with_heartbeats(workflow_id, progress, since)})
            if is_late and not end.done():
                return progress

    async def newest_first(self, limit: int) -> list[RunSummary]:
        """Newest runs first."""
        summaries = []
        async for execution in self._temporal.list_workflows('WorkflowType="PlanWorkflow"', limit=limit * 2):
            if execution.status in _STATES:
                summaries.append(await _summary(execution))
        return sorted(summaries, key=lambda summary: -summary.started_at)[:limit]

    async def find(self, workflow_id: str) -> RunSummary:
        """The newest run with this workflow id, as the server alone can tell: no worker is asked."""
        return await _summary(await _found(self._temporal.get_workflow_handle(workflow_id).describe(), workflow_id))

    async def cancel(self, workflow_id: str, run_id: str | None) -> None:
        """Ask a run to cancel. Raises `RunConflict` when it has ended."""
        run_id = run_id or await self.newest(workflow_id)
        if not await self.is_running(workflow_id, run_id):
            raise RunConflict(f"run `{workflow_id}` has ended already")
        handle = self._temporal.get_workflow_handle(workflow_id, first_execution_run_id=run_id)
        await _found(handle.cancel(), workflow_id)

    async def input(self, workflow_id: str, run_id: str) -> RunInput:
        """What the run was started with."""
        handle = self._temporal.get_workflow_handle(workflow_id, run_id=run_id)
        async for event in handle.fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            (run,) = await self._temporal.data_converter.decode(payloads, [RunInput])
            assert isinstance(run, RunInput)
            return run
        raise RunNotFound(f"the history of run `{workflow_id}` is gone")

    def _end(self, workflow_id: str, run_id: str) -> "asyncio.Task[RunReport]":
        """The task that waits for the end of a run; one for all who watch it."""
        key = (workflow_id, run_id)
        if key not in self._ends or (self._ends[key].done() and self._ends[key].exception() is not None):
            self._ends[key] = task = asyncio.create_task(self._wait_for_end(workflow_id, run_id))
            loop = asyncio.get_running_loop()
            task.add_done_callback(lambda _: loop.call_later(_KEEP_END_S, self._ends.pop, key, None))
        return self._ends[key]

    async def _wait_for_end(self, workflow_id: str, run_id: str) -> RunReport:
        handle = self._temporal.get_workflow_handle(workflow_id, run_id=run_id, result_type=RunReport)
        try:
            return await _found(handle.result(), workflow_id)
        except WorkflowFailureError as failure:
            if isinstance(failure.cause, ApplicationError) and failure.cause.type == "PlanFailed":
                return RunReport.model_validate(failure.cause.details[0])
            report = await self._ask_report(workflow_id, run_id)
            return report if report.outcome != "not_run" else report.model_copy(update={"outcome": "cancelled"})

    async def _ask_report(self, workflow_id: str, run_id: str) -> RunReport:
        handle = await self._last_execution(workflow_id, run_id)
        query = handle.query("report", result_type=RunReport, rpc_timeout=_QUERY_TIMEOUT)
        report: RunReport = await _found(query, workflow_id)
        return report

    async def _ask_progress(self, workflow_id: str, since: int) -> RunProgress:
        """Of the newest execution: progress is asked of a run that goes on."""
        handle = self._temporal.get_workflow_handle(workflow_id)
        query = handle.query("progress", since, result_type=RunProgress, rpc_timeout=_QUERY_TIMEOUT)
        progress: RunProgress = await _found(query, workflow_id)
        return progress

    async def _last_execution(self, workflow_id: str, run_id: str) -> WorkflowHandle[Any, Any]:
        """The execution in which the run goes on, or has ended."""
        if await self.newest(workflow_id) == run_id:
            return self._temporal.get_workflow_handle(workflow_id)
        quoted = workflow_id.replace('"', '\\"')
        async for execution in self._temporal.list_workflows(f'WorkflowId="{quoted}"'):
            is_last = execution.status != WorkflowExecutionStatus.CONTINUED_AS_NEW
            if is_last and execution.raw_info.first_run_id in (run_id, "") and run_id:
                return self._temporal.get_workflow_handle(workflow_id, run_id=execution.run_id)
        return self._temporal.get_workflow_handle(workflow_id, run_id=run_id)

    async def _with_heartbeats(self, workflow_id: str, progress: RunProgress, since: int) -> list[StepState]:
        """The changed steps, and the running ones with what their activities last reported."""
        if progress.counts.get("running", 0) == 0:
            return progress.steps
        description = await _found(self._temporal.get_workflow_handle(workflow_id).describe(), workflow_id)
        said: dict[str, Progress] = {}
        for pending in description.raw_description.pending_activities:
            if pending.heartbeat_details.payloads:
                with contextlib.suppress(Exception):
                    decoded = await self._temporal.data_converter.decode(pending.heartbeat_details.payloads, [Progress])
                    said[pending.activity_id.rpartition("/")[0]] = decoded[0]
        steps = {step.id: step for step in progress.steps}
        missing = said.keys() - steps.keys()
        if missing and since:
            everything = await self._ask_progress(workflow_id, 0)
            steps.update({step.id: step for step in everything.steps if step.id in missing})
        return [step.model_copy(update={"progress": said.get(step.id, step.progress)}) for step in steps.values()]


async def _summary(execution: WorkflowExecution) -> RunSummary:
    memo = await execution.memo()
    return RunSummary(
        workflow_id=execution.id,
        run_id=execution.raw_info.first_run_id or execution.run_id,
        plan=str(memo.get("plan", "")),
        state=_STATES.get(execution.status, "running"),
        started_at=execution.start_time.timestamp(),
        finished_at=execution.close_time.timestamp() if execution.close_time else None,
    )


async def _found(call: Awaitable[T], workflow_id: str) -> T:
    try:
        return await call
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            raise RunNotFound(f"there is no run `{workflow_id}`\n\nhint: `orchestrate runs` lists them") from None
        raise
