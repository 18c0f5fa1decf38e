"""Start, watch, cancel and retry runs, from Python or (through `gateway`) from the command line.

    client = await Client.connect()
    report = await client.run(Plan(steps=[Step(id="hello", type="command", params={"command": "date"})]))

Without an address the local services are found or started; with one, or `TEMPORAL_ADDRESS`, that server is used.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.client import (
    Client as TemporalClient,
)
from temporalio.client import (
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.envconfig import ClientConfig
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from bridge.cache import StepCache
from bridge.calls import RunInput
from bridge.checks import check_plan
from bridge.codec import data_converter
from bridge.lookup import explain
from bridge.params import resolve_params
from bridge.plan import Plan, with_defaults
from bridge.reader import LoadedPlan, read_plan_text, read_steps_json_text
from bridge.report import RunProgress, RunReport, RunSummary, StepState, with_tails
from bridge.report import State as RunState
from bridge.state import State
from steps import Progress

TASK_QUEUE = "orchestration"
CONNECT_TIMEOUT_S = 10.0
_POLL_S = 0.1

_STATES: dict[WorkflowExecutionStatus | None, RunState] = {
    WorkflowExecutionStatus.RUNNING: "running",
    WorkflowExecutionStatus.COMPLETED: "succeeded",
    WorkflowExecutionStatus.FAILED: "failed",
    WorkflowExecutionStatus.CANCELED: "cancelled",
    WorkflowExecutionStatus.TERMINATED: "cancelled",
    WorkflowExecutionStatus.TIMED_OUT: "timed_out",
}


class ClientError(Exception):
    """A request about a run that cannot be met."""


class RunNotFound(ClientError):
    """There is no such run."""


class RunConflict(ClientError):
    """A run with this workflow id is going on."""


class SecretsNeeded(ClientError):
    """The plan names secrets that are not known here; the arguments are their names."""


@dataclass(frozen=True)
class RunHandle:
    """A started run."""

    workflow_id: str
    run_id: str
    plan: str
    log_dir: str
    warnings: tuple[str, ...] = ()


class Client:
    """What can be asked about runs. Its methods are also the gateway's."""

    def __init__(self, temporal: TemporalClient, task_queue: str, state: State, *, local: bool) -> None:
        self.temporal = temporal
        self.task_queue = task_queue
        self.state = state
        self._local = local
        self._ends: dict[tuple[str, str], asyncio.Task[RunReport]] = {}

    @classmethod
    async def connect(
        cls,
        address: str | None = None,
        *,
        namespace: str | None = None,
        task_queue: str | None = None,
        state: State | None = None,
    ) -> "Client":
        """Connect to `address`, to what the environment names, or to the local services (started when needed)."""
        state = state or State.from_environment()
        local = address is None and not is_remote()
        if local:
            from bridge.services import ensure

            services = await asyncio.to_thread(ensure, state.create())
            address = services.address
        temporal = await connect_temporal(address, namespace, state)
        return cls(temporal, task_queue or os.environ.get("TEMPORAL_TASK_QUEUE", TASK_QUEUE), state, local=local)

    async def run(self, plan: Plan | LoadedPlan, **options: Any) -> RunReport:
        """`start`, then `wait`."""
        handle = await self.start(plan, **options)
        return await self.wait(handle.workflow_id, handle.run_id)

    async def start(
        self,
        plan: Plan | LoadedPlan,
        *,
        params: Mapping[str, Any] | None = None,
        plan_dir: str | Path | None = None,
        workflow_id: str | None = None,
        log_dir: str | Path | None = None,
        default_log_dir: str | Path | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> RunHandle:
        """Start a checked plan. Raises `PlanError`, `RunConflict`, `SecretsNeeded`.

        `plan_dir` is what relative paths are relative to: the plan file's folder, or the current directory.
        `default_log_dir` counts when neither `log_dir` nor the plan says where logs go.
        """
        loaded = plan if isinstance(plan, LoadedPlan) else _loaded(plan, plan_dir)
        run = self._run_input(loaded, params or {}, log_dir, default_log_dir)
        workflow_id = workflow_id or _new_workflow_id(run.plan.name)
        self._keep_secrets(run, workflow_id, secrets or {})
        return await self._start(run, workflow_id, tuple(str(warning) for warning in loaded.warnings))

    async def submit(
        self,
        text: str,
        path: str,
        given: Mapping[str, Any] | None = None,
        workflow_id: str | None = None,
        log_dir: str | None = None,
        default_log_dir: str | None = None,
        format: str = "yaml",
        secrets: Mapping[str, str] | None = None,
    ) -> RunHandle:
        """Read, check and start the plan in `text`, which came from `path`. `PlanError` holds all that is wrong."""
        read = read_steps_json_text if format == "json" else read_plan_text
        loaded = await asyncio.to_thread(read, text, Path(path))
        return await self.start(
            loaded,
            params=given,
            workflow_id=workflow_id,
            log_dir=log_dir,
            default_log_dir=default_log_dir,
            secrets=secrets,
        )

    async def wait(self, workflow_id: str, run_id: str | None = None) -> RunReport:
        """Wait for the end of a run; its report, whatever the outcome."""
        run_id = run_id or await self._newest(workflow_id)
        return await asyncio.shield(self._end(workflow_id, run_id))

    async def report(self, workflow_id: str, run_id: str | None = None) -> RunReport:
        """The report so far; of a run that goes on only the steps that have an outcome."""
        run_id = run_id or await self._newest(workflow_id)
        handle = self._handle(workflow_id, run_id)
        description = await self._found(handle.describe(), workflow_id)
        goes_on = description.status in (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.CONTINUED_AS_NEW)
        if goes_on and await self._newest(workflow_id) == run_id:
            report = await self._query_report(workflow_id)
        else:
            report = await self.wait(workflow_id, run_id)
        return await asyncio.to_thread(with_tails, report)

    async def progress(
        self, workflow_id: str, run_id: str | None = None, since: int = 0, wait_s: float = 0.0
    ) -> RunProgress:
        """What changed since sequence number `since`: at once when something did, else after `wait_s` seconds.

        Running steps come with what they last said even when their state has not changed.
        """
        run_id = run_id or await self._newest(workflow_id)
        end = self._end(workflow_id, run_id)
        deadline = time.monotonic() + wait_s
        while True:
            await asyncio.wait([end], timeout=max(0.0, min(_POLL_S, deadline - time.monotonic())))
            if end.done():
                return _progress_of(end.result())
            progress = await self._query_progress(workflow_id, since)
            if progress.run_id == run_id and (progress.sequence > since or time.monotonic() >= deadline):
                return progress.model_copy(update={"steps": await self._with_heartbeats(workflow_id, progress, since)})
            if time.monotonic() >= deadline:
                return progress

    async def runs(self, limit: int = 50) -> list[RunSummary]:
        """Newest runs first."""
        summaries = []
        async for execution in self.temporal.list_workflows('WorkflowType="PlanWorkflow"', limit=limit * 2):
            if execution.status not in _STATES:
                continue
            memo = await execution.memo()
            summaries.append(
                RunSummary(
                    workflow_id=execution.id,
                    run_id=execution.raw_info.first_run_id or execution.run_id,
                    plan=str(memo.get("plan", "")),
                    state=_STATES[execution.status],
                    started_at=execution.start_time.timestamp(),
                    finished_at=execution.close_time.timestamp() if execution.close_time else None,
                )
            )
        return sorted(summaries, key=lambda summary: -summary.started_at)[:limit]

    async def cancel(self, workflow_id: str, run_id: str | None = None) -> None:
        """Ask a run to cancel: running steps are ended, `when: always` steps still run."""
        handle = self.temporal.get_workflow_handle(workflow_id, first_execution_run_id=run_id)
        await self._found(handle.cancel(), workflow_id)

    async def retry(
        self, workflow_id: str, run_id: str | None = None, secrets: Mapping[str, str] | None = None
    ) -> RunHandle:
        """Run again what did not succeed; steps that did keep their outputs. Raises `RunConflict` while it goes on."""
        run_id = run_id or await self._newest(workflow_id)
        handle = self._handle(workflow_id, run_id)
        description = await self._found(handle.describe(), workflow_id)
        if description.status == WorkflowExecutionStatus.RUNNING:
            raise RunConflict(f"run `{workflow_id}` goes on\n\nhint: `orchestrate cancel {workflow_id}` first")
        before = await self._input(handle)
        report = await self.wait(workflow_id, run_id)
        kept = [step for step in report.steps if step.outcome == "succeeded"]
        run = before.model_copy(update={"reports": kept, "attempts": {}, "started_at": None, "sequence": 0})
        self._keep_secrets(run, workflow_id, secrets or {})
        return await self._start(run, workflow_id, ())

    async def explain(
        self, text: str, path: str, given: Mapping[str, Any] | None = None, step_id: str = ""
    ) -> list[dict[str, str]]:
        """Field by field, why a cached step would run again; empty when it would not."""
        loaded = await asyncio.to_thread(read_plan_text, text, Path(path))
        run = self._run_input(loaded, given or {})
        if step_id not in {step.id for step in run.plan.steps}:
            raise ClientError(f"plan `{run.plan.name}` has no step `{step_id}`")
        changes = await asyncio.to_thread(explain, run, step_id, StepCache(self.state.cache_file))
        return [change._asdict() for change in changes]

    async def _start(self, run: RunInput, workflow_id: str, warnings: tuple[str, ...]) -> RunHandle:
        try:
            handle = await self.temporal.start_workflow(
                "PlanWorkflow",
                run,
                id=workflow_id,
                task_queue=self.task_queue,
                # A worker killed in the middle of a decision costs this long; a large plan takes longer to decide.
                task_timeout=timedelta(seconds=1.5 + len(run.plan.steps) // 500),
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo={"plan": run.plan.name},
                static_summary=f"{run.plan.name}: {len(run.plan.steps)} steps",
                request_eager_start=True,
            )
        except WorkflowAlreadyStartedError:
            raise RunConflict(
                f"a run with workflow id `{workflow_id}` goes on\n\nhint: choose another `--workflow-id`"
            ) from None
        return RunHandle(workflow_id, handle.first_execution_run_id or "", run.plan.name, run.log_dir, warnings)

    def _run_input(
        self,
        loaded: LoadedPlan,
        given: Mapping[str, Any],
        log_dir: str | Path | None = None,
        default_log_dir: str | Path | None = None,
    ) -> RunInput:
        folder = loaded.path.parent
        plan = with_defaults(loaded.plan.model_copy(update={"name": loaded.plan.name or loaded.path.stem}))
        return RunInput(
            plan=plan,
            plan_dir=str(folder),
            log_dir=str(self._log_dir(plan, folder, log_dir, default_log_dir)),
            params=resolve_params(plan, given),
            quick=self._local,
        )

    def _log_dir(self, plan: Plan, folder: Path, given: str | Path | None, default: str | Path | None) -> Path:
        if given is None and plan.log_dir is None:
            chosen = default or os.environ.get("TEMPORAL_LOG_DIR")
            return Path(chosen).absolute() if chosen else self.state.run_log_dir
        return folder / (given or plan.log_dir or "")

    def _keep_secrets(self, run: RunInput, workflow_id: str, given: Mapping[str, str]) -> None:
        """Put secrets that came with the request where the local worker's steps find them, and nowhere else."""
        from bridge.state import write_private
        from steps._secrets import is_known

        names = {name for step in run.plan.steps for name in step.secret_variables.values()}
        if not self._local or not names:
            return
        folder = self.state.secrets_dir / "runs" / workflow_id
        for name in names & given.keys():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(folder / name, given[name])
        missing = sorted(name for name in names if name not in given and not is_known(name, self.state.secrets_dir))
        if missing:
            raise SecretsNeeded(*missing)

    def _handle(self, workflow_id: str, run_id: str) -> WorkflowHandle[Any, RunReport]:
        return self.temporal.get_workflow_handle(workflow_id, run_id=run_id, result_type=RunReport)

    def _end(self, workflow_id: str, run_id: str) -> "asyncio.Task[RunReport]":
        """The task that waits for the end of a run; one for all who watch it."""
        key = (workflow_id, run_id)
        if key not in self._ends or (self._ends[key].done() and self._ends[key].exception() is not None):
            self._ends[key] = task = asyncio.create_task(self._wait_for_end(workflow_id, run_id))
            task.add_done_callback(lambda _: asyncio.get_running_loop().call_later(5, self._ends.pop, key, None))
        return self._ends[key]

    async def _wait_for_end(self, workflow_id: str, run_id: str) -> RunReport:
        try:
            return await self._handle(workflow_id, run_id).result()
        except WorkflowFailureError as failure:
            if isinstance(failure.cause, ApplicationError) and failure.cause.type == "PlanFailed":
                return RunReport.model_validate(failure.cause.details[0])
            report = await self._query_report(workflow_id)
            return report if report.outcome != "not_run" else report.model_copy(update={"outcome": "cancelled"})
        except RPCError as error:
            raise _not_found(error, workflow_id) from None

    async def _query_report(self, workflow_id: str) -> RunReport:
        report: RunReport = await self.temporal.get_workflow_handle(workflow_id).query(
            "report", result_type=RunReport, rpc_timeout=timedelta(seconds=30)
        )
        return report

    async def _query_progress(self, workflow_id: str, since: int) -> RunProgress:
        """The newest execution of the workflow answers: the one that goes on."""
        progress: RunProgress = await self._found(
            self.temporal.get_workflow_handle(workflow_id).query(
                "progress", since, result_type=RunProgress, rpc_timeout=timedelta(seconds=30)
            ),
            workflow_id,
        )
        return progress

    async def _with_heartbeats(self, workflow_id: str, progress: RunProgress, since: int) -> list[StepState]:
        """The changed steps, and the running ones with what their activities last reported."""
        if progress.counts.get("running", 0) == 0:
            return progress.steps
        description = await self.temporal.get_workflow_handle(workflow_id).describe()
        said: dict[str, Progress] = {}
        for pending in description.raw_description.pending_activities:
            if pending.heartbeat_details.payloads:
                with contextlib.suppress(Exception):
                    decoded = await self.temporal.data_converter.decode(pending.heartbeat_details.payloads, [Progress])
                    said[pending.activity_id.rpartition("/")[0]] = decoded[0]
        steps = {step.id: step for step in progress.steps}
        missing = said.keys() - steps.keys()
        if missing and since:
            everything = await self._query_progress(workflow_id, 0)
            steps.update({step.id: step for step in everything.steps if step.id in missing})
        return [step.model_copy(update={"progress": said.get(step.id, step.progress)}) for step in steps.values()]

    async def _newest(self, workflow_id: str) -> str:
        """Run id of the newest run with this workflow id: that of its first execution."""
        description = await self._found(self.temporal.get_workflow_handle(workflow_id).describe(), workflow_id)
        return str(description.raw_description.workflow_execution_info.first_run_id or description.run_id)

    async def _input(self, handle: WorkflowHandle[Any, Any]) -> RunInput:
        async for event in handle.fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            (run,) = await self.temporal.data_converter.decode(payloads, [RunInput])
            assert isinstance(run, RunInput)
            return run
        raise RunNotFound(f"the history of run `{handle.id}` is gone")

    async def _found(self, call: Any, workflow_id: str) -> Any:
        try:
            return await call
        except RPCError as error:
            raise _not_found(error, workflow_id) from None


def is_remote() -> bool:
    """True when the environment or Temporal's own configuration file names a server."""
    if os.environ.get("TEMPORAL_ADDRESS"):
        return True
    return bool(ClientConfig.load_client_connect_config().get("target_host"))


async def connect_temporal(
    address: str | None, namespace: str | None, state: State, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> TemporalClient:
    """Connect with Temporal's environment configuration (address, namespace, TLS, API key), arguments winning.

    A server that is just starting is waited for. `RuntimeError` when none answers within `timeout_s` seconds.
    """
    config = dict(ClientConfig.load_client_connect_config())
    given = {"target_host": address, "namespace": namespace}
    config.update({name: value for name, value in given.items() if value})
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await TemporalClient.connect(**config, data_converter=data_converter(state))  # type: ignore[arg-type]
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)


def _loaded(plan: Plan, plan_dir: str | Path | None) -> LoadedPlan:
    """A plan built in Python, checked like one that was read from a file. Raises `PlanError`."""
    path = Path(plan_dir or Path.cwd()).absolute() / f"{plan.name or 'plan'}.py"
    return LoadedPlan(plan=plan, path=path, warnings=check_plan(plan, str(path)))


def _new_workflow_id(name: str) -> str:
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _not_found(error: RPCError, workflow_id: str) -> Exception:
    if error.status == RPCStatusCode.NOT_FOUND:
        return RunNotFound(f"there is no run `{workflow_id}`\n\nhint: `orchestrate runs` lists them")
    return error


def _progress_of(report: RunReport) -> RunProgress:
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
        steps=[
            StepState(
                id=step.id,
                name=step.name,
                state=step.outcome,
                reason=step.reason,
                error=step.error,
                attempt=len(step.attempts),
                started_at=step.started_at,
                duration_s=step.duration_s,
            )
            for step in report.steps
        ],
    )
