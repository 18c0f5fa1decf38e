"""The secrets that were handed over with a run: in a folder of its own from just before it starts until it has ended.

    handed_over: lock -> does nothing run under this id? -> write -> (start) -> unlock; gone when that fails
    `finish` of `activities`: gone with the run;  sweep: gone when the run ended without that

Fatal: a secret that cannot be kept. Best effort: the sweep.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from bridge.runs import ClientError
from bridge.state import private_dir, write_private
from steps._secrets import run_secrets_dir

UNTOUCHED_S = 3600.0
"""The sweep leaves alone what was written since: its run may not have started yet."""
_RUN = ".run"
"""Whose folder it is. No secret has such a name."""
_LOCK = ".lock"
_LOCK_TIMEOUT_S = 30.0
_LOCK_POLL_S = 0.01
_CALL_TIMEOUT = timedelta(seconds=10)
_ENDED = (
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_COMPLETED,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_FAILED,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_CANCELED,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_TERMINATED,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_TIMED_OUT,
)
log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def handed_over(
    temporal: Client, secrets_dir: Path, workflow_id: str, values: Mapping[str, str]
) -> AsyncIterator[None]:
    """Keep `values` for the run that is started inside; they are gone again when it is not.

    Raises `WorkflowAlreadyStartedError` while a run with this id goes on, whose own secrets stay as they are.
    """
    folder = run_secrets_dir(secrets_dir, workflow_id)
    if not values and not folder.exists():
        yield
        return
    private_dir(folder.parent)
    async with _alone(folder.parent):
        if await _goes_on(temporal, temporal.namespace, workflow_id):
            raise WorkflowAlreadyStartedError(workflow_id, "PlanWorkflow")
        if folder.exists():
            # Of a run that was terminated: its values would win over those that are stored.
            shutil.rmtree(folder)
        try:
            if values:
                _write(folder, temporal.namespace, workflow_id, values)
            yield
        except WorkflowAlreadyStartedError:
            # By somebody who hands nothing over: the others wait for the lock.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception:
            # The answer may be all that was lost. When the server does not say, the sweep comes back to it.
            with contextlib.suppress(RPCError):
                if not await _goes_on(temporal, temporal.namespace, workflow_id):
                    shutil.rmtree(folder, ignore_errors=True)
            raise


async def sweep(temporal: Client, secrets_dir: Path) -> None:
    """Remove what was kept for runs that ended without removing it: they were terminated, or never started."""
    parent = secrets_dir / "runs"
    folders = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    for folder in folders:
        async with _alone(parent):
            if _age_s(folder) < UNTOUCHED_S:
                continue
            with contextlib.suppress(FileNotFoundError):
                run = json.loads((folder / _RUN).read_text())
                if await _goes_on(temporal, run["namespace"], run["workflow_id"]):
                    continue
            shutil.rmtree(folder, ignore_errors=True)
            log.warning("removed the secrets of a run that is over without having removed them")


def _write(folder: Path, namespace: str, workflow_id: str, values: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o700)
    write_private(folder / _RUN, json.dumps({"namespace": namespace, "workflow_id": workflow_id}))
    for name, value in values.items():
        # Readers take one line end away.
        write_private(folder / name, value + "\n")


def _age_s(folder: Path) -> float:
    """Seconds since something in the folder was written; none when it goes away at this moment."""
    try:
        return time.time() - max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return 0.0


async def _goes_on(temporal: Client, namespace: str, workflow_id: str) -> bool:
    """Asks for the run itself; a list of runs lags behind."""
    execution = WorkflowExecution(workflow_id=workflow_id)
    request = DescribeWorkflowExecutionRequest(namespace=namespace, execution=execution)
    try:
        answer = await temporal.workflow_service.describe_workflow_execution(request, retry=True, timeout=_CALL_TIMEOUT)
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return False
        raise
    return answer.workflow_execution_info.status not in _ENDED


@contextlib.asynccontextmanager
async def _alone(folder: Path) -> AsyncIterator[None]:
    """One at a time, in all processes that share the folder."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    raise ClientError(
                        f"`{folder / _LOCK}` is held for more than {_LOCK_TIMEOUT_S:g} s by another start of a run\n\n"
                        "hint: `orchestrate status` shows whether Temporal answers"
                    ) from None
                await asyncio.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            # By name: a process forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
