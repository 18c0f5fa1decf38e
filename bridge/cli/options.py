"""Options that several commands share, and how the run that a user means is found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from bridge.cli.connection import CallError, Connection, Lost, connect
from bridge.cli.failure import Failure, Unreachable

MOST_RUNS = 1000
"""Runs that are looked at when one is named by a prefix."""

Function = Callable[..., Any]
Summary = dict[str, Any]
"""A `RunSummary` as JSON data."""


def service_options(command: Function) -> Function:
    """`--address`, `--namespace`, `--task-queue`: another Temporal than the local one."""
    for decorate in (
        click.option("--task-queue", envvar="TEMPORAL_TASK_QUEUE", help="Task queue of the workers."),
        click.option("--namespace", envvar="TEMPORAL_NAMESPACE", help="Temporal namespace."),
        click.option(
            "--address",
            envvar="TEMPORAL_ADDRESS",
            help="Temporal server, `host:port`; without one the local services are used.",
        ),
    ):
        command = decorate(command)
    return command


def json_option(command: Function) -> Function:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(command)


@contextmanager
def connected(service: dict[str, Any]) -> Iterator[Connection]:
    """A connection for the values of `service_options`; what goes wrong with it becomes a `Failure`."""
    with explained(connect(service["address"], service["namespace"], service["task_queue"])) as connection:
        yield connection


@contextmanager
def explained(connection: Connection) -> Iterator[Connection]:
    """A connection that is closed at the end; what goes wrong with it becomes a `Failure`."""
    try:
        yield connection
    except CallError as error:
        raise failure_of(error) from error
    except Lost as lost:
        raise Unreachable(
            f"the connection broke before the answer came: {lost}",
            "`orchestrate runs` shows whether a run was started",
        ) from lost
    finally:
        connection.close()


def failure_of(error: CallError) -> Failure:
    """What the other side said, with the exit code it deserves."""
    if error.kind == "PlanError":
        return Failure(f"the plan is not valid\n{error.message}")
    if error.kind in ("RunNotFound", "RunConflict", "ClientError", "ValueError"):
        return Failure(error.message)
    if error.kind == "SecretsNeeded":
        names = ", ".join(f"`{name}`" for name in error.names)
        return Failure(
            f"the plan needs secrets that are not known here: {names}",
            f"`orchestrate secret set {error.names[0]}`, or set the environment variable `{error.names[0]}`",
        )
    return Unreachable(f"{error.message} ({error.kind})")


def find_run(connection: Connection, text: str) -> Summary:
    """The run that `text` means: a workflow id (its newest run), a run id, a unique prefix of either, or `last`.

    `Failure` with the nearest names when there is none, or more than one.
    """
    runs: list[Summary] = connection.call("runs", limit=5 if text == "last" else MOST_RUNS)
    found = choose_run(runs, text)
    if found is not None:
        return found
    try:
        progress: Summary = connection.call("progress", workflow_id=text, run_id=None, since=2**62, wait_s=0.0)
    except CallError as error:
        if error.kind != "RunNotFound":
            raise
        raise not_found(text, [run["workflow_id"] for run in runs]) from error
    return progress


def choose_run(runs: list[Summary], text: str) -> Summary | None:
    """The run among `runs` (newest first) that `text` means; `Failure` when it may be several."""
    if text == "last" and runs:
        return runs[0]
    for key in ("workflow_id", "run_id"):
        for run in runs:
            if run[key] == text:
                return run
    matches: dict[str, Summary] = {}
    for run in runs:
        if run["workflow_id"].startswith(text):
            matches.setdefault(run["workflow_id"], run)
        elif run["run_id"].startswith(text):
            matches[run["run_id"]] = run
    if len(matches) > 1:
        names = list(matches)
        shown = ", ".join(f"`{name}`" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise Failure(f"`{text}` may be several runs: {shown}", "give more of the name, or `last`")
    return next(iter(matches.values()), None)


def not_found(text: str, known: list[str]) -> Failure:
    """No such run; the nearest ones."""
    import difflib

    if text == "last":
        return Failure("there is no run yet", "start one: `orchestrate PLAN.yaml`")
    near = difflib.get_close_matches(text, list(dict.fromkeys(known)), n=3, cutoff=0.4)
    names = " or ".join(f"`{name}`" for name in near)
    return Failure(f"there is no run `{text}`", f"did you mean {names}?" if near else "`orchestrate runs` lists them")
