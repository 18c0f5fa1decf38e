"""`orchestrate worker`: a worker in the foreground, for a Temporal server that is not the local one."""

from typing import Any

import click

from bridge.cli.failure import Unreachable
from bridge.cli.options import service_options

DEFAULT_ADDRESS = "localhost:7233"


@click.command()
@click.option("--drain", "drain_s", default=30.0, show_default=True, help="Seconds that running steps get on SIGTERM.")
@click.option(
    "--connect-timeout", "connect_timeout_s", default=60.0, show_default=True, help="Seconds to wait for Temporal."
)
@service_options
def worker(drain_s: float, connect_timeout_s: float, **service: Any) -> None:
    """Run a worker until SIGTERM or Ctrl-C, then drain it.

    Steps that still run when the time to drain is over go on; the next worker on this machine finds them again.
    """
    import asyncio
    import logging

    from temporalio.service import RPCError

    from bridge.client import TASK_QUEUE, is_remote
    from bridge.state import State
    from bridge.worker import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    address = service["address"] or (None if is_remote() else DEFAULT_ADDRESS)
    try:
        asyncio.run(
            serve(
                State.from_environment().create(),
                address,
                namespace=service["namespace"],
                task_queue=service["task_queue"] or TASK_QUEUE,
                drain_s=drain_s,
                connect_timeout_s=connect_timeout_s,
            )
        )
    except (RuntimeError, RPCError) as error:
        raise Unreachable(f"cannot reach Temporal at `{address or 'the configured address'}`: {error}") from error


COMMANDS = (worker,)
