"""`orchestrate up`, `down` and `status`: the local services by hand."""

import json
import time
from typing import Any

import click

from bridge import services
from bridge.current_cluster import current_cluster
from bridge.state import State

NOT_RUNNING = 3


class _Unreachable(click.ClickException):
    """A service could not be reached, started or stopped."""

    exit_code = 3


@click.command()
@click.option("--ui", is_flag=True, help="Also serve Temporal's web UI, on loopback.")
@click.option("--json", "as_json", is_flag=True, help="Print what `status --json` prints.")
@click.option("--timeout", "timeout_s", default=30.0, show_default=True, help="Seconds to wait until all is ready.")
def up(ui: bool, as_json: bool, timeout_s: float) -> None:
    """Start the local services, or find them; return when they are ready.

    Unfinished runs go on. Commands that need the services start them too. Exit code 3 when they cannot start.
    """
    state = State.from_environment()
    try:
        services.ensure(state, ui=ui, timeout_s=timeout_s)
    except services.ServiceError as error:
        raise _Unreachable(str(error)) from error
    _print_status(_found(state), as_json)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--timeout", "timeout_s", default=30.0, show_default=True, help="Seconds to wait for the end.")
def down(as_json: bool, timeout_s: float) -> None:
    """Stop the local services and every step that runs on them; leave no process.

    Unfinished runs go on at the next `up`. Exit code 3 when something could not be ended.
    """
    state = State.from_environment()
    try:
        stopped = services.stop(state, timeout_s)
    except services.ServiceError as error:
        raise _Unreachable(str(error)) from error
    if as_json:
        document = {
            "state_dir": str(state.dir),
            "stopped": [{"name": name, "pid": pid} for name, pid in stopped.services],
            "killed": [{"pid": pid, "command": command} for pid, command in stopped.killed],
        }
        click.echo(json.dumps(document))
        return
    if not stopped.services and not stopped.killed:
        click.echo("nothing was running")
    for name, pid in stopped.services:
        click.echo(f"stopped {name} (pid {pid})")
    for pid, command in stopped.killed:
        click.echo(f"killed pid {pid}: {command}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """Show the local services. Exit code 0 when they run, 3 when they do not."""
    found = _found(State.from_environment())
    _print_status(found, as_json)
    if not found["processes"]:
        context.exit(NOT_RUNNING)


def _found(state: State) -> dict[str, Any]:
    """The services; where steps go to a cluster instead of the local Ray, `ray` is that cluster, with its name."""
    found = services.status(state)
    if cluster := current_cluster(state):
        found["ray"] = {"address": cluster.address, "dashboard": None, "cluster": cluster.name}
    return found


def _print_status(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [
        ("state", found["state_dir"]),
        ("temporal", found["temporal"]["address"] or "not running"),
        ("temporal ui", found["temporal"]["ui"]),
        ("ray", found["ray"]["address"] or "not running (starts with the first step that needs it)"),
        ("ray dashboard", found["ray"]["dashboard"]),
        ("cluster", found["ray"].get("cluster")),
    ]
    for process in found["processes"]:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(process["since"]))
        rows.append((process["name"], f"{process['state']}, pid {process['pid'] or '-'}, since {since}"))
    for name, value in rows:
        if value is not None:
            click.echo(f"{name:<14} {value}")


COMMANDS = (up, down, status)
