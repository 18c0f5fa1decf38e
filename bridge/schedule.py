"""Decides what of a plan may start next. Pure: no clock, no IO, no randomness, so a replay decides the same.

    waiting --dependencies decided--> skipped | not_run | expanded by its matrix --limits--> started --> finished

A step starts when its own dependencies are decided, not when a wave is. Every step ends with exactly one outcome.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from bridge.plan import Condition, Plan, Step
from bridge.problems import brief
from bridge.report import StepReport
from steps._request import Outcome

MOST_IN_FLIGHT = 500
"""Temporal hangs a workflow with more than 2,000 pending activities without an error; far below it is also fastest."""

FAILURES = frozenset({"failed", "timed_out"})

Scope = dict[str, Any]
Render = Callable[[Any, Scope], Any]


@dataclass(frozen=True)
class Instance:
    """One thing to run: a step, or one combination of its matrix."""

    id: str
    step: Step
    matrix: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name for people; the matrix values tell instances apart."""
        values = ", ".join(f"{name}={value}" for name, value in self.matrix.items())
        name = self.step.name or self.step.id
        return f"{name} ({values})"[:200] if values else name


@dataclass
class _Group:
    """All instances of one step."""

    step: Step
    dependencies: set[str]
    waits_for: set[str]
    instances: list[Instance] = field(default_factory=list)
    reports: dict[str, StepReport] = field(default_factory=dict)
    outcome: str | None = None
    started_after_stop: bool = False


class Schedule:
    """The state of one run. `ready()` gives what to start now; `finish` and `stop` change what that is."""

    def __init__(
        self,
        plan: Plan,
        scope: Scope,
        dependencies: Callable[[Step], set[str]],
        render: Render,
        reports: Mapping[str, StepReport] | None = None,
    ) -> None:
        """`scope` holds params, env and run; `reports` are instances already decided (an earlier part of the run)."""
        self.plan = plan
        self.scope: Scope = {**scope, "steps": {}}
        self.stopped: str = ""
        """Why nothing more is started: "" | "failure" | "cancelled"."""
        self._render = render
        self._groups = {
            step.id: _Group(step, needs := dependencies(step), needs | _looked_at(step)) for step in plan.steps
        }
        self._dependents: dict[str, list[_Group]] = {step.id: [] for step in plan.steps}
        self._undecided: dict[str, int] = {}
        self._queue: deque[Instance] = deque()
        self._in_flight: dict[str, Instance] = {}
        self._held: dict[str, int] = {}
        self._parked: dict[str, deque[Instance]] = {}
        self._fresh: list[StepReport] = []
        self._carried = dict(reports or {})
        for group in self._groups.values():
            self._undecided[group.step.id] = len(group.waits_for)
            for other in group.waits_for:
                self._dependents[other].append(group)
        self._decidable = deque(group for group in self._groups.values() if not group.waits_for)
        self._decide_all()

    def ready(self, most: int = MOST_IN_FLIGHT) -> list[Instance]:
        """Instances to start now, at most `most` and within every limit; they count as in flight from here on."""
        started: list[Instance] = []
        while self._queue and len(started) < most and len(self._in_flight) < self._most_in_flight():
            instance = self._queue.popleft()
            group = self._groups[instance.step.id]
            if self.stopped and not group.started_after_stop:
                self._record(instance, "not_run", self.stopped, f"not started: the run was {_STOP_WORDS[self.stopped]}")
                self._decide_all()
                continue
            limits = self._limits(instance)
            full = next((name for name, most in limits if self._held.get(name, 0) >= most), None)
            if full is not None:
                self._parked.setdefault(full, deque()).append(instance)
                continue
            for name, _ in limits:
                self._held[name] = self._held.get(name, 0) + 1
            self._in_flight[instance.id] = instance
            started.append(instance)
        return started

    def finish(self, instance: Instance, report: StepReport) -> None:
        """The instance has ended."""
        del self._in_flight[instance.id]
        for name, _ in self._limits(instance):
            self._held[name] -= 1
            if parked := self._parked.get(name):
                self._queue.appendleft(parked.popleft())
        self._stop_if_failed(instance.step, report.outcome)
        self._add(instance, report)
        self._decide_all()

    def stop(self, why: str) -> None:
        """Start nothing more but the steps whose `when` asks for it. `why` is `failure` or `cancelled`."""
        self.stopped = why
        # What waited for a lock or a place will not start: let `ready` record it.
        for parked in self._parked.values():
            self._queue.extend(parked)
            parked.clear()

    @property
    def in_flight(self) -> dict[str, Instance]:
        """What runs now."""
        return self._in_flight

    @property
    def pressure(self) -> int:
        """How many instances run or could run at once, now or in a moment."""
        return min(self._most_in_flight(), len(self._in_flight) + len(self._queue))

    @property
    def done(self) -> bool:
        """True when every step has its outcome."""
        return not self._in_flight and not self._queue and not any(self._parked.values())

    def decided(self) -> list[StepReport]:
        """Reports decided since the last call, those of steps that never started too."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def reports(self) -> list[StepReport]:
        """Every report so far, in plan order."""
        return [
            group.reports[instance.id]
            for group in self._groups.values()
            for instance in group.instances
            if instance.id in group.reports
        ]

    @property
    def known(self) -> int:
        """Number of instances known so far; a step whose matrix is not known yet counts as one."""
        return sum(max(1, len(group.instances)) for group in self._groups.values())

    def outcome(self) -> Outcome:
        """Outcome of the whole run, once done."""
        if self.stopped == "cancelled":
            return "cancelled"
        return "failed" if self.stopped == "failure" else "succeeded"

    def _most_in_flight(self) -> int:
        return min(MOST_IN_FLIGHT, self.plan.max_parallel or MOST_IN_FLIGHT)

    def _limits(self, instance: Instance) -> list[tuple[str, int]]:
        limits = [(f"lock:{name}", 1) for name in dict.fromkeys(instance.step.locks)]
        if instance.step.matrix is not None and instance.step.max_parallel:
            limits.append((f"matrix:{instance.step.id}", instance.step.max_parallel))
        return limits

    def _decide_all(self) -> None:
        """Decide what has become decidable; a loop, because a chain of skipped steps may be 10,000 long."""
        while self._decidable:
            self._decide(self._decidable.popleft())

    def _decide(self, group: _Group) -> None:
        """All dependencies have an outcome: expand the step, or record why it does not run."""
        whole = Instance(group.step.id, group.step)
        group.instances = [whole]
        if whole.id in self._carried:
            self._take_over(whole)
            return
        try:
            outcome, reason, error = self._verdict(group)
            instances = self._expand(group.step) if outcome is None else []
        except ValueError as problem:
            self._stop_if_failed(group.step, "failed")
            self._record(whole, "failed", "error", str(problem))
            return
        if outcome is not None:
            self._record(whole, outcome, reason, error)
        elif not instances:
            self._record(whole, "succeeded", "empty_matrix", "")
        else:
            group.started_after_stop = bool(self.stopped)
            group.instances = instances
            for instance in instances:
                if instance.id in self._carried:
                    self._take_over(instance)
                else:
                    self._queue.append(instance)

    def _verdict(self, group: _Group) -> tuple[Any, str, str]:
        """(outcome, reason, error) of a step that does not run; outcome None for one that does."""
        step = group.step
        outcomes = {other: self._groups[other].outcome for other in sorted(group.waits_for)}
        if step.when is not None:
            if not self._holds(step.when):
                seen = dict.fromkeys(self._seen_by(step.when, outcomes))
                return "skipped", "when", f"its `when` does not hold: {', '.join(seen)}"
            if self.stopped and not self._may_start_after_stop(group):
                return "not_run", self.stopped, f"not started: the run was {_STOP_WORDS[self.stopped]}"
            return None, "", ""
        for other, outcome in outcomes.items():
            if outcome not in ("succeeded", "not_run"):
                return "skipped", "dependency", f"`{other}` {outcome}"
        if "not_run" in outcomes.values() or (self.stopped and not self._may_start_after_stop(group)):
            return "not_run", self.stopped, f"not started: the run was {_STOP_WORDS[self.stopped]}"
        return None, "", ""

    def _may_start_after_stop(self, group: _Group) -> bool:
        """Handlers of failures run, and what follows them; the rest of the plan does not."""
        if group.step.when is not None and _asks_for_failure(group.step.when):
            return True
        return any(self._groups[other].started_after_stop for other in group.waits_for)

    def _holds(self, condition: Condition) -> bool:
        if condition.all is not None:
            return all(self._holds(part) for part in condition.all)
        if condition.any is not None:
            return any(self._holds(part) for part in condition.any)
        if condition.always:
            return True
        seen = self.scope["steps"][condition.step]
        if condition.status is not None and seen["outcome"] not in _matching(condition.status):
            return False
        if condition.exit_code is not None:
            wanted = condition.exit_code if isinstance(condition.exit_code, list) else [condition.exit_code]
            if seen["exit_code"] not in wanted:
                return False
        if condition.outputs is not None:
            wanted_outputs = self._render(condition.outputs, self.scope)
            return all(seen["outputs"].get(name, _MISSING) == value for name, value in wanted_outputs.items())
        return True

    def _seen_by(self, condition: Condition, outcomes: Mapping[str, Any]) -> Iterator[str]:
        """What a condition looked at, as it was: `` `a` failed with exit code 3 ``."""
        for part in [*(condition.all or []), *(condition.any or [])]:
            yield from self._seen_by(part, outcomes)
        if condition.step is None:
            return
        seen, words = self.scope["steps"][condition.step], f"`{condition.step}` {outcomes[condition.step]}"
        if condition.exit_code is not None and seen["exit_code"] is not None:
            words += f" with exit code {seen['exit_code']}"
        for name in condition.outputs or {}:
            outputs = seen["outputs"]
            words += f", its `{name}` is {brief(outputs[name])}" if name in outputs else f" without an output `{name}`"
        yield words

    def _expand(self, step: Step) -> list[Instance]:
        if step.matrix is None:
            return [Instance(step.id, step)]
        values = {name: self._render(value, self.scope) for name, value in step.matrix.items()}
        for name, value in values.items():
            if not isinstance(value, list):
                raise ValueError(f"matrix `{name}` of step `{step.id}` is {type(value).__name__}, wanted a list")
        return [
            Instance(f"{step.id}.{number}", step, dict(zip(values, combination, strict=True)))
            for number, combination in enumerate(product(*values.values()))
        ]

    def _record(self, instance: Instance, outcome: Any, reason: str, error: str) -> None:
        """Decide an instance that never started."""
        report = StepReport(
            id=instance.id,
            name=instance.name,
            type=instance.step.type,
            outcome=outcome,
            reason=reason,
            error=error,
            allow_failure=bool(instance.step.allow_failure),
        )
        self._add(instance, report)

    def _take_over(self, instance: Instance) -> None:
        """An instance that was decided before: it counts as if it had ended here."""
        report = self._carried.pop(instance.id)
        if report.outcome in (*FAILURES, "cancelled"):
            self._stop_if_failed(instance.step, report.outcome)
        self._add(instance, report, fresh=False)

    def _stop_if_failed(self, step: Step, outcome: str) -> None:
        if outcome != "succeeded" and not step.allow_failure and not self.stopped:
            self.stop("failure")

    def _add(self, instance: Instance, report: StepReport, *, fresh: bool = True) -> None:
        group = self._groups[instance.step.id]
        group.reports[instance.id] = report
        if fresh:
            self._fresh.append(report)
        if len(group.reports) < len(group.instances):
            return
        group.outcome = _together([group.reports[one.id].outcome for one in group.instances])
        self.scope["steps"][group.step.id] = self._seen(group)
        for dependent in self._dependents[group.step.id]:
            self._undecided[dependent.step.id] -= 1
            if self._undecided[dependent.step.id] == 0:
                self._decidable.append(dependent)

    def _seen(self, group: _Group) -> dict[str, Any]:
        """What templates and conditions see of a decided step; a matrix shows lists in the order of its instances."""
        reports = [group.reports[instance.id] for instance in group.instances]
        if group.step.matrix is None:
            outputs, exit_code = reports[0].outputs, reports[0].exit_code
        else:
            ran = [] if reports[0].reason == "empty_matrix" else reports
            names = dict.fromkeys(name for report in ran for name in report.outputs) or dict.fromkeys(
                group.step.outputs
            )
            outputs = {name: [report.outputs.get(name) for report in ran] for name in names}
            codes = [report.exit_code for report in ran if report.exit_code]
            exit_code = codes[0] if codes else 0
        return {"outcome": group.outcome, "exit_code": exit_code, "outputs": outputs}


_MISSING = object()
_STOP_WORDS = {"failure": "stopped by a failure", "cancelled": "cancelled", "": "stopped"}


def _looked_at(step: Step) -> set[str]:
    return step.when.steps() if step.when is not None else set()


def _matching(status: str) -> frozenset[str]:
    return {"success": frozenset({"succeeded"}), "failure": FAILURES}.get(status, frozenset({status}))


def _asks_for_failure(condition: Condition) -> bool:
    """True when the condition is about something else than success: a handler, or a clean-up."""
    parts = [*(condition.all or []), *(condition.any or [])]
    if parts:
        return any(_asks_for_failure(part) for part in parts)
    codes = condition.exit_code if isinstance(condition.exit_code, list) else [condition.exit_code]
    return bool(
        condition.always
        or (condition.status is not None and "succeeded" not in _matching(condition.status))
        or any(code for code in codes)
    )


def _together(outcomes: list[str]) -> str:
    """Outcome of a matrix: the worst of its instances."""
    for outcome in ("failed", "timed_out", "cancelled", "not_run", "skipped"):
        if outcome in outcomes:
            return outcome
    return "succeeded"
