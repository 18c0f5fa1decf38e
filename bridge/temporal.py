"""How every process of ours reaches Temporal: its own environment configuration, our data converter."""

import asyncio
import os
import time
from datetime import timedelta

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.envconfig import ClientConfig
from temporalio.service import RPCError

from bridge.codec import data_converter
from bridge.state import State

CONNECT_TIMEOUT_S = 10.0
DESCRIBE_TIMEOUT = timedelta(seconds=5)


def is_remote() -> bool:
    """True when the environment or Temporal's own configuration file names a server."""
    if os.environ.get("TEMPORAL_ADDRESS"):
        return True
    return bool(ClientConfig.load_client_connect_config().get("target_host"))


async def has_workers(temporal: Client, task_queue: str) -> bool:
    """True when a worker has asked `task_queue` for work in the last minutes; also when the server does not say."""
    request = DescribeTaskQueueRequest(
        namespace=temporal.namespace,
        task_queue=TaskQueue(name=task_queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    try:
        answer = await temporal.workflow_service.describe_task_queue(request, timeout=DESCRIBE_TIMEOUT)
    except RPCError:
        return True
    return bool(answer.pollers)


async def connect_temporal(
    address: str | None, namespace: str | None, state: State, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> Client:
    """Connect with Temporal's environment configuration (address, namespace, TLS, API key), arguments winning.

    A server that is just starting is waited for. `RuntimeError` when none answers within `timeout_s` seconds.
    """
    config = dict(ClientConfig.load_client_connect_config())
    given = {"target_host": address, "namespace": namespace}
    config.update({name: value for name, value in given.items() if value})
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await Client.connect(**config, data_converter=data_converter(state))  # type: ignore[arg-type]
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
