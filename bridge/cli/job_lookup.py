"""How a command finds the job that is meant, the service that runs it, and what has become of it."""

import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from bridge.cli.connection import CallError, Connection, LocalConnection, connect
from bridge.cli.failure import FAILED, INTERRUPTED, Failure
from bridge.cli.options import explained
from bridge.job_files import JobFiles, Kept
from bridge.job_look import Ask, look
from bridge.jobs import JobRecord, known_roots, records
from bridge.state import State
from container.mounts import container_root, project_id

TIMED_OUT, STALE = 124, 4
"""Exit codes: the job still goes on when the time to wait is over; it goes on without a sign of life."""
EXIT_CODES = {"DONE": 0, "FAILED": FAILED, "LOST": FAILED, "STOPPED": INTERRUPTED}
"""By state; a job that goes on is `TIMED_OUT`."""
FILES_INTERVAL_S = 0.1
"""How often the files of a job that is waited for are read."""
ASK_INTERVAL_S = 2.0
"""How often its service is asked."""
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

Function = Callable[..., Any]


def seconds(value: Any) -> float:
    """Seconds of an option: a number, or one with `s`, `m`, `h` or `d`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value))
    if found is None:
        raise click.BadParameter(f"got `{value}`, wanted seconds, or a number with `s`, `m`, `h` or `d` such as `90m`")
    return float(found[1]) * _SECONDS[found[2]]


time_option = partial(click.option, type=seconds, metavar="TIME")
"""An option that takes seconds, or a number with a unit."""


def project_options(command: Function) -> Function:
    """`--project-id` and `--project-root`."""
    root = click.Path(path_type=Path, file_okay=False, exists=True)
    for decorate in (
        click.option(
            "--project-root", type=root, metavar="DIR", help="The project's folder; the current one by default."
        ),
        click.option("--project-id", envvar="SYGALDRY_PROJECT_ID", default="", help="By default the folder's name."),
    ):
        command = decorate(command)
    return command


def job_options(command: Function) -> Function:
    """`--job` of a project, and `--run`."""
    command = click.option("--run", metavar="RUN", help="A run of the job; the newest by default.")(command)
    return click.option("--job", "--job-name", "job", required=True, metavar="NAME", help="The job's whole name.")(
        project_options(command)
    )


def project_of(named: str, root: Path | None) -> str:
    """The project that is meant. `Failure` for a name that cannot be."""
    try:
        return project_id(named, root or Path.cwd())
    except ValueError as error:
        raise Failure(str(error)) from error


def find_job(job: str, project: str, run: str | None) -> JobRecord:
    """The run of the job with exactly this name, the newest by default. `Failure` when there is none."""
    root = container_root(os.environ, project).absolute()
    known = [record for record in records([root]) if record.project_id == project]
    named = [record for record in known if record.job == job]
    found = next((record for record in named if run in (None, record.run)), None)
    if found is None and named:
        raise Failure(f"job `{job}` has no run `{run}`", f"its newest is `{named[0].run}`")
    if found is None:
        import difflib

        near = difflib.get_close_matches(job, list(dict.fromkeys(record.job for record in known)), n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`orchestrate job list` shows the jobs of every project"
        raise Failure(f"project `{project}` has no job `{job}` in `{root}`", hint)
    return found


def all_jobs(project: str) -> list[JobRecord]:
    """Every run of every job, the newest first; of one project, when one is named."""
    roots = [container_root(os.environ, project)] if project else known_roots(os.environ)
    return [record for record in records(roots) if project in ("", record.project_id)]


def service_of(record: JobRecord) -> Connection:
    """The service that was asked to run the job, whatever this shell's environment names."""
    if record.state_dir:
        return LocalConnection(State(Path(record.state_dir)))
    return connect(record.address, record.namespace, record.task_queue)


def ask_of(connection: Connection) -> Ask:
    """Questions to a service, as `bridge.job_look` puts them."""

    def ask(method: str, **arguments: Any) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = connection.call(method, **arguments)
        except CallError as error:
            if error.kind != "RunNotFound":
                raise
            return None
        return answer

    return ask


def looked_at(record: JobRecord) -> Kept:
    """The job as it is now; its service is started when it has to be asked and is on this machine."""
    kept = JobFiles(record).read()
    if not kept.goes_on:
        return kept
    with explained(service_of(record)) as connection:
        return look(record, ask_of(connection))


class Watcher:
    """Looks at one job again and again: at its files often, at its service now and then."""

    def __init__(self, record: JobRecord, connection: Connection) -> None:
        self._record = record
        self._ask = ask_of(connection)
        self._asked_at = float("-inf")

    def look(self) -> Kept:
        """The job as it is now, or was less than `ASK_INTERVAL_S` ago."""
        kept = JobFiles(self._record).read()
        if kept.goes_on and time.monotonic() - self._asked_at > ASK_INTERVAL_S:
            kept = look(self._record, self._ask)
            self._asked_at = time.monotonic()
        return kept

    def wait(self, timeout_s: float | None = None, until: Callable[[Kept], bool] = lambda kept: False) -> Kept:
        """The job when it has ended, `until` holds, or the time is over."""
        deadline = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            kept = self.look()
            if not kept.goes_on or until(kept) or time.monotonic() >= deadline:
                return kept
            time.sleep(min(FILES_INTERVAL_S, max(0.0, deadline - time.monotonic())))
