"""What has become of a job: asked of whoever runs it, else read from what it has left behind.

    look -> its files say it has ended?      that is it
         -> the service knows the run?       it goes on, or its report says how it ended
         -> nobody knows the run:            the result or the process of its last attempt, else LOST

LOST is a job that nobody will finish: the service does not know its run, its process is gone and has left no result.
The container it may have left is ended before a job counts as LOST, so that another run of it has no twin.
What is seen is written to the job's files as well.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.job_files import JobFiles, Kept, moment, status_line
from bridge.jobs import STEP_ID, JobRecord, State
from bridge.view import UNFINISHED
from steps._files import CANCEL, read_result
from steps._process import is_alive

RC_TIMEOUT, RC_NOT_RUN = 124, 125
"""Exit codes of jobs whose command has none: what `timeout` and `docker run` give."""
CONTAINER_GRACE_S = 5.0
"""Between SIGTERM and SIGKILL for the container of a lost job."""
MISSED_HEARTBEATS = 3
"""A job that goes on without so many heartbeats is stale."""

Ask = Callable[..., dict[str, Any] | None]
"""`ask(method, **arguments)`: the answer of the service that runs the job; None when it does not know the run."""


def look(record: JobRecord, ask: Ask, *, is_launcher: bool = False) -> Kept:
    """The job as it is now. `is_launcher`: the caller launches another run of it, so nobody else launches this one."""
    files = JobFiles(record)
    kept = files.read()
    if not kept.goes_on:
        return kept
    run = ask("find", workflow_id=record.workflow_id)
    if run is None:
        return kept if not is_launcher and files.is_being_launched() else _left_behind(files, kept)
    if run["state"] in UNFINISHED:
        return files.catch_up(run["run_id"], is_running=False)
    report = ask("report", workflow_id=record.workflow_id, run_id=run["run_id"])
    return files.read() if report is None else conclude_from(record, report)


def conclude_from(record: JobRecord, report: dict[str, Any]) -> Kept:
    """Write how a job has ended, from the `RunReport` as JSON data."""
    files = JobFiles(record)
    files.catch_up(report["run_id"], is_running=False)
    steps = report["steps"] or [{"outcome": report["outcome"], "exit_code": None, "error": "", "reason": ""}]
    outcome = "cancelled" if report["outcome"] == "cancelled" else steps[0]["outcome"]
    return files.conclude(*ending(outcome, steps[0]["exit_code"], steps[0]["error"] or steps[0]["reason"]))


def ending(outcome: str, exit_code: int | None, error: str) -> tuple[State, int | None, str]:
    """State, exit code and message of a job whose step had this outcome."""
    said = error.strip().partition("\n")[0]
    if outcome == "succeeded":
        return "DONE", 0, ""
    if outcome == "cancelled":
        return "STOPPED", None, ""
    if outcome == "timed_out":
        return "FAILED", RC_TIMEOUT, said
    return "FAILED", RC_NOT_RUN if exit_code is None else exit_code, said


def stop_orphan(record: JobRecord) -> None:
    """End the process of a job whose run nobody knows any more; its container ends with it."""
    files = JobFiles(record)
    kept = files.read()
    host, folder = files.host(kept), files.attempt_dir(kept)
    if host is not None and folder is not None and host["isolated"] and is_alive(host):
        (folder / CANCEL).touch()
        with contextlib.suppress(ProcessLookupError):
            os.kill(host["pid"], signal.SIGTERM)


@dataclass(frozen=True)
class Health:
    """Whether a job does what its status says."""

    word: str
    """`running`, `stale` or `ended`."""
    reason: str
    """Why it is stale."""
    pid: int | None
    """Of its process; None where there is none that could be looked for."""
    heartbeat_age_s: float
    limit_s: float
    """Age of the last heartbeat from which on a job is stale."""


def health(record: JobRecord, kept: Kept, *, is_served: bool, limit_s: float | None = None) -> Health:
    """Judge `kept`; `is_served`: the service that runs the job answers, so that a dead process will be noticed."""
    host = JobFiles(record).host(kept)
    is_here = host is not None and bool(host["isolated"]) and host["node"] == socket.gethostname()
    pid = host["pid"] if host is not None and is_here else None
    age_s = max(0.0, time.time() - kept.heartbeat_at)
    limit_s = MISSED_HEARTBEATS * record.heartbeat_s if limit_s is None else limit_s
    reason = ""
    if host is not None and is_here and not is_served and not is_alive(host):
        reason = f"process {pid} is gone, or has become another one"
    elif age_s > limit_s:
        reason = f"no heartbeat for {age_s:.0f} s"
    word = "ended" if not kept.goes_on else "stale" if reason else "running"
    return Health(word, reason if kept.goes_on else "", pid, round(age_s, 3), limit_s)


def document(record: JobRecord, kept: Kept) -> dict[str, Any]:
    """A job as JSON data."""
    files = JobFiles(record)
    attempt_dir = files.attempt_dir(kept)
    host = files.host(kept)
    return {
        "job": record.job,
        "project_id": record.project_id,
        "run": record.run,
        "state": kept.state,
        "rc": kept.rc,
        "msg": kept.msg,
        "line": status_line(record.job, kept),
        "command": record.command,
        "created_at": record.created_at,
        "ended_at": kept.ended_at,
        "duration_s": round((kept.ended_at or time.time()) - record.created_at, 3),
        "heartbeat_at": kept.heartbeat_at,
        "heartbeat": moment(kept.heartbeat_at),
        "pid": host["pid"] if host else None,
        "attempt": int(attempt_dir.name.removeprefix("attempt-")) if attempt_dir else None,
        "workflow_id": record.workflow_id,
        "run_id": kept.run_id,
        "paths": {
            "status": str(files.status),
            "events": str(files.events),
            "raw_log": str(files.raw_log),
            "pid": str(files.pid),
            "records": str(record.folder),
        },
    }


def _left_behind(files: JobFiles, kept: Kept) -> Kept:
    """Nobody knows the run: what its last attempt has left."""
    run_id = kept.run_id or _newest_run(files.record)
    if run_id:
        kept = files.catch_up(run_id, is_running=False)
    host, folder = files.host(kept), files.attempt_dir(kept)
    is_dead = host is None or not is_alive(host)
    # A process leaves its result before it ends, so that one that has just ended is not lost.
    result = read_result(folder) if folder is not None else None
    if result is not None:
        return files.conclude(*ending(result.outcome, result.exit_code, result.error))
    if is_dead and not _end_container(files.record, kept):
        return files.conclude("LOST", msg="its run is not known any more, and its process is gone")
    return kept


def _end_container(record: JobRecord, kept: Kept) -> bool:
    """End the container of a job whose process is gone: nobody would ever attach to it. True when it is still there."""
    from container import step_containers

    if not kept.run_id:
        return False
    step_key = f"{record.workflow_id}/{kept.run_id}/{STEP_ID}"
    found = step_containers.find(step_containers.STEP_LABEL, step_key, os.environ)
    return bool(step_containers.end(found, os.environ, CONTAINER_GRACE_S))


def _newest_run(record: JobRecord) -> str:
    """Id of the run that has logs, when no worker has told which it is."""
    runs = [path for path in record.folder.iterdir() if path.is_dir()]
    return max(runs, key=lambda path: path.stat().st_mtime).name if runs else ""
