"""Whether a step is tried again, and when: its own `retry`, and ours for lost machines. Pure, used by the workflow."""

from bridge.plan import Retry
from bridge.report import AttemptReport
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
