"""Start, watch, cancel and retry runs, from Python or (through `gateway`) from the command line.

    client = await Client.connect()
    report = await client.run(Plan(steps=[Step(id="hello", type="command", params={"command": "date"})]))

Without an address the local services are found or started; with one, or `TEMPORAL_ADDRESS`, that server is used.
"""

import asyncio
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.client import Client as TemporalClient
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from bridge.cache import StepCache
from bridge.calls import RunInput
from bridge.checks import check_plan
from bridge.lookup import explain
from bridge.params import resolve_params
from bridge.plan import Plan, with_defaults
from bridge.reader import LoadedPlan, read_plan_text, read_steps_json_text
from bridge.report import RunProgress, RunReport, RunSummary
from bridge.runs import ClientError, RunConflict, RunNotFound, Runs
from bridge.state import State
from bridge.temporal import connect_temporal, has_workers, is_remote

__all__ = ["TASK_QUEUE", "Client", "ClientError", "RunConflict", "RunHandle", "RunNotFound", "SecretsNeeded"]

TASK_QUEUE = "orchestration"


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
        self._runs = Runs(temporal)

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
        warnings = [str(warning) for warning in loaded.warnings]
        if not self._local and not await has_workers(self.temporal, self.task_queue):
            warnings.append(
                f"warning: no worker serves task queue `{self.task_queue}`; the run waits for one\n"
                f"  hint: orchestrate worker --task-queue {self.task_queue}"
            )
        return await self._start(run, workflow_id, tuple(warnings))

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
        return await self._runs.wait(workflow_id, run_id)

    async def report(self, workflow_id: str, run_id: str | None = None) -> RunReport:
        """The report so far, with the ends of the logs; of a run that goes on only the steps that have an outcome."""
        return await self._runs.report(workflow_id, run_id)

    async def progress(
        self, workflow_id: str, run_id: str | None = None, since: int = 0, wait_s: float = 0.0
    ) -> RunProgress:
        """What changed since sequence number `since`: at once when something did, else after `wait_s` seconds."""
        return await self._runs.progress(workflow_id, run_id, since, wait_s)

    async def find(self, workflow_id: str) -> RunSummary:
        """The newest run with this workflow id; needs no worker. Raises `RunNotFound`."""
        return await self._runs.find(workflow_id)

    async def runs(self, limit: int = 50) -> list[RunSummary]:
        """Newest runs first."""
        return await self._runs.newest_first(limit)

    async def cancel(self, workflow_id: str, run_id: str | None = None) -> None:
        """Ask a run to cancel: running steps are ended, `when: always` steps still run."""
        await self._runs.cancel(workflow_id, run_id)

    async def retry(
        self, workflow_id: str, run_id: str | None = None, secrets: Mapping[str, str] | None = None
    ) -> RunHandle:
        """Run again what did not succeed; steps that did keep their outputs. Raises `RunConflict` while it goes on."""
        run_id = run_id or await self._runs.newest(workflow_id)
        if await self._runs.is_running(workflow_id, run_id):
            raise RunConflict(f"run `{workflow_id}` goes on\n\nhint: `orchestrate cancel {workflow_id}` first")
        before = await self._runs.input(workflow_id, run_id)
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
                # A worker killed in the middle of a decision costs this long; a large plan takes longer to decide,
                # and on a busy machine a time that is too short would be over again and again.
                task_timeout=timedelta(seconds=min(10.0, 2 + len(run.plan.steps) / 100)),
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


def _loaded(plan: Plan, plan_dir: str | Path | None) -> LoadedPlan:
    """A plan built in Python, checked like one that was read from a file. Raises `PlanError`."""
    path = Path(plan_dir or Path.cwd()).absolute() / f"{plan.name or 'plan'}.py"
    return LoadedPlan(plan=plan, path=path, warnings=check_plan(plan, str(path)))


def _new_workflow_id(name: str) -> str:
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
