"""Keeps the files of jobs up to date while a worker runs them: called by the activities for every step and run.

    run_step -> kept(request): output copied, heartbeats        finish -> conclude(report): DONE, FAILED or STOPPED

A worker that dies takes this with it; Temporal has the next worker run the activity again, which goes on where the
files end. Best effort: files that cannot be written do not fail a job.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from temporalio import activity

from bridge.calls import Finish
from bridge.dispatch import Handle
from bridge.job_files import JobFiles
from bridge.job_look import conclude_from
from bridge.jobs import STEP_ID, read_record
from steps import Progress, StepRequest, StepResult
from steps._files import RESULT, attempt_dir
from steps._process import TOLD_TO_END, is_alive

STEP_TYPE = "container_job"
COPY_INTERVAL_S = 0.5
Attach = Callable[[], Awaitable[Handle]]
log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def kept(request: StepRequest, attach: Attach) -> AsyncIterator[Attach]:
    """In this block a job's files follow what its step does; nothing happens for any other step.

    Gives the `attach` to use instead, whose handle tells us where the step runs.
    """
    record = None
    if request.type == STEP_TYPE and request.step_id == STEP_ID:
        record = await asyncio.to_thread(read_record, request.log_dir, request.workflow_id)
    if record is None:
        yield attach
        return
    job = _Job(JobFiles(record), request, attach)
    keeping = asyncio.create_task(job.keep())
    try:
        yield job.attach
    finally:
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping


async def conclude(finish: Finish) -> None:
    """Write how a job has ended; nothing happens for a run that is no job's."""
    steps = finish.report.steps
    if [(step.type, step.id) for step in steps] != [(STEP_TYPE, STEP_ID)]:
        return
    record = await asyncio.to_thread(read_record, finish.log_dir, finish.report.workflow_id)
    if record is not None:
        try:
            await asyncio.to_thread(conclude_from, record, finish.report.model_dump(mode="json"))
        except OSError as error:
            log.warning("the end of job `%s` is not written: %s", record.job, error)


class _Job:
    """One attempt of a job that this worker attends to."""

    def __init__(self, files: JobFiles, request: StepRequest, attach: Attach) -> None:
        self._files = files
        self._run_id = request.run_id
        self._attempt_dir = attempt_dir(request)
        self._attach = attach
        self._node = ""

    async def attach(self) -> "_Handle":
        had_ended = (self._attempt_dir / RESULT).exists()
        return _Handle(await self._attach(), self._show, had_ended=had_ended)

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self._look)
            except OSError as error:
                log.warning("the files of job `%s` are behind: %s", self._files.record.job, error)
            await asyncio.sleep(COPY_INTERVAL_S)

    def _show(self, progress: Progress) -> None:
        self._node = progress.node or self._node

    def _look(self) -> None:
        host = self._files.host(self._files.read())
        is_running = host is None or not host["isolated"] or is_alive(host)
        self._files.catch_up(self._run_id, is_running=is_running, is_on_node=bool(self._node))


class _Handle:
    """A handle whose progress is shown to two, and for which SIGTERM to the job's process stops the job."""

    def __init__(self, handle: Handle, show: Callable[[Progress], None], *, had_ended: bool) -> None:
        """`had_ended`: before this worker attended to it."""
        self._handle = handle
        self._show = show
        self._had_ended = had_ended

    async def wait(self, on_progress: Callable[[Progress], None]) -> StepResult:
        def show(progress: Progress) -> None:
            self._show(progress)
            on_progress(progress)

        result = await self._handle.wait(show)
        was_told = result.reason == "infrastructure" and result.exit_code == TOLD_TO_END
        # Where the services or the machine stop, so does this worker. Otherwise it was meant for this job alone.
        if was_told and not self._had_ended and not activity.is_worker_shutdown():
            stopped = {"outcome": "cancelled", "reason": "cancelled", "exit_code": None}
            return result.model_copy(update=stopped)
        return result

    async def cancel(self) -> StepResult:
        return await self._handle.cancel()
