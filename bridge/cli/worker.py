"""`orchestrate worker`: a worker in the foreground, for a Temporal server of one's own."""

import asyncio
import os
import sys

import click

from bridge.cli.connection import is_configured


@click.command()
@click.option("--address", "-address", help="Temporal server; by default TEMPORAL_ADDRESS.")
@click.option("--namespace", "-namespace", help="Namespace; TEMPORAL_NAMESPACE by default.")
@click.option("--task-queue", "-task-queue", envvar="TEMPORAL_TASK_QUEUE", default="orchestration", show_default=True)
@click.option("--drain-timeout", type=float, default=30.0, show_default=True, help="Seconds running steps get.")
def worker(address: str | None, namespace: str | None, task_queue: str, drain_timeout: float) -> None:
    """Run a worker in the foreground until SIGTERM or Ctrl-C.

    It then takes no new steps and waits for the running ones; those that are not done in time go on by themselves, and
    the next worker on this machine finds them again.
    """
    import logging

    from bridge.state import State
    from bridge.worker import serve

    is_configured()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    place = address or os.environ.get("TEMPORAL_ADDRESS") or "the configured address"
    logging.getLogger("orchestrate").info("serving task queue `%s` at %s; SIGTERM drains", task_queue, place)
    state = State.from_environment().create()
    try:
        asyncio.run(serve(state, address, namespace=namespace, task_queue=task_queue, drain_s=drain_timeout))
    except RuntimeError as error:
        click.echo(f"error: no Temporal server answers: {error}\n\nhint: `--address HOST:PORT`", err=True)
        sys.stderr.flush()
        # The SDK's own threads still run, and can crash an interpreter that is being taken down.
        os._exit(3)


COMMANDS = (worker,)
