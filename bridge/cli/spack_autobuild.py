"""`orchestrate spack autobuild`: an environment built and verified as a durable run."""

from pathlib import Path
from typing import Any

import click

from bridge.cli.connection import LocalConnection
from bridge.cli.job_lookup import time_option
from bridge.cli.options import connected, json_option, service_options
from bridge.cli.run import check_here, follow, submit
from bridge.cli.spack_environment import environment_argument, locked, problems
from bridge.cli.spack_place import Site, place_options
from bridge.cli.watch import Output


@click.command()
@environment_argument
@click.option("--tries", type=click.IntRange(1, 1000), default=12, show_default=True, help="Builds in all.")
@time_option("--pause", "pause_s", default=900.0, help="Between the end of a failed build and the next: 15 min.")
@time_option("--timeout", "timeout_s", default=12 * 3600.0, help="Time limit of one build: 12 h.")
@time_option("--wait", "wait_s", default=3600.0, help="Longest wait for another build of the same store: 1 h.")
@click.option("--detach", is_flag=True, help="Start the run and leave it alone.")
@click.option("--quiet", is_flag=True, help="Show nothing but what failed.")
@place_options
@json_option
@service_options
def autobuild(
    environment: str,
    tries: int,
    pause_s: float,
    timeout_s: float,
    wait_s: float,
    detach: bool,
    quiet: bool,
    as_json: bool,
    address: str | None,
    namespace: str | None,
    task_queue: str | None,
    **place: Any,
) -> int:
    """Build ENVIRONMENT and verify it, as a run that goes on whatever dies meanwhile.

    A build that fails is tried again. With CUDA, torch and JAX must then compute on a GPU; without, the Python packages
    of the environment must be importable. Exit codes are those of `orchestrate PLAN.yaml`.
    """
    from bridge.autobuild import Container, Effort, plan_name, plan_text

    found = locked(environment)
    site = Site.of(**place)
    effort = Effort(tries, pause_s, timeout_s, wait_s)
    with problems():
        text = plan_text(found, site.place, effort, Container(site.project_id, site.root, site.image))
    path = Path.cwd() / f"{plan_name(found)}.yaml"
    request: dict[str, Any] = {
        "text": text, "path": str(path), "given": {}, "workflow_id": None, "log_dir": None, "format": "yaml"
    }  # fmt: skip
    with connected({"address": address, "namespace": namespace, "task_queue": task_queue}) as connection:
        if isinstance(connection, LocalConnection) and not connection.is_up():
            check_here(request)
            connection.ensure()
        return follow(connection, submit(connection, request), Output(as_json=as_json, quiet=quiet), detach)
