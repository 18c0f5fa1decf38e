"""Start, watch, cancel and retry runs, from Python or (through `gateway`) from the command line.

    client = await Client.connect()
    report = await client.run(Plan(steps=[Step(id="hello", type="command", params={"command": "date"})]))

Without an address the local services are found or started; with one, or `TEMPORAL_ADDRESS`, that server is used.
"""

import asyncio
import os
import secrets
import unicodedata
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.client import Client as TemporalClient
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from bridge.cache import StepCache
from bridge.calls import RunInput
from bridge.checks import check_plan
from bridge.current_cluster import chosen_cluster
from bridge.lookup import explain
from bridge.params import resolve_params
from bridge.plan import Plan, with_defaults
from bridge.reader import LoadedPlan, read_plan_text, read_steps_json_text
from bridge.report import RunProgress, RunReport, RunSummary
from bridge.retries import kept_reports
from bridge.run_secrets import handed_over
from bridge.runs import ClientError, RunConflict, RunNotFound, Runs
from bridge.state import State
from bridge.temporal import connect_temporal, has_workers, is_remote

__all__ = ["TASK_QUEUE", "Client", "ClientError", "RunConflict", "RunHandle", "RunNotFound", "SecretsNeeded"]

TASK_QUEUE = "orchestration"


class SecretsNeeded(ClientError):
    """The plan names secrets that the caller must have a say in; the arguments are their names.

    Those that `secrets` says nothing of, where the caller is another process, or else those that are not known here.
    """


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

    def __init__(
        self,
        temporal: TemporalClient,
        task_queue: str,
        state: State,
        *,
        local: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment`: the caller's. None where callers are other processes, which `submit` and `retry` ask."""
        self.temporal = temporal
        self.task_queue = task_queue
        self.state = state
        self._local = local
        self._environment = environment
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
        queue = task_queue or os.environ.get("TEMPORAL_TASK_QUEUE", TASK_QUEUE)
        return cls(temporal, queue, state, local=local, environment=os.environ)

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
        `default_log_dir` counts when neither `log_dir` nor the plan says where logs go. `secrets` win over the caller's
        environment, which wins over those that are stored.
        """
        loaded = plan if isinstance(plan, LoadedPlan) else _loaded(plan, plan_dir)
        run = self._run_input(loaded, params or {}, log_dir, default_log_dir)
        return await self._start_checked(loaded, run, workflow_id, self._own_secrets(run, secrets or {}))

    async def _start_checked(
        self, loaded: LoadedPlan, run: RunInput, workflow_id: str | None, own_secrets: Mapping[str, str] | None
    ) -> RunHandle:
        workflow_id = _checked_id(workflow_id or _new_workflow_id(run.plan.name))
        warnings = [str(warning) for warning in loaded.warnings]
        if not self._local and not await has_workers(self.temporal, self.task_queue):
            warnings.append(
                f"warning: no worker serves task queue `{self.task_queue}`; the run waits for one\n"
                f"  hint: orchestrate worker --task-queue {self.task_queue}"
            )
        return await self._start(run, workflow_id, tuple(warnings), own_secrets)

    async def submit(
        self,
        text: str,
        path: str,
        given: Mapping[str, Any] | None = None,
        workflow_id: str | None = None,
        log_dir: str | None = None,
        default_log_dir: str | None = None,
        format: str = "yaml",
        secrets: Mapping[str, str | None] | None = None,
        ray_address: str = "",
    ) -> RunHandle:
        """Read, check and start the plan in `text`, which came from `path`. `PlanError` holds all that is wrong.

        `ray_address` is the caller's `RAY_ADDRESS`.
        """
        read = read_steps_json_text if format == "json" else read_plan_text
        loaded = await asyncio.to_thread(read, text, Path(path))
        run = self._run_input(loaded, given or {}, log_dir, default_log_dir)
        own_secrets = self._own_secrets(run, secrets or {}, asks=self._environment is None)
        handle = await self._start_checked(loaded, run, workflow_id, own_secrets)
        return replace(handle, warnings=(*handle.warnings, *self._ray_warnings(run, ray_address)))

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
        self, workflow_id: str, run_id: str | None = None, secrets: Mapping[str, str | None] | None = None
    ) -> RunHandle:
        """Run again what did not succeed, and what follows from it; the other steps keep their outputs.

        Raises `RunConflict` while the run goes on.
        """
        run_id = run_id or await self._runs.newest(workflow_id)
        if await self._runs.is_running(workflow_id, run_id):
            raise RunConflict(f"run `{workflow_id}` goes on\n\nhint: `orchestrate cancel {workflow_id}` first")
        before = await self._runs.input(workflow_id, run_id)
        own_secrets = self._own_secrets(before, secrets or {}, asks=self._environment is None)
        report = await self.wait(workflow_id, run_id)
        kept = kept_reports(before.plan, report.steps)
        run = before.model_copy(update={"reports": kept, "attempts": {}, "started_at": None, "sequence": 0})
        return await self._start(run, workflow_id, (), own_secrets)

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

    async def _start(
        self, run: RunInput, workflow_id: str, warnings: tuple[str, ...], own_secrets: Mapping[str, str] | None
    ) -> RunHandle:
        keeping: AbstractAsyncContextManager[None] = nullcontext()
        if own_secrets is not None:
            keeping = handed_over(self.temporal, self.state.secrets_dir, workflow_id, own_secrets)
        try:
            async with keeping:
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

    def _own_secrets(
        self, run: RunInput, given: Mapping[str, str | None], *, asks: bool = False
    ) -> Mapping[str, str] | None:
        """The caller's values of the plan's secrets: of `given` (None says it has none), then of its environment.

        With `asks` it must say something of each. None when there is nothing to hand over: no secrets, or a worker
        elsewhere. Raises `SecretsNeeded`.
        """
        from steps._secrets import is_known

        names = {name for step in run.plan.steps for name in step.secret_variables.values()}
        if not self._local or not names:
            return None
        if asks and (unsaid := names - given.keys()):
            raise SecretsNeeded(*sorted(unsaid))
        said = {**(self._environment or {}), **given}
        own = {name: value for name in names if (value := said.get(name)) is not None}
        missing = sorted(name for name in names - own.keys() if not is_known(name, self.state.secrets_dir))
        if missing:
            raise SecretsNeeded(*missing)
        return own

    def _ray_warnings(self, run: RunInput, wanted: str) -> list[str]:
        """One where steps go to another Ray than the caller's `RAY_ADDRESS`: that of the worker counts."""
        if not self._local or not wanted or not any(step.resources or step.image for step in run.plan.steps):
            return []
        used = chosen_cluster(self.state)[0]
        if wanted == used:
            return []
        at = f"`{used}`" if used else "the local Ray"
        return [f"warning: RAY_ADDRESS is `{wanted}`, but the running services use {at}; `orchestrate down` ends them"]


def _checked_id(workflow_id: str) -> str:
    """Raises `ClientError` for an id that no terminal, header or file can hold."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in workflow_id):
        raise ClientError(
            f"workflow id is `{ascii(workflow_id)[1:-1]}`, wanted a text without control characters\n\n"
            "hint: choose another `--workflow-id`"
        )
    return workflow_id


def _loaded(plan: Plan, plan_dir: str | Path | None) -> LoadedPlan:
    """A plan built in Python, checked like one that was read from a file. Raises `PlanError`."""
    path = Path(plan_dir or Path.cwd()).absolute() / f"{plan.name or 'plan'}.py"
    return LoadedPlan(plan=plan, path=path, warnings=check_plan(plan, str(path)))


def _new_workflow_id(name: str) -> str:
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
