"""A call of a Python function on a Ray node, for any Temporal user: the argument of the activity `run_on_ray`."""

from typing import Annotated, Any

from pydantic import Field

from cluster.shape import ResourceShape
from steps import Frozen, StepRequest


class RayCall(Frozen):
    """`RayCall(function="training:train", arguments={"epochs": 3}, resources=ResourceShape(gpus=1))`"""

    function: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]
    """`module:name`; the module is importable on the node, or lies in `plan_dir`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments, JSON."""
    resources: ResourceShape = ResourceShape()
    image: str = ""
    """Container image the function runs in."""
    env: dict[str, str] = {}
    """Environment variables."""
    secrets: dict[str, str] = {}
    """Environment variable -> name of the secret, resolved on the node."""
    artifacts: tuple[str, ...] = ()
    """Files, folders and globs in `plan_dir` that the function must make; they come back from any node."""
    plan_dir: str = ""
    """Folder whose modules can be called, and the working directory; by default the worker's own."""
    timeout_s: Annotated[float, Field(gt=0)] = 7200.0
    grace_s: Annotated[float, Field(ge=0)] = 5.0
    """Seconds between SIGTERM and SIGKILL when it is ended early."""

    @property
    def shape(self) -> ResourceShape:
        """The resources with the image."""
        return self.resources.model_copy(update={"image": self.image or self.resources.image})

    def request(
        self, *, workflow_id: str, run_id: str, call_id: str, attempt: int, log_dir: str, plan_dir: str
    ) -> StepRequest:
        """The step request of one attempt. `call_id` names the call in the run; `plan_dir` is the default folder."""
        folder = self.plan_dir or plan_dir
        return StepRequest(
            workflow_id=workflow_id,
            run_id=run_id,
            step_id=call_id,
            step_name=self.function,
            attempt=attempt,
            type="python",
            params={"call": self.function, "arguments": self.arguments},
            env=self.env,
            secrets=self.secrets,
            artifacts=self.artifacts,
            plan_dir=folder,
            working_dir=folder,
            log_dir=log_dir,
            timeout_s=self.timeout_s,
            grace_s=self.grace_s,
        )
