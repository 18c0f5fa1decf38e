"""The run report: one JSON document, always complete; and what a watcher sees of a run that goes on."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from steps import Frozen, Progress, StepResult
from steps._logs import tail
from steps._request import Outcome

State = Literal["waiting", "running", "succeeded", "failed", "skipped", "cancelled", "timed_out", "not_run"]
"""An outcome, or where a step without one is."""


class AttemptReport(Frozen):
    """One attempt of a step."""

    number: int
    outcome: Outcome
    reason: str = ""
    exit_code: int | None = None
    started_at: float | None = None
    """Unix time, seconds."""
    duration_s: float = 0.0
    node: str = ""


class StepReport(Frozen):
    """One step, or one instance of a matrix step. Paths and tails are those of the last attempt."""

    id: str
    name: str = ""
    type: str = ""
    outcome: Outcome
    reason: str = ""
    """Short word: `exit_code error timeout infrastructure cached dependency when cancelled failure ...`."""
    attempts: list[AttemptReport] = []
    exit_code: int | None = None
    started_at: float | None = None
    duration_s: float = 0.0
    node: str = ""
    image: str = ""
    gpus: list[str] = []
    outputs: dict[str, Any] = {}
    artifacts: dict[str, str] = {}
    """Path in the plan's folder -> `sha256:...` of each file the step has promised and made."""
    stdout_path: str = ""
    stderr_path: str = ""
    structured_path: str = ""
    stdout_tail: str = ""
    stderr_tail: str = ""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    error: str = ""
    """Sentence for people."""
    allow_failure: bool = False
    """The plan allows this step to fail: a failure is a warning."""


class RunReport(Frozen):
    """One run of a plan."""

    workflow_id: str
    run_id: str
    plan: str
    outcome: Outcome
    started_at: float
    finished_at: float
    duration_s: float
    log_dir: str = ""
    steps: list[StepReport] = []


class StepState(Frozen):
    """One step as a watcher sees it now."""

    id: str
    name: str = ""
    state: State
    reason: str = ""
    error: str = ""
    attempt: int = 0
    started_at: float | None = None
    duration_s: float = 0.0
    """Of an ended step; a running one counts from `started_at`."""
    progress: Progress = Progress()


class RunProgress(Frozen):
    """What has changed in a run since a sequence number."""

    workflow_id: str
    run_id: str
    plan: str
    state: State
    started_at: float
    sequence: int
    """Give it back to see only what changed since."""
    total: int
    """Steps known so far; a matrix adds its instances when its values are known."""
    counts: dict[str, int] = {}
    """Steps by state."""
    log_dir: str = ""
    steps: list[StepState] = Field(default=[])


class RunSummary(Frozen):
    """One row of `orchestrate runs`."""

    workflow_id: str
    run_id: str
    plan: str
    state: State
    started_at: float
    finished_at: float | None = None


def step_report(
    step_id: str, name: str, step_type: str, result: StepResult, attempts: list[AttemptReport]
) -> StepReport:
    """The report of a step from the result of its last attempt."""
    folder = result.attempt_dir
    return StepReport(
        id=step_id,
        name=name,
        type=step_type,
        outcome=result.outcome,
        reason=result.reason,
        attempts=attempts,
        exit_code=result.exit_code,
        started_at=result.started_at or None,
        duration_s=round(result.duration_s, 6),
        node=result.node,
        image=result.image,
        gpus=list(result.gpus),
        outputs=result.outputs,
        artifacts=result.artifacts,
        stdout_path=f"{folder}/stdout.log" if folder else "",
        stderr_path=f"{folder}/stderr.log" if folder else "",
        structured_path=f"{folder}/structured.jsonl" if folder else "",
        error=result.error,
    )


def progress_of(report: RunReport) -> RunProgress:
    """What a watcher sees of a run that has ended."""
    counts: dict[str, int] = {}
    for step in report.steps:
        counts[step.outcome] = counts.get(step.outcome, 0) + 1
    return RunProgress(
        workflow_id=report.workflow_id,
        run_id=report.run_id,
        plan=report.plan,
        state=report.outcome,
        started_at=report.started_at,
        sequence=2**62,
        total=len(report.steps),
        counts=counts,
        log_dir=report.log_dir,
        steps=[state_of(step) for step in report.steps],
    )


def state_of(report: StepReport) -> StepState:
    """What a watcher sees of a step that has its outcome."""
    return StepState(
        id=report.id,
        name=report.name,
        state=report.outcome,
        reason=report.reason,
        error=report.error,
        attempt=len(report.attempts),
        started_at=report.started_at,
        duration_s=report.duration_s,
    )


def with_tails(report: RunReport) -> RunReport:
    """The report with the ends of the log files that can be read from here."""
    return report.model_copy(update={"steps": [_with_tails(step, _tail_bytes()) for step in report.steps]})


def _with_tails(step: StepReport, limit: int) -> StepReport:
    if not step.stdout_path:
        return step
    stdout, stdout_cut = tail(Path(step.stdout_path), limit)
    stderr, stderr_cut = tail(Path(step.stderr_path), limit)
    return step.model_copy(
        update={
            "stdout_tail": stdout,
            "stderr_tail": stderr,
            "stdout_truncated": stdout_cut,
            "stderr_truncated": stderr_cut,
        }
    )


def _tail_bytes() -> int:
    """`TEMPORAL_LOG_MAX_BYTES`, by default 10,000, as in the original."""
    try:
        limit = int(os.environ.get("TEMPORAL_LOG_MAX_BYTES", ""))
    except ValueError:
        limit = 0
    return limit if limit > 0 else 10_000
