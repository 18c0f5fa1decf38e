"""What the worker does for a run: `run_step` attaches to or starts one attempt; three short ones keep its records.

Fatal: a step that cannot be dispatched, at once or after a few attempts. Best effort: events and the report file; a
full disk must not fail a run that Temporal already knows to be done.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio import activity
from temporalio.client import WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from bridge import job_keeper
from bridge.cache import StepCache
from bridge.cache_key import digest
from bridge.calls import Begin, Begun, Finish, Record, StepCall
from bridge.dispatch import Dispatch, Handle, WrongNode
from bridge.lookup import cache_fields, find_cached, keep, write_fields
from bridge.records import append_event, new_event, run_dir
from bridge.report import with_tails
from steps import Progress, StepError, StepRequest, StepResult
from steps._files import HOST, attempt_dir, write_whole
from steps._secrets import run_secrets_dir

HEARTBEAT_INTERVAL_S = 0.4
BRIEF_S = 0.5
"""How long a step may take to count as one that ends soon."""
WRONG_NODE_LIMIT_S = 30.0
"""How long a step on another machine is left to the workers there before it counts as lost."""
_OUT_OF = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of a machine that has none left of something for a moment."""
log = logging.getLogger(__name__)

Place = Callable[[StepCall], Dispatch]
"""Chooses the dispatch of a call."""
Attach = Callable[[], Awaitable[Handle]]
Attend = Callable[[Attach], Awaitable[StepResult]]


class Activities:
    """The activities of one worker, with what they need."""

    def __init__(self, place: Place, cache: StepCache, secrets_dir: Path) -> None:
        self._place = place
        self._cache = cache
        self._secrets_dir = secrets_dir

    @property
    def all(self) -> list[Callable[..., Any]]:
        """What the worker registers."""
        return [self.run_step, self.begin_step, self.end_step, self.begin, self.record, self.finish, self.rest]

    @activity.defn(name="run_step")
    async def run_step(self, call: StepCall) -> StepResult:
        """Run one attempt, or find it again; retried by Temporal until some worker has seen its end."""
        return await self._run_step(call, attend)

    @activity.defn(name="begin_step")
    async def begin_step(self, call: StepCall) -> StepResult | None:
        """The same for a step that ends soon; None for one that goes on, which `run_step` then finds again."""
        try:
            return await self._run_step(call, attend_briefly)
        except TimeoutError:
            return None

    @activity.defn(name="end_step")
    async def end_step(self, call: StepCall) -> StepResult:
        """End an attempt that may have been begun."""

        async def attach_and_cancel() -> Handle:
            return _Ended(await (await self._attach(call)).cancel())

        return await self._run_step(call, lambda attach: attend(attach_and_cancel))

    async def _run_step(self, call: StepCall, attend: Attend) -> StepResult:
        """The end of an attempt. What keeps it from starting ends it too, or it would be tried for ever, unseen."""
        request = call.request
        try:
            return await self._start_or_find(call, attend)
        except StepError as error:
            # Its folder may be another step's, so nothing is written there.
            self._append_step(request, "step_finished", message=str(error))
            return StepResult(outcome="failed", reason="error", error=str(error), final=True)
        except OSError as error:
            if isinstance(error, TimeoutError) or error.errno in _OUT_OF:
                raise
            if os.path.lexists(attempt_dir(request) / HOST):
                # It runs, or has ended: it must be found again.
                raise
            result = StepResult(outcome="failed", reason="infrastructure", error=_cannot_start(request, error))
            self._write_finished(request, result)
            return result

    async def _start_or_find(self, call: StepCall, attend: Attend) -> StepResult:
        request = call.request
        folder = attempt_dir(request)
        fields: dict[str, str] | None = None
        is_new = not folder.exists()
        if call.cache is not None and is_new:
            # Taken once, before the step runs: a step that changes its own inputs must run again.
            fields = await asyncio.to_thread(cache_fields, call, self._cache)
            if call.look_up and (found := self._cache.find(digest(fields), plan_dir=request.plan_dir)) is not None:
                return found
        if is_new:
            self._append_step(request, "step_started" if request.attempt == 1 else "step_retry", message=request.type)
        if fields is not None:
            write_fields(folder, fields)
        async with job_keeper.kept(request, lambda: self._attach(call)) as attach:
            result = await attend(attach)
        self._write_finished(request, result)
        if call.cache is not None:
            await asyncio.to_thread(keep, call, result, self._cache)
        return result

    @activity.defn(name="begin")
    async def begin(self, begin: Begin) -> Begun:
        """Write `run_started` and find every step that need not run, as far as the cache alone can tell."""
        plan = begin.run.plan
        self._append(begin.run.log_dir, begin.workflow_id, begin.run_id, status="run_started", message=plan.name)
        if not any(step.cache for step in plan.steps):
            return Begun()
        return await asyncio.to_thread(find_cached, begin, self._cache)

    @activity.defn(name="record")
    async def record(self, record: Record) -> None:
        """Write the steps that ended without running to the event log."""
        for report in record.reports:
            self._append(
                record.log_dir,
                record.workflow_id,
                record.run_id,
                step_id=report.id,
                step_name=report.name,
                status="step_finished" if report.outcome in ("succeeded", "failed") else "step_skipped",
                exit_code=report.exit_code,
                message=report.error or report.reason,
            )

    @activity.defn(name="finish")
    async def finish(self, finish: Finish) -> None:
        """Write `report.json` and `run_finished`; forget the secrets that were given for this run."""
        report = finish.report
        shutil.rmtree(run_secrets_dir(self._secrets_dir, report.workflow_id), ignore_errors=True)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(_write_report, finish)
        self._append(
            finish.log_dir,
            report.workflow_id,
            report.run_id,
            status="run_finished",
            duration_s=report.duration_s,
            message=report.outcome,
        )
        await job_keeper.conclude(finish)

    @activity.defn(name="rest")
    async def rest(self) -> None:
        """Nothing: the workflow goes on in a new turn, which the deadlock detector times anew."""

    async def _attach(self, call: StepCall) -> Handle:
        """The handle of the attempt; a foreign node's worker gets its chance first."""
        dispatch = self._place(call)
        try:
            return await dispatch.attach_or_start(call.request)
        except WrongNode as error:
            since = activity.info().scheduled_time.timestamp()
            if time.time() - since > WRONG_NODE_LIMIT_S:
                lost = StepResult(outcome="failed", reason="infrastructure", error=f"{error}; no worker is left there")
                return _Ended(lost)
            raise ApplicationError(str(error), type="WrongNode", next_retry_delay=timedelta(seconds=1)) from None

    def _write_finished(self, request: StepRequest, result: StepResult) -> None:
        """Once, however many workers saw the end."""
        folder = attempt_dir(request)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(folder / ".finished", os.O_CREAT | os.O_EXCL))
            self._append_step(
                request,
                "step_cancelled" if result.outcome == "cancelled" else "step_finished",
                exit_code=result.exit_code,
                duration_s=result.duration_s,
                message=result.error or result.outcome,
            )

    def _append_step(self, request: StepRequest, status: str, **fields: Any) -> None:
        folder = attempt_dir(request)
        self._append(
            request.log_dir,
            request.workflow_id,
            request.run_id,
            step_id=request.step_id,
            step_name=request.step_name,
            attempt=request.attempt,
            status=status,
            folder=folder,
            **fields,
        )

    def _append(self, log_dir: str, workflow_id: str, run_id: str, **fields: Any) -> None:
        try:
            append_event(run_dir(log_dir, workflow_id, run_id), new_event(workflow_id, run_id, **fields))
        except OSError as error:
            log.warning("event not written: %s", error)


def _write_report(finish: Finish) -> None:
    report = finish.report
    folder = run_dir(finish.log_dir, report.workflow_id, report.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", with_tails(report).model_dump_json(indent=1))


def _cannot_start(request: StepRequest, error: OSError) -> str:
    return (
        f"step `{request.step_id}` cannot start: {error}\n\n"
        f"hint: its files go to `{request.log_dir}`, wanted a folder with room left in which the worker may write"
    )


async def attend(attach: Attach) -> StepResult:
    """Heartbeat while a step is attached to and runs; cancel it when asked to, let it be when this worker stops."""
    progress = Progress()
    handle: Handle | None = None

    def show(now: Progress) -> None:
        nonlocal progress
        progress = now

    async def beat() -> None:
        while True:
            activity.heartbeat(progress)
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    beating = asyncio.create_task(beat())
    try:
        handle = await attach()
        return await handle.wait(show)
    except asyncio.CancelledError:
        if not await _is_wanted_dead():
            raise
        if handle is None:
            return StepResult(outcome="cancelled", reason="cancelled", error="cancelled before it started")
        return await handle.cancel()
    finally:
        beating.cancel()


async def attend_briefly(attach: Attach) -> StepResult:
    """Wait for a step that may end soon. Raises `TimeoutError` when it does not.

    The step is let be, also on a cancel: this worker may only have been told to forget the run. `end_step` ends it.
    """
    async with asyncio.timeout(BRIEF_S):
        handle = await attach()
        return await handle.wait(lambda progress: None)


async def _is_wanted_dead() -> bool:
    """True for a cancel of the step. False where it goes on: this worker stops, or the run continues as new."""
    details = activity.cancellation_details()
    if details is None or details.cancel_requested:
        return True
    if not details.not_found:
        return False
    info = activity.info()
    try:
        handle = activity.client().get_workflow_handle(info.workflow_id or "", run_id=info.workflow_run_id)
        description = await handle.describe()
    except RPCError:
        return False
    return description.status not in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)


class _Ended:
    """A step of which only the result is left."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        return self._result

    async def cancel(self) -> StepResult:
        return self._result
