"""The durable heart: PlanWorkflow drives a `Schedule`, one `run_step` activity per attempt, and answers watchers.

    ready -> build call -> run_step -> (again, after a pause | report) -> finish -> ready ...

Pure: what it decides depends on its input and on recorded results only, so any worker can replay it. A long run goes on
in a new execution (continue-as-new); steps that are running then are found again by their key.
"""

import asyncio
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception
from temporalio.workflow import ActivityCancellationType

from bridge.beginnings import Beginnings
from bridge.calls import Begin, Begun, Finish, Record, RunInput, StepCall
from bridge.expressions import ExpressionError, render
from bridge.order import dependencies
from bridge.plan import Retry
from bridge.report import AttemptReport, RunProgress, RunReport, StepReport, StepState, state_of, step_report
from bridge.requests import run_scope, step_call
from bridge.retries import pause_s, tries_again
from bridge.schedule import Instance, Schedule
from steps import StepError, StepResult
from steps._request import Outcome

SHORTEST_HEARTBEAT_TIMEOUT_S = 1.5
"""A killed worker is noticed after this time, when there is little to do; see `_heartbeat_timeout`."""
LONGEST_HISTORY = 8_000
"""Events after which the run goes on in a new execution; Temporal's own limit is 51,200."""
MOST_STARTED_AT_ONCE = 100
"""Steps started in one go: one that takes 2 s counts as a deadlock, and machines can be busy."""
_FOREVER = timedelta(days=365)
_UNTIL_ATTACHED = RetryPolicy(
    initial_interval=timedelta(milliseconds=100), backoff_coefficient=1.5, maximum_interval=timedelta(seconds=2)
)
_A_FEW_TIMES = RetryPolicy(maximum_attempts=3)


@workflow.defn(name="PlanWorkflow")
class PlanWorkflow:
    """One run of a plan. Its result, or the detail of its failure, is the `RunReport`."""

    @workflow.init
    def __init__(self, run: RunInput) -> None:
        self._run = run
        info = workflow.info()
        self._workflow_id, self._run_id = info.workflow_id, info.first_execution_run_id
        self._started_at = run.started_at or info.start_time.timestamp()
        self._cached: dict[str, StepReport] = {}
        self._looked_up: set[str] = set()
        self._attempts = {instance: list(ended) for instance, ended in run.attempts.items()}
        self._beginnings = Beginnings()
        self._slow: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._records: list[asyncio.Task[Any]] = []
        self._wake = asyncio.Event()
        self._sequence = run.sequence
        self._states: dict[str, tuple[int, StepState]] = {}
        self._schedule = Schedule(
            run.plan,
            run_scope(run, self._workflow_id),
            dependencies,
            render,
            {report.id: report for report in run.reports},
        )
        for report in self._schedule.reports():
            self._show(report)
        self._outcome: Outcome | None = None

    @workflow.run
    async def run(self, run: RunInput) -> RunReport:
        """Run the plan to its end. Fails with `PlanFailed`, whose detail is the report, when the plan failed."""
        whole = asyncio.create_task(self._run_whole())
        try:
            report = await asyncio.shield(whole)
        except asyncio.CancelledError:
            self._schedule.stop("cancelled")
            self._cancel_running()
            self._wake.set()
            report = await whole
        if report.outcome == "failed":
            raise ApplicationError(_failure(report), report, type="PlanFailed", non_retryable=True)
        if report.outcome == "cancelled":
            raise asyncio.CancelledError
        return report

    @workflow.query
    def progress(self, since: int) -> RunProgress:
        """What changed after sequence number `since`; everything for 0 or a number of another time."""
        since = since if since <= self._sequence else 0
        states = [state for _, state in self._states.values()]
        counts: dict[str, int] = {}
        for state in states:
            counts[state.state] = counts.get(state.state, 0) + 1
        total = max(self._schedule.known, len(states))
        if total > len(states):
            counts["waiting"] = total - len(states)
        return RunProgress(
            workflow_id=self._workflow_id,
            run_id=self._run_id,
            plan=self._run.plan.name,
            state=self._outcome or "running",
            started_at=self._started_at,
            sequence=self._sequence,
            total=total,
            counts=counts,
            log_dir=self._run.log_dir,
            steps=[state for sequence, state in self._states.values() if sequence > since],
        )

    @workflow.query
    def report(self) -> RunReport:
        """The report as it is now; steps without an outcome are missing from a run that goes on."""
        return self._report()

    async def _run_whole(self) -> RunReport:
        if self._run.started_at is None:
            begin = Begin(run=self._run, workflow_id=self._workflow_id, run_id=self._run_id)
            begun: Begun = await self._locally("begin", begin, Begun) or Begun()
            self._cached = {report.id: report for report in begun.cached}
            self._looked_up = set(begun.looked_up)
        await self._drive()
        await asyncio.gather(*self._records)
        self._outcome = self._schedule.outcome()
        report = self._report()
        await self._locally("finish", Finish(report=report, log_dir=self._run.log_dir), None)
        return report

    async def _drive(self) -> None:
        """Start what is ready until every step has its outcome."""
        while True:
            for instance in (ready := self._schedule.ready(MOST_STARTED_AT_ONCE)):
                self._start(instance)
            self._record_decided()
            if len(ready) == MOST_STARTED_AT_ONCE:
                await self._locally("rest", None, None)
                continue
            if self._schedule.done:
                return
            if self._is_history_long():
                await self._continue_as_new_unless_stopped()
            await self._wake.wait()
            self._wake.clear()

    def _start(self, instance: Instance) -> None:
        if (cached := self._cached.pop(instance.id, None)) is not None:
            self._show(cached)
            self._schedule.finish(instance, cached)
            self._wake.set()
            return
        attempt = len(self._attempts.get(instance.id, [])) + 1
        self._show_running(instance, attempt)
        self._tasks[instance.id] = asyncio.create_task(self._run_instance(instance))

    def _show_running(self, instance: Instance, attempt: int, error: str = "") -> None:
        """A new attempt; `error` is why the one before it ended."""
        self._show_state(
            StepState(
                id=instance.id,
                name=instance.name,
                state="running",
                error=error,
                attempt=attempt,
                started_at=workflow.now().timestamp(),
            )
        )

    async def _run_instance(self, instance: Instance) -> None:
        report = await self._attempt_until_decided(instance)
        del self._tasks[instance.id]
        self._attempts.pop(instance.id, None)
        self._show(report)
        was_stopped = self._schedule.stopped
        self._schedule.finish(instance, report)
        if self._schedule.stopped and not was_stopped and self._run.plan.on_failure == "cancel":
            self._cancel_running()
        self._wake.set()

    async def _attempt_until_decided(self, instance: Instance) -> StepReport:
        """One attempt after another, as the step's `retry` and our own for lost machines allow."""
        step, ended = instance.step, self._attempts.setdefault(instance.id, [])
        while True:
            number = len(ended) + 1
            result = await self._attempt(instance, number)
            if result.reason == "cached":
                return self._step_report(instance, result, [])
            ended.append(_attempt_report(number, result))
            if not tries_again(step.retry or Retry(), result, ended):
                return self._step_report(instance, result, ended)
            self._show_running(instance, number + 1, result.error)
            try:
                await asyncio.sleep(pause_s(step.retry or Retry(), ended))
            except asyncio.CancelledError:
                return self._step_report(instance, result.model_copy(update={"outcome": "cancelled"}), ended)

    async def _attempt(self, instance: Instance, number: int) -> StepResult:
        try:
            call = step_call(
                self._run,
                instance,
                self._schedule.scope,
                workflow_id=self._workflow_id,
                run_id=self._run_id,
                attempt=number,
            )
        except (ExpressionError, StepError, ValueError) as error:
            return StepResult(outcome="failed", reason="error", error=str(error), final=True)
        if number > 1 or instance.id in self._looked_up:
            call = call.model_copy(update={"look_up": False})
        try:
            if self._run.quick and instance.step.id not in self._slow:
                if (soon := await self._begin_step(call)) is not None:
                    return soon
                self._slow.add(instance.step.id)
            return await self._scheduled("run_step", call)
        except asyncio.CancelledError:
            return StepResult(outcome="cancelled", reason="cancelled", error="cancelled before it started")
        except ActivityError as error:
            if is_cancelled_exception(error):
                return StepResult(outcome="cancelled", reason="cancelled", error="cancelled")
            return StepResult(outcome="failed", reason="error", error=str(error.cause or error), final=True)

    async def _scheduled(self, activity: str, call: StepCall) -> StepResult:
        """An activity that goes on for as long as the step does, with whichever worker is there."""
        request = call.request
        result: StepResult = await workflow.execute_activity(
            activity,
            call,
            result_type=StepResult,
            activity_id=f"{request.step_id}/{request.attempt}" + ("/end" if activity == "end_step" else ""),
            start_to_close_timeout=_FOREVER,
            heartbeat_timeout=self._heartbeat_timeout(),
            retry_policy=_UNTIL_ATTACHED,
            cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            summary=request.step_name,
        )
        return result

    def _heartbeat_timeout(self) -> timedelta:
        """Longer under pressure: a worker that starts 500 steps at once is late, not dead."""
        return timedelta(seconds=SHORTEST_HEARTBEAT_TIMEOUT_S + self._schedule.pressure / 50)

    async def _begin_step(self, call: StepCall) -> StepResult | None:
        """The result of a step that ends soon; None for one that goes on, or could not be begun this way."""
        try:
            return await self._beginnings.begin(call)
        except ActivityError as error:
            return await self._scheduled("end_step", call) if is_cancelled_exception(error) else None

    def _cancel_running(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def _record_decided(self) -> None:
        """Show and log the steps that ended without running."""
        never_ran = [report for report in self._schedule.decided() if not report.attempts]
        for report in never_ran:
            self._show(report)
        if never_ran:
            record = Record(
                workflow_id=self._workflow_id, run_id=self._run_id, log_dir=self._run.log_dir, reports=never_ran
            )
            self._records.append(asyncio.create_task(self._locally("record", record, None)))

    def _is_history_long(self) -> bool:
        info = workflow.info()
        return not self._schedule.stopped and (
            info.get_current_history_length() > LONGEST_HISTORY or info.is_continue_as_new_suggested()
        )

    async def _continue_as_new_unless_stopped(self) -> None:
        """Leave when no local activity runs: its end must be recorded before ours. Scheduled ones are found again.

        What stops the run meanwhile, a failure or a cancel, keeps it here: the next execution would not know of it.
        """
        await self._beginnings.stop()
        await asyncio.gather(*self._records)
        if self._schedule.stopped:
            self._beginnings.resume()
            return
        workflow.continue_as_new(
            self._run.model_copy(
                update={
                    "reports": self._schedule.reports(),
                    "attempts": {instance: self._attempts.get(instance, []) for instance in self._schedule.in_flight},
                    "started_at": self._started_at,
                    "sequence": self._sequence + 1,
                }
            )
        )

    async def _locally(self, activity: str, argument: Any, result_type: type | None) -> Any:
        """A short activity in the worker that runs this workflow; safe to run twice.

        None when it fails again and again: no run waits for ever for its records, or for what the cache knows.
        """
        try:
            return await workflow.execute_local_activity(
                activity,
                args=[] if argument is None else [argument],
                result_type=result_type,
                start_to_close_timeout=timedelta(seconds=60),
                retry_policy=_A_FEW_TIMES,
            )
        except ActivityError as error:
            workflow.logger.warning("`%s` is left out: %s", activity, error.cause or error)
            return None

    def _step_report(self, instance: Instance, result: StepResult, attempts: list[AttemptReport]) -> StepReport:
        report = step_report(instance.id, instance.name, instance.step.type, result, attempts)
        return report.model_copy(update={"allow_failure": bool(instance.step.allow_failure)})

    def _report(self) -> RunReport:
        now = workflow.now().timestamp()
        return RunReport(
            workflow_id=self._workflow_id,
            run_id=self._run_id,
            plan=self._run.plan.name,
            outcome=self._outcome or "not_run",
            started_at=self._started_at,
            finished_at=now,
            duration_s=round(now - self._started_at, 6),
            log_dir=self._run.log_dir,
            steps=self._schedule.reports(),
        )

    def _show(self, report: StepReport) -> None:
        self._show_state(state_of(report))

    def _show_state(self, state: StepState) -> None:
        self._sequence += 1
        self._states[state.id] = (self._sequence, state)


def _attempt_report(number: int, result: StepResult) -> AttemptReport:
    return AttemptReport(
        number=number,
        outcome=result.outcome,
        reason=result.reason,
        exit_code=result.exit_code,
        started_at=result.started_at or None,
        duration_s=round(result.duration_s, 6),
        node=result.node,
    )


def _failure(report: RunReport) -> str:
    wrong = [step for step in report.steps if step.outcome != "succeeded" and not step.allow_failure]
    failed = [step for step in wrong if step.outcome in ("failed", "timed_out")]
    # A step that was ended without its run may be the only one at fault.
    failed = failed or [step for step in wrong if step.outcome == "cancelled"] or wrong
    names = ", ".join(f"`{step.id}`" for step in failed[:5]) + (", ..." if len(failed) > 5 else "")
    first = f": {failed[0].error}" if failed else ""
    return f"plan `{report.plan}` failed in {names}{first}"[:1000]
