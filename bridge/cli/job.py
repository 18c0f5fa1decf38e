"""`orchestrate job`: container jobs under a name. Here `list` and `stop`; see `job_run` and `job_watch`."""

import shlex
import sys
from pathlib import Path

import click

from bridge.cli.failure import Failure
from bridge.cli.job_lookup import (
    TIMED_OUT,
    Watcher,
    all_jobs,
    ask_of,
    find_job,
    job_options,
    looked_at,
    project_of,
    service_of,
    time_option,
)
from bridge.cli.job_run import run_job
from bridge.cli.job_watch import health, print_state, status, tail, wait
from bridge.cli.options import explained, json_option
from bridge.cli.run import visible_lines
from bridge.cli.watch import Output, cancel
from bridge.job_files import JobFiles
from bridge.job_look import document, stop_orphan
from bridge.terminal import columns, duration, moment

STOP_TIMEOUT_S = 60.0


@click.group()
def job() -> None:
    """Run commands in the standard container as jobs under a name.

    A job goes on when the terminal, the worker or the server dies. Its state is one of START, PROGRESS, DONE, FAILED,
    STOPPED (somebody ended it) and LOST (nobody will ever finish it). A name is the whole name, never its beginning.
    """


@job.command("list")
@click.option("--project-id", default="", help="Only the jobs of this project.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="How many.")
@json_option
def list_jobs(project_id: str, limit: int, as_json: bool) -> None:
    """List jobs, the newest first.

    Every run of every job of every project; looked for where SYGALDRY_CONTAINER_ROOT says, or where projects are by
    default.
    """
    documents = []
    for record in all_jobs(project_id)[:limit]:
        try:
            kept = looked_at(record)
        except Failure as failure:
            print(f"job `{record.job}`: {visible_lines(failure.format_message())}", file=sys.stderr)
            kept = JobFiles(record).read()
        documents.append(document(record, kept))
    if as_json:
        Output(as_json=True).print_json(documents)
        return
    rows = [
        (
            each["state"],
            each["job"],
            each["project_id"],
            moment(each["created_at"]),
            duration(each["duration_s"]),
            "" if each["rc"] is None else str(each["rc"]),
            each["run"],
            shlex.join(each["command"]),
        )
        for each in documents
    ]
    print("\n".join(columns(("STATE", "JOB", "PROJECT", "STARTED", "DURATION", "RC", "RUN", "COMMAND"), rows)))


@job.command()
@job_options
@time_option("--timeout", "timeout_s", default=STOP_TIMEOUT_S, help="How long to wait: 60 s.")
@json_option
def stop(job: str, run: str | None, project_id: str, project_root: Path | None, timeout_s: float, as_json: bool) -> int:
    """End a job and wait until it has ended.

    It gets SIGTERM, and what is left after five seconds SIGKILL.

    Exit code 0: it has ended, 1: it had ended before, 2: there is no such job, 3: a service not reached, 124: it has
    not ended in time, but will.
    """
    record = find_job(job, project_of(project_id, project_root), run)
    with explained(service_of(record)) as connection:
        watcher = Watcher(record, connection)
        kept = watcher.wait(timeout_s, until=lambda kept: not JobFiles(record).is_being_launched())
        had_ended = not kept.goes_on
        if not had_ended:
            if known := ask_of(connection)("find", workflow_id=record.workflow_id):
                cancel(connection, record.workflow_id, known["run_id"])
            else:
                stop_orphan(record)
            kept = watcher.wait(timeout_s)
    print_state(record, kept, as_json)
    return int(had_ended) or (TIMED_OUT if kept.goes_on else 0)


for command in (run_job, status, tail, wait, health):
    job.add_command(command)


COMMANDS = (job,)
