"""`orchestrate job status`, `tail`, `wait` and `health`: what looks at one job."""

import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

import click

from bridge.cli.failure import FAILED
from bridge.cli.job_lookup import (
    EXIT_CODES,
    STALE,
    TIMED_OUT,
    Watcher,
    ask_of,
    find_job,
    job_options,
    looked_at,
    project_of,
    service_of,
    time_option,
)
from bridge.cli.logs import print_records
from bridge.cli.options import explained, json_option
from bridge.cli.watch import Output
from bridge.job_files import JobFiles, Kept, status_line
from bridge.job_look import document
from bridge.job_look import health as judge
from bridge.job_look import look as look_at
from bridge.jobs import JobRecord
from bridge.records import POLL_S, GrowingLines, RunOutput, follow
from bridge.terminal import visible

Job = dict[str, Any]
"""The values of `job_options`."""


@click.command()
@job_options
@json_option
def status(as_json: bool, **job: Any) -> None:
    """Show the status line of a job.

    Such as `DONE job=train ts=2026-01-31T12:00:00+00:00 rc=0`.

    Exit code 0: shown, whatever it says, 2: there is no such job, 3: a service not reached. To act on the state, see
    `orchestrate job wait --timeout 0`.
    """
    record = _find(job)
    print_state(record, looked_at(record), as_json)


@click.command()
@job_options
@click.option("--lines", type=click.IntRange(0), default=80, show_default=True, metavar="N", help="Only the last N.")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job ends.")
@click.option("--events", is_flag=True, help="The job's events instead of its output, as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines: the output as it is in the log files.")
def tail(lines: int, following: bool, events: bool, as_json: bool, **job: Any) -> None:
    """Show the end of what a job printed.

    Exit code 0: shown, 2: there is no such job, 3: a service not reached, 130: interrupted. The job goes on.
    """
    record = _find(job)
    kept = looked_at(record)
    if not following:
        if events:
            _print_lines(deque(GrowingLines(JobFiles(record).events).read(), maxlen=lines))
        elif kept.run_id:
            output = RunOutput(record.folder / kept.run_id)
            print_records(iter(deque(output.read(), maxlen=lines)), as_json, True, True)
        return
    with explained(service_of(record)) as connection:
        watcher = Watcher(record, connection)
        if events:
            _follow_events(record, watcher, lines)
        else:
            follow_output(record, watcher, lines=lines, as_json=as_json, stream=sys.stdout)


@click.command()
@job_options
@time_option("--timeout", "timeout_s", help="How long; for ever by default. 0 only looks.")
@json_option
def wait(timeout_s: float | None, as_json: bool, **job: Any) -> int:
    """Wait until a job ends, and show its status line.

    Exit code 0: DONE, 1: FAILED or LOST, 130: STOPPED, 124: it goes on when the time is over, 2: there is no such job,
    3: a service not reached.
    """
    record = _find(job)
    with explained(service_of(record)) as connection:
        kept = Watcher(record, connection).wait(timeout_s)
    print_state(record, kept, as_json)
    return EXIT_CODES.get(kept.state, TIMED_OUT)


@click.command()
@job_options
@time_option("--stale-after", "limit_s", help="Age of a heartbeat; three intervals by default.")
@json_option
def health(limit_s: float | None, as_json: bool, **job: Any) -> int:
    """Judge whether a job does what its status says; starts nothing.

    `running pid=N`, `stale pid=N` (no heartbeat for too long; or its process is gone, or is another one by now, and no
    service is there to notice) or `ended`, then the status line. `pid=unknown` is a job whose process has not begun, or
    is on a Ray node.

    Exit code 0: running, or DONE, 1: FAILED, STOPPED or LOST, 4: stale, 2: there is no such job, 3: a service not
    reached.
    """
    record = _find(job)
    # The heartbeat is judged as it was before this look.
    kept = JobFiles(record).read()
    with explained(service_of(record)) as connection:
        is_served = connection.is_up()
        if is_served and kept.goes_on:
            kept = look_at(record, ask_of(connection))
    found = judge(record, kept, is_served=is_served, limit_s=limit_s)
    if as_json:
        verdict = {"health": found.word, "reason": found.reason, "heartbeat_age_s": found.heartbeat_age_s}
        Output(as_json=True).print_json({**document(record, kept), **verdict, "stale_after_s": found.limit_s})
    else:
        pid = "unknown" if found.pid is None else found.pid
        print(found.word if found.word == "ended" else f"{found.word} pid={pid}")
        print(status_line(record.job, kept))
        if found.word != "ended":
            print(f"heartbeat_age_s={found.heartbeat_age_s:.0f} stale_after_s={found.limit_s:g}")
        if found.reason:
            print(f"reason={visible(found.reason)}")
    if found.word == "ended":
        return 0 if kept.state == "DONE" else FAILED
    return STALE if found.word == "stale" else 0


def follow_output(record: JobRecord, watcher: Watcher, *, lines: int | None, as_json: bool, stream: TextIO) -> None:
    """Print what a job prints until it ends; of what is there at first, only the last `lines` when given."""
    kept = watcher.wait(until=lambda kept: bool(kept.run_id))
    if not kept.run_id:
        return
    output = RunOutput(record.folder / kept.run_id)
    print_records(follow(output, lines, lambda: not watcher.look().goes_on), as_json, True, True, stream)


def _follow_events(record: JobRecord, watcher: Watcher, last: int) -> None:
    lines = GrowingLines(JobFiles(record).events)
    _print_lines(deque(lines.read(), maxlen=last))
    while True:
        kept = watcher.wait(POLL_S)
        _print_lines(lines.read())
        if not kept.goes_on:
            return


def _find(job: Job) -> JobRecord:
    return find_job(job["job"], project_of(job["project_id"], job["project_root"]), job["run"])


def print_state(record: JobRecord, kept: Kept, as_json: bool) -> None:
    """The status line, and on stderr why it is so; or the document."""
    if as_json:
        Output(as_json=True).print_json(document(record, kept))
        return
    print(status_line(record.job, kept), flush=True)
    if kept.state in ("FAILED", "LOST") and kept.msg:
        print(visible(kept.msg), file=sys.stderr)


def _print_lines(lines: "Iterator[bytes] | deque[bytes]") -> None:
    for line in lines:
        print(visible(line.decode(errors="replace")), flush=True)
