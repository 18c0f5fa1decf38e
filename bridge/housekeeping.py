"""What the local worker does once when it starts: runs are remembered for a month, what nobody uses is removed.

Best effort: none of it may keep a worker from taking work.
"""

import asyncio
import logging
import os
from datetime import timedelta

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.namespace.v1 import NamespaceConfig
from temporalio.api.workflowservice.v1 import ResetStickyTaskQueueRequest, UpdateNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.cache import StepCache
from bridge.payloads import payload_dir, prune
from bridge.run_secrets import sweep
from bridge.runs import ClientError
from bridge.state import State
from container import reaper

REMEMBERED = timedelta(days=30)
"""The dev server forgets an ended run after a day; ours after this time."""
UNUSED = timedelta(days=90)
"""Age of large payloads and cache entries that nobody has used since."""
_CALL_TIMEOUT = timedelta(seconds=10)
log = logging.getLogger(__name__)


async def forget_dead_workers(temporal: Client) -> None:
    """Ask the server to give us at once what it still keeps for a worker that was killed."""
    try:
        running = 'WorkflowType="PlanWorkflow" AND ExecutionStatus="Running"'
        async for run in temporal.list_workflows(running, limit=1000):
            execution = WorkflowExecution(workflow_id=run.id, run_id=run.run_id)
            request = ResetStickyTaskQueueRequest(namespace=temporal.namespace, execution=execution)
            await temporal.workflow_service.reset_sticky_task_queue(request, timeout=_CALL_TIMEOUT)
    except RPCError as error:
        log.warning("runs of a dead worker are not asked for at once: %s", error)


async def keep_house(temporal: Client, state: State) -> None:
    """Set how long ended runs are remembered, and remove what is old."""
    try:
        config = NamespaceConfig()
        config.workflow_execution_retention_ttl.FromTimedelta(REMEMBERED)
        request = UpdateNamespaceRequest(namespace=temporal.namespace, config=config)
        await temporal.workflow_service.update_namespace(request, timeout=_CALL_TIMEOUT)
    except RPCError as error:
        log.warning("ended runs are remembered for a day only: %s", error)
    try:
        await asyncio.to_thread(_remove_unused, state)
    except OSError as error:
        log.warning("old files are not removed: %s", error)
    try:
        await sweep(temporal, state.secrets_dir)
    except (OSError, RPCError, ClientError) as error:
        log.warning("secrets of runs that are over are not removed: %s", error)
    # What a Ray that died with all around it left on this machine.
    for name in await asyncio.to_thread(reaper.reap, os.environ):
        log.warning("removed container %s, whose owner is gone", name)


def _remove_unused(state: State) -> None:
    prune(payload_dir(state), UNUSED.total_seconds())
    cache = StepCache(state.cache_file)
    cache.prune(UNUSED.total_seconds())
    cache.close()
