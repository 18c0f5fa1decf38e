"""The one place that wires: Temporal client, dispatches, cache, activities, workflow, and the gateway for the CLI."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from datetime import timedelta
from pathlib import Path

from temporalio.client import Client as TemporalClient
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from bridge.activities import Activities
from bridge.cache import StepCache
from bridge.client import TASK_QUEUE, Client
from bridge.dispatch import LocalDispatch
from bridge.gateway import Gateway
from bridge.housekeeping import forget_dead_workers, keep_house
from bridge.placement import Placement
from bridge.schedule import MOST_IN_FLIGHT
from bridge.state import State
from bridge.temporal import CONNECT_TIMEOUT_S, connect_temporal
from bridge.workflow import PlanWorkflow
from steps._secrets import SECRETS_DIR_VARIABLE

STICKY_TIMEOUT = timedelta(seconds=1)
"""How long the server waits for the worker that knows a run before it asks another."""
log = logging.getLogger(__name__)


async def serve(
    state: State,
    address: str | None,
    *,
    namespace: str | None = None,
    task_queue: str = TASK_QUEUE,
    gateway: bool = False,
    drain_s: float = 30.0,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> None:
    """Run a worker until SIGTERM or SIGINT, then drain: what still runs after `drain_s` goes on without us."""
    os.environ.setdefault(SECRETS_DIR_VARIABLE, str(state.secrets_dir))
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    local = LocalDispatch()
    local.start()
    placement = Placement(local, state)
    temporal = await connect_temporal(address, namespace, state, timeout_s=connect_timeout_s)
    activities = Activities(placement.choose, StepCache(state.cache_file), state.secrets_dir)
    worker = make_worker(temporal, task_queue, activities, drain_s)
    door = Gateway(Client(temporal, task_queue, state, local=True), state.gateway_socket) if gateway else None
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(placement.close)
        await stack.enter_async_context(worker)
        if door is not None:
            await door.open()
            stack.push_async_callback(door.close)
        chores = [asyncio.create_task(forget_dead_workers(temporal))]
        if gateway:
            chores.append(asyncio.create_task(keep_house(temporal, state)))
        await stopped.wait()
        for chore in chores:
            chore.cancel()


def make_worker(temporal: TemporalClient, task_queue: str, activities: Activities, drain_s: float) -> Worker:
    """A worker for plans; nothing runs before it is entered."""
    return Worker(
        temporal,
        task_queue=task_queue,
        workflows=[PlanWorkflow],
        activities=activities.all,
        # Workflow code here is ours and pure; the replay test guards it. The sandbox would re-import it for every run.
        workflow_runner=UnsandboxedWorkflowRunner(),
        max_concurrent_activities=2 * MOST_IN_FLIGHT,
        max_concurrent_local_activities=2 * MOST_IN_FLIGHT,
        max_eager_activity_reservations_per_workflow_task=MOST_IN_FLIGHT,
        sticky_queue_schedule_to_start_timeout=STICKY_TIMEOUT,
        graceful_shutdown_timeout=timedelta(seconds=drain_s),
    )


def main() -> None:
    """Entry point of the supervisor's worker process."""
    parser = argparse.ArgumentParser(prog="python -m bridge.worker")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--address", required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    state = State(arguments.state_dir)
    asyncio.run(serve(state, arguments.address, gateway=True, drain_s=2.0, connect_timeout_s=60.0))


if __name__ == "__main__":
    main()
