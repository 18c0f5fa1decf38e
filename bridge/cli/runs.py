"""`orchestrate runs`, `show`, `attach`, `cancel`, `retry` and `explain`: runs that were started before."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from bridge.cli.connection import Connection
from bridge.cli.options import connected, find_run, json_option, service_options
from bridge.cli.run import call_with_secrets, follow, given_params, read_plan_file
from bridge.cli.watch import Output, cancel, watch
from bridge.summary import summary
from bridge.terminal import columns, duration, moment, visible
from bridge.view import UNFINISHED

run_argument = click.argument("run", metavar="RUN")
quiet_option = click.option("--quiet", is_flag=True, help="Show nothing but what failed.")


@click.command()
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000), help="How many.")
@json_option
@service_options
def runs(limit: int, as_json: bool, **service: Any) -> None:
    """List runs, the newest first."""
    with connected(service) as connection:
        found = connection.call("runs", limit=limit)
    if as_json:
        Output(as_json=True).print_json(found)
        return
    rows = [
        (
            run["state"],
            run["workflow_id"],
            run["plan"],
            moment(run["started_at"]),
            duration((run["finished_at"] or time.time()) - run["started_at"]),
            run["run_id"],
        )
        for run in found
    ]
    print("\n".join(columns(("STATE", "RUN", "PLAN", "STARTED", "DURATION", "RUN ID"), rows)))


@click.command()
@run_argument
@json_option
@service_options
def show(run: str, as_json: bool, **service: Any) -> None:
    """Show the steps of RUN: a workflow id, a run id, the beginning of either, or `last`."""
    with connected(service) as connection:
        report = report_of(connection, run)
    if as_json:
        Output(as_json=True).print_json(report)
    else:
        print("\n".join(summary(report, sys.stdout)))


@click.command()
@run_argument
@quiet_option
@json_option
@service_options
def attach(run: str, quiet: bool, as_json: bool, **service: Any) -> int:
    """Watch RUN to its end, with the exit code it deserves."""
    with connected(service) as connection:
        found = find_run(connection, run)
        return watch(connection, found["workflow_id"], found["run_id"], Output(as_json=as_json, quiet=quiet))


@click.command("cancel")
@run_argument
@json_option
@service_options
def cancel_run(run: str, as_json: bool, **service: Any) -> None:
    """Ask RUN to cancel: its running steps are ended."""
    with connected(service) as connection:
        found = find_run(connection, run)
        ended = found["state"] not in UNFINISHED
        if not ended:
            cancel(connection, found["workflow_id"], found["run_id"])
    if as_json:
        asked = {"workflow_id": found["workflow_id"], "run_id": found["run_id"], "state": found["state"]}
        Output(as_json=True).print_json({**asked, "cancel_requested": not ended})
    elif ended:
        print(f"run {visible(found['workflow_id'])} has already ended: {found['state']}")
    else:
        print(f"asked {visible(found['workflow_id'])} to cancel")


@click.command()
@run_argument
@click.option("--detach", is_flag=True, help="Start the run and leave it alone.")
@quiet_option
@json_option
@service_options
def retry(run: str, detach: bool, quiet: bool, as_json: bool, **service: Any) -> int:
    """Run again what did not succeed in RUN; steps that did keep their outputs."""
    with connected(service) as connection:
        found = find_run(connection, run)
        key = {"workflow_id": found["workflow_id"], "run_id": found["run_id"]}
        started = call_with_secrets(connection, "retry", key)
        return follow(connection, started, Output(as_json=as_json, quiet=quiet), detach)


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("step")
@click.option("-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="A param of the plan.")
@click.option("--params", "params_file", metavar="FILE", help="Params from a JSON object in FILE; `-` is stdin.")
@json_option
@service_options
def explain(
    plan: Path, step: str, params: tuple[str, ...], params_file: str | None, as_json: bool, **service: Any
) -> None:
    """Say field by field why the cached STEP of PLAN would run again."""
    path = plan.absolute()
    text, given = read_plan_file(path), given_params(params, params_file)
    with connected(service) as connection:
        fields = connection.call("explain", text=text, path=str(path), given=given, step_id=step)
    if as_json:
        Output(as_json=True).print_json(fields)
    elif not fields:
        print(f"step `{visible(step)}` would be taken from the cache")
    else:
        print(f"step `{visible(step)}` would run, because")
        rows = [(field["field"], _value(field["before"]), _value(field["now"])) for field in fields]
        print("\n".join(columns(("FIELD", "BEFORE", "NOW"), rows)))


def report_of(connection: Connection, run: str) -> dict[str, Any]:
    """The report of a run. One that goes on has the outcome `running`, and its steps are `running` or `waiting`."""
    found = find_run(connection, run)
    key = {"workflow_id": found["workflow_id"], "run_id": found["run_id"]}
    report: dict[str, Any] = connection.call("report", **key)
    if found["state"] not in UNFINISHED:
        return report
    progress = connection.call("progress", **key, since=0, wait_s=0.0)
    if progress["state"] not in UNFINISHED:
        ended: dict[str, Any] = connection.call("report", **key)
        return ended
    known = {step["id"] for step in report["steps"]}
    going_on = [_step_of(state) for state in progress["steps"] if state["id"] not in known]
    return {**report, "outcome": progress["state"], "steps": [*report["steps"], *going_on]}


def _step_of(state: dict[str, Any]) -> dict[str, Any]:
    """A step that goes on in the shape of a `StepReport`."""
    from bridge.report import StepReport

    now = time.time()
    return StepReport.model_construct(
        id=state["id"],
        name=state["name"],
        outcome=state["state"],
        reason=state["reason"],
        started_at=state["started_at"],
        duration_s=round(now - state["started_at"], 6) if state["started_at"] else 0.0,
        node=state["progress"]["node"],
        error=state["error"],
    ).model_dump(mode="json", warnings=False)


def _value(value: Any) -> str:
    """A value for people: of a hash its beginning is enough to see that it changed."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


COMMANDS = (runs, show, attach, cancel_run, retry, explain)
