"""What is tried again: a step by its own `retry` and by ours for lost machines, a run when somebody asks. Pure.

The workflow uses it, so it decides the same in every replay.
"""

from bridge.order import topological_order, waits_for
from bridge.plan import Plan, Retry
from bridge.report import AttemptReport, StepReport
from steps import StepResult

MOST_INFRASTRUCTURE_ATTEMPTS = 3
"""Attempts lost to a dead actor, node or process, whatever the plan's own `retry` says."""


def tries_again(retry: Retry, result: StepResult, ended: list[AttemptReport]) -> bool:
    """True when a step whose last attempt came to `result` gets another one; `ended` are all its attempts."""
    if result.outcome in ("succeeded", "cancelled") or result.final:
        return False
    if result.reason == "infrastructure":
        lost = sum(attempt.reason == "infrastructure" for attempt in ended)
        return lost < MOST_INFRASTRUCTURE_ATTEMPTS or (
            "infrastructure" in (retry.on or []) and lost < retry.max_attempts
        )
    if sum(attempt.reason != "infrastructure" for attempt in ended) >= retry.max_attempts:
        return False
    if retry.on is None:
        return True
    return ("timeout" in retry.on) if result.outcome == "timed_out" else (result.exit_code in retry.on)


def pause_s(retry: Retry, ended: list[AttemptReport]) -> float:
    """Seconds before the next attempt. A lost machine is no reason to wait: the step itself did nothing wrong."""
    if ended[-1].reason == "infrastructure":
        return 0.0
    failures = sum(attempt.reason != "infrastructure" for attempt in ended)
    return min(retry.max_backoff_s, retry.backoff_s * 2.0 ** min(failures - 1, 30))


def kept_reports(plan: Plan, reports: list[StepReport]) -> list[StepReport]:
    """What a retry of the whole run keeps: successes that nothing which runs again could have changed.

    Instances of a matrix that succeeded stay beside those that run again. A step skipped by its `when` is skipped again
    while all it looks at stays, so what follows it stays too.
    """
    needed = waits_for(plan)
    of_step: dict[str, list[StepReport]] = {step_id: [] for step_id in needed}
    for report in reports:
        of_step[report.id if report.id in of_step else report.id.rpartition(".")[0]].append(report)
    runs_again: set[str] = set()
    kept: set[str] = set()
    for step_id in topological_order(plan):
        own = of_step[step_id]
        if not runs_again.isdisjoint(needed[step_id]):
            runs_again.add(step_id)
            continue
        if not own or any(report.outcome not in ("succeeded", "skipped") for report in own):
            runs_again.add(step_id)
        kept.update(report.id for report in own if report.outcome == "succeeded")
    return [report for report in reports if report.id in kept]
