"""The end of a run in lines: table of steps, ends of the failed steps' logs, outputs, folder of the logs, outcome.

Plain dictionaries (a `RunReport` as JSON data), as in `view`.
"""

import itertools
import json
from pathlib import Path
from typing import Any, TextIO

from bridge.terminal import coloured, columns, cut, duration, terminal_width, visible
from bridge.view import FAILURES, SMALL_PLAN, counts_text, glyph, label, why

Step = dict[str, Any]
"""A `StepReport` as JSON data."""
Report = dict[str, Any]
"""A `RunReport` as JSON data."""
TAIL_LINES = 10
MOST_TAILS = 5
MOST_OUTPUTS = 10


def summary(report: Report, stream: TextIO) -> list[str]:
    """See above; for `stream`, with colours and cut to its width when it is a terminal."""
    limit = terminal_width(stream)
    steps = report["steps"]
    shown = steps if len(steps) <= SMALL_PLAN else [step for step in steps if step["outcome"] in FAILURES][:SMALL_PLAN]
    lines = []
    if shown:
        rows = [_row(step) for step in shown]
        lines += ["", *columns(("STEP", "OUTCOME", "DURATION", "ATTEMPTS", ""), rows, stream)]
    for block in (*(_tails(step, limit) for step in _with_tails(steps)), _last_outputs(steps)):
        lines += ["", *block] if block else []
    counts: dict[str, int] = {}
    for step in steps:
        counts[step["outcome"]] = counts.get(step["outcome"], 0) + 1
    outcome = coloured(f"{glyph(report['outcome'])} {report['outcome']}", report["outcome"], limit)
    lines += [
        "",
        f"logs: {visible(run_folder(report))}",
        f"plan `{visible(report['plan'])}` {outcome} in {duration(report['duration_s'])} ({counts_text(counts)})",
    ]
    return lines


def run_folder(report: Report) -> Path:
    """Folder of a run's records."""
    for step in report["steps"]:
        folder = Path(step["stdout_path"]).parent.parent.parent
        # A cached step's paths are those of the run that made it.
        if folder.name == report["run_id"]:
            return folder
    return Path(report["log_dir"], report["workflow_id"], report["run_id"])


def _row(step: Step) -> list[str]:
    attempts = len(step["attempts"])
    said = why({**step, "state": step["outcome"]})
    if step["outcome"] in FAILURES and step["allow_failure"]:
        said = f"allowed: {said}"
    time_text = duration(step["duration_s"]) if step["started_at"] else ""
    return [label(step), step["outcome"], time_text, str(attempts or ""), said]


def _with_tails(steps: list[Step]) -> list[Step]:
    """Steps whose output ends the summary: those that failed, or the only one there is."""
    return steps if len(steps) == 1 else [step for step in steps if step["outcome"] in FAILURES][:MOST_TAILS]


def _tails(step: Step, limit: int | None) -> list[str]:
    """What a step said at its end: an error that the table of `limit` cells has no room for, and its output."""
    lines = []
    error = step["error"].strip().splitlines()
    if step["outcome"] in FAILURES and error and (len(error) > 1 or (limit and len(error[0]) > limit // 3)):
        lines += [f"--- {label(step)} error", *map(visible, error)]
    for stream in ("stdout", "stderr"):
        tail = step[f"{stream}_tail"].replace("\r", "\n").rstrip().splitlines()
        if tail:
            shown = tail[-TAIL_LINES:]
            cut_off = step[f"{stream}_truncated"] or len(tail) > len(shown)
            lines.append(f"--- {label(step)} {stream}{' (its end)' if cut_off else ''}")
            lines += [visible(line) for line in shown]
    return lines


def _last_outputs(steps: list[Step]) -> list[str]:
    """Outputs of the last steps: those that were still running when the last step began."""
    ran = [step for step in steps if step["started_at"]]
    last_start = max((step["started_at"] for step in ran), default=0.0)
    last = [step for step in ran if step["outputs"] and step["started_at"] + step["duration_s"] >= last_start]
    pairs = ((step["id"], name, value) for step in last for name, value in step["outputs"].items())
    lines = []
    for step_id, name, value in itertools.islice(pairs, MOST_OUTPUTS):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{visible(step_id)}.{visible(name)}: {cut(visible(text), 300)}")
    return lines
