"""Ray steps for any Temporal user: one activity, `run_on_ray`, and the worker plugin that registers it.

    outputs = await workflow.execute_activity(
        run_on_ray,
        RayCall(function="training:train", arguments={"epochs": 3}, resources=ResourceShape(gpus=1)),
        start_to_close_timeout=timedelta(hours=6),
        heartbeat_timeout=timedelta(seconds=2),
    )

The call is found again by its key when its worker dies, sends heartbeats, can be cancelled and keeps logs, exactly as a
plan's Ray steps do. Give the plugin to the client (`Client.connect(..., plugins=[RayPlugin()])`); workers take it over.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from temporalio import activity
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.plugin import SimplePlugin

from bridge.activities import attend
from bridge.placement import OnRay, ray_dispatch
from bridge.state import State
from cluster.call import RayCall
from cluster.dispatch import RayDispatch
from cluster.shape import ResourceShape
from steps._files import attempt_dir, file_name

__all__ = ["RayCall", "RayPlugin", "ResourceShape", "run_on_ray"]

_DELIVERED = ".delivered"


@activity.defn(name="run_on_ray")
async def run_on_ray(call: RayCall) -> dict[str, Any]:
    """Call a function on a Ray node; a dict it returns as it is, anything else as `{"result": value}`.

    This is the name and the types for `execute_activity`; `RayPlugin` registers what runs.
    """
    raise ApplicationError("no `RayPlugin` on this worker\n\nhint: `Client.connect(..., plugins=[RayPlugin()])`")


class RayPlugin(SimplePlugin):
    """Registers `run_on_ray`. The cluster is the one `RAY_ADDRESS` names, else the local Ray of `orchestrate up`."""

    def __init__(self, *, log_dir: str | Path | None = None, state: State | None = None) -> None:
        """`log_dir` is the root of the calls' logs, by default the one of plans."""
        self._state = state or State.from_environment()
        self._log_dir = Path(log_dir or self._state.run_log_dir).absolute()
        self._ray: RayDispatch | None = None
        super().__init__(
            "sygaldry_ray.RayPlugin",
            activities=[self._run_on_ray],
            data_converter=_with_pydantic,
            run_context=self._connected,
        )

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        self._ray = ray_dispatch(self._state.create())
        try:
            yield
        finally:
            await self._ray.close()

    @activity.defn(name="run_on_ray")
    async def _run_on_ray(self, call: RayCall) -> dict[str, Any]:
        assert self._ray is not None
        info = activity.info()
        workflow_id, run_id = info.workflow_id or "activity", info.workflow_run_id or "none"
        calls_dir = self._log_dir / file_name(workflow_id) / run_id / file_name(info.activity_id)
        request = call.request(
            workflow_id=workflow_id,
            run_id=run_id,
            call_id=info.activity_id,
            attempt=_next_attempt(calls_dir),
            log_dir=str(self._log_dir),
            plan_dir=str(Path.cwd()),
        )
        if info.start_to_close_timeout is not None:
            # Temporal stops waiting then; what nobody waits for must not hold its node until `timeout_s`.
            longest = min(request.timeout_s, info.start_to_close_timeout.total_seconds())
            request = request.model_copy(update={"timeout_s": longest})
        dispatch = OnRay(self._ray, call.shape)
        result = await attend(lambda: dispatch.attach_or_start(request))
        if result.outcome == "succeeded":
            return result.outputs
        (attempt_dir(request) / _DELIVERED).touch()
        if result.outcome == "cancelled":
            raise CancelledError(result.error or "cancelled")
        raise ApplicationError(
            result.error, result.reason, type=result.reason or result.outcome, non_retryable=result.final
        )


def _next_attempt(calls_dir: Path) -> int:
    """The attempt that is running, or whose result nobody has seen, else a new one.

    Temporal counts a lost worker and a failed call alike; only a reported failure is followed by a new attempt.
    """
    number = 1
    while (calls_dir / f"attempt-{number}" / _DELIVERED).exists():
        number += 1
    return number


def _with_pydantic(given: DataConverter | None) -> DataConverter:
    """The user's own converter, or one that knows pydantic models."""
    return given if given is not None and given != DataConverter.default else pydantic_data_converter
