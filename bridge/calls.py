"""What crosses between client, workflow and activities: one frozen model a call."""

from typing import Any

from bridge.plan import Cache, Plan, Resources
from bridge.report import AttemptReport, RunReport, StepReport
from steps import Frozen, StepRequest


class RunInput(Frozen):
    """Start of a run, or of its next part after a continue-as-new."""

    plan: Plan
    """With its defaults merged into its steps, see `plan.with_defaults`."""
    plan_dir: str
    log_dir: str
    params: dict[str, Any] = {}
    """Every declared param with its value."""
    reports: list[StepReport] = []
    """Steps decided by an earlier part, or taken over from the run that is retried."""
    attempts: dict[str, list[AttemptReport]] = {}
    """Ended attempts of steps that were running when the earlier part ended."""
    started_at: float | None = None
    """Unix time of the run's first part; None in the first part itself."""
    sequence: int = 0
    """Where the earlier part's progress numbers ended."""
    quick: bool = False
    """Steps begin as local activities, which cost a fraction of a scheduled one. Only where every worker sees the same
    attempt folders: a worker that dies has the last second's steps asked for again, and they are found there."""


class StepCall(Frozen):
    """One attempt of one step, for `run_step`."""

    request: StepRequest
    plan: str
    resources: Resources | None = None
    image: str = ""
    cache: Cache | None = None
    look_up: bool = True
    """False when the cache was already asked in vain for this attempt."""


class Begin(Frozen):
    """A run starts: write its first event and look up what need not run again."""

    run: RunInput
    workflow_id: str
    run_id: str


class Begun(Frozen):
    """Steps found in the cache."""

    cached: list[StepReport] = []
    looked_up: list[str] = []
    """Instances that were asked for, found or not."""


class Record(Frozen):
    """Steps that ended without running; for the event log."""

    workflow_id: str
    run_id: str
    log_dir: str
    reports: list[StepReport]


class Finish(Frozen):
    """A run has ended: write its last event and its report."""

    report: RunReport
    log_dir: str
