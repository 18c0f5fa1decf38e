"""`orchestrate logs`: what the steps of a run printed; and the four verbs of the original's logs CLI.

The log files are read in place. With `--log-dir` no service is asked, so logs outlive the services.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import click

from bridge.cli.failure import INTERRUPTED, Failure
from bridge.cli.options import choose_run, connected, find_run, not_found, service_options
from bridge.records import (
    STARTS,
    Event,
    RunOutput,
    RunRecord,
    Wanted,
    events_of,
    follow,
    follow_events,
    list_runs,
    run_dir,
)
from bridge.state import State
from bridge.terminal import safe_json, visible
from bridge.view import UNFINISHED

OLD_VERBS = ("list-runs", "show-steps", "tail", "follow")
ASK_INTERVAL_S = 2.0
"""How often a run that is followed is asked for, in case it ended without saying so in its event log."""


@click.command()
@click.argument("run", metavar="RUN")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the run ends.")
@click.option("--step", "step_id", default="", metavar="ID", help="Only this step; of a matrix step, all instances.")
@click.option("--attempt", default=0, type=click.IntRange(0), metavar="N", help="Only this attempt; 0 is all of them.")
@click.option("--rank", default=0, type=click.IntRange(0), metavar="N", help="This node of steps on several nodes.")
@click.option("--stream", type=click.Choice(["stdout", "stderr", "both"]), default="both", show_default=True)
@click.option("--lines", type=click.IntRange(0), metavar="N", help="Only the last N lines of what is there.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines: the records as they are in the log files.")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Root of the logs; no service is asked then.")
@click.option("--workflow-id", help="Of the run, for `tail`, `follow` and `show-steps`.")
@click.option("--run-id", help="Of the run, for `tail`, `follow` and `show-steps`.")
@service_options
def logs(
    run: str,
    following: bool,
    step_id: str,
    attempt: int,
    rank: int,
    stream: Literal["stdout", "stderr", "both"],
    lines: int | None,
    as_json: bool,
    log_dir: Path | None,
    workflow_id: str | None,
    run_id: str | None,
    **service: Any,
) -> int:
    """Show what the steps of RUN printed.

    RUN is a workflow id, a run id, the beginning of either, or `last`. The verbs `list-runs`, `show-steps`, `tail` and
    `follow` read the event log: `orchestrate logs tail --workflow-id W --run-id R`.
    """
    try:
        if run in OLD_VERBS:
            _old_verb(run, log_dir, workflow_id, run_id, as_json)
            return 0
        folder, is_over = (_recorded(log_dir, run), lambda: False) if log_dir else _asked(run, service, following)
        _check_step(folder, step_id)
        output = RunOutput(folder, Wanted(step_id, attempt, stream, rank))
        if following:
            records = follow(output, lines, is_over)
        else:
            records = iter(output.read() if lines is None else deque(output.read(), maxlen=lines))
        print_records(records, as_json, bool(step_id), bool(attempt))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _asked(run: str, service: dict[str, Any], following: bool) -> tuple[Path, Callable[[], bool]]:
    """The folder of a run that the service knows, and whether it is over by now."""
    with connected(service) as connection:
        found = find_run(connection, run)
        key = {"workflow_id": found["workflow_id"], "run_id": found["run_id"]}
        progress = connection.call("progress", **key, since=2**62, wait_s=0.0)
    asked_at = time.monotonic()
    over = progress["state"] not in UNFINISHED

    def is_over() -> bool:
        nonlocal asked_at, over
        if not over and time.monotonic() - asked_at > ASK_INTERVAL_S:
            with connected(service) as connection:
                over = connection.call("progress", **key, since=2**62, wait_s=0.0)["state"] not in UNFINISHED
            asked_at = time.monotonic()
        return over

    folder = run_dir(progress["log_dir"], **key)
    if not folder.is_dir() and over:
        raise Failure(
            f"there are no logs in `{folder}`", "they may be on the machine of the worker, or have been removed"
        )
    return folder, is_over


def _recorded(log_dir: Path, run: str) -> Path:
    """The folder of a run under a log root."""
    records = list_runs(log_dir)
    summaries = [{"workflow_id": record.workflow_id, "run_id": record.run_id, "record": record} for record in records]
    found = choose_run(summaries, run)
    if found is None:
        if not records:
            raise Failure(f"there are no runs in `{log_dir}`", "wanted `WORKFLOW_ID/RUN_ID/events.jsonl` below it")
        raise not_found(run, [record.workflow_id for record in records])
    folder: Path = found["record"].folder
    return folder


def _check_step(folder: Path, step_id: str) -> None:
    """`Failure` when a run that is over never had the step."""
    if not step_id:
        return
    events = events_of(folder)
    known = dict.fromkeys(event.step_id for event in events if event.step_id)
    started = {name for name in known if name == step_id or name.startswith(f"{step_id}.")}
    if not started and any(event.status == "run_finished" for event in events):
        import difflib

        near = difflib.get_close_matches(step_id, list(known), n=1)
        if path := _log_elsewhere(folder, step_id):
            raise Failure(f"step `{step_id}` did not run in this run: its result was kept", f"its log is `{path}`")
        raise Failure(
            f"the run has no step `{step_id}`", f"did you mean `{near[0]}`?" if near else f"steps: {', '.join(known)}"
        )


def _log_elsewhere(folder: Path, step_id: str) -> str:
    """Where the log of a step is whose result came from the cache or from the run that was tried again."""
    try:
        steps = json.loads((folder / "report.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError):
        return ""
    return next((step["stdout_path"] for step in steps if step["id"] == step_id), "")


def print_records(
    records: Iterator[dict[str, Any]],
    as_json: bool,
    one_step: bool,
    one_attempt: bool,
    stream: TextIO | None = None,
) -> None:
    """A line per record; which step and attempt it is of stands before it where that is not clear."""
    open_line: tuple[str, int] | None = None
    for record in records:
        if as_json:
            print(safe_json(json.dumps(record, ensure_ascii=False)), file=stream, flush=True)
            continue
        step_id, attempt = str(record.get("stepId", "")), int(record.get("attempt", 1))
        key = (f"{step_id}/{record.get('stream')}", attempt)
        prefix = step_id if not one_step or "." in step_id else ""
        label = f"{prefix}#{attempt}" if attempt > 1 and not one_attempt else prefix
        # A record that is the beginning of a longer line is continued by the next one of its stream.
        if open_line is not None and open_line != key:
            print(file=stream)
        if open_line != key and label:
            print(f"{visible(label)} | ", end="", file=stream)
        is_partial = bool(record.get("partial"))
        print(visible(record["message"]), end="" if is_partial else "\n", file=stream, flush=True)
        open_line = key if is_partial else None
    if open_line is not None:
        print(file=stream)


def _old_verb(verb: str, log_dir: Path | None, workflow_id: str | None, run_id: str | None, as_json: bool) -> None:
    root = log_dir or Path(os.environ.get("TEMPORAL_LOG_DIR") or State.from_environment().run_log_dir)
    if verb == "list-runs":
        records = list_runs(root)
        _print_rows([_run_row(record) for record in records], as_json)
        return
    if not workflow_id or not run_id:
        raise Failure(f"`logs {verb}` needs `--workflow-id` and `--run-id`", "`orchestrate logs list-runs` lists them")
    folder = run_dir(root, workflow_id, run_id)
    if not (folder / "events.jsonl").is_file() and verb != "follow":
        raise not_found(f"{workflow_id}/{run_id}", [f"{each.workflow_id}/{each.run_id}" for each in list_runs(root)])
    if verb == "show-steps":
        _print_rows(step_rows(events_of(folder)), as_json)
        return
    if verb == "follow" and not (folder / "events.jsonl").is_file():
        print(f"waiting for `{folder / 'events.jsonl'}`", file=sys.stderr)
    for event in events_of(folder) if verb == "tail" else follow_events(folder):
        print(safe_json(json.dumps(event.model_dump(by_alias=True), ensure_ascii=False)), flush=True)


def _run_row(record: RunRecord) -> dict[str, Any]:
    return {
        "workflowId": record.workflow_id,
        "runId": record.run_id,
        "last": record.last_at,
        "plan": record.plan,
        "state": record.state,
        "progress": f"{record.num_ended}/{record.num_started}",
    }


def step_rows(events: list[Event]) -> list[dict[str, Any]]:
    """The last attempt of each step: what the original showed, then name, attempt and message.

    `state` is `started` while an attempt runs, also the second one, else `finished`, `cancelled` or `skipped`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.step_id:
            rows[event.step_id] = {
                "stepId": event.step_id,
                "state": "started" if event.status in STARTS else event.status.removeprefix("step_"),
                "exitCode": event.exit_code,
                "durationSec": event.duration_sec,
                "stdoutPath": event.stdout_path,
                "stderrPath": event.stderr_path,
                "structuredPath": event.structured_path,
                "stepName": event.step_name,
                "attempt": event.attempt,
                "message": event.message,
            }
    return list(rows.values())


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Tab-separated, for scripts, or one JSON document."""
    if as_json:
        print(safe_json(json.dumps(rows, indent=2, ensure_ascii=False)))
        return
    for row in rows:
        print("\t".join(visible(value) for value in row.values()))


COMMANDS = (logs,)
