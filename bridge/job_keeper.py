"""Keeps the files of jobs up to date while a worker runs them: called by the activities for every step and run.

    run_step -> kept(request): output copied, heartbeats        finish -> conclude(report): DONE, FAILED or STOPPED

A worker that dies takes this with it; Temporal has the next worker run the activity again, which goes on where the
files end. Best effort: files that cannot be written do not fail a job.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from bridge.calls import Finish
from bridge.job_files import JobFiles
from bridge.job_look import conclude_from
from bridge.jobs import STEP_ID, read_record
from steps import StepRequest
from steps._process import is_alive

STEP_TYPE = "container_job"
COPY_INTERVAL_S = 0.5
log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def kept(request: StepRequest) -> AsyncIterator[None]:
    """In this block a job's files follow what its step does; nothing happens for any other step."""
    record = None
    if request.type == STEP_TYPE and request.step_id == STEP_ID:
        record = await asyncio.to_thread(read_record, request.log_dir, request.workflow_id)
    if record is None:
        yield
        return
    keeping = asyncio.create_task(_keep(JobFiles(record), request.run_id))
    try:
        yield
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


async def _keep(files: JobFiles, run_id: str) -> None:
    """Until cancelled."""
    while True:
        try:
            await asyncio.to_thread(_look, files, run_id)
        except OSError as error:
            log.warning("the files of job `%s` are behind: %s", files.record.job, error)
        await asyncio.sleep(COPY_INTERVAL_S)


def _look(files: JobFiles, run_id: str) -> None:
    host = files.host(files.read())
    is_running = host is None or not host["isolated"] or is_alive(host)
    files.catch_up(run_id, is_running=is_running)
