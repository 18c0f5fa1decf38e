"""What crosses into and out of the process that runs a step: one request, one result, both JSON."""

from typing import Any, Literal

from steps._contract import Frozen, Gang

Outcome = Literal["succeeded", "failed", "skipped", "cancelled", "timed_out", "not_run"]


class StepRequest(Frozen):
    """One attempt of one step, ready to run: every template is rendered, secrets are named only."""

    workflow_id: str
    run_id: str
    step_id: str
    step_name: str
    attempt: int
    """From 1; a new attempt is a new key and a new folder."""
    type: str
    params: dict[str, Any]
    env: dict[str, str] = {}
    """Environment declared by the plan and the step."""
    secrets: dict[str, str] = {}
    """Environment variable -> name of the secret, resolved where the step runs."""
    plan_dir: str
    working_dir: str
    """Absolute, on the node that runs the step."""
    log_dir: str
    """Root of the logs; the attempt's folder is `<log_dir>/<workflow_id>/<run_id>/<step_id>/attempt-<n>`."""
    timeout_s: float
    grace_s: float = 5.0
    expected_outputs: tuple[str, ...] = ()
    """Output names the plan declares; a step that ends without one of them has failed."""
    artifacts: tuple[str, ...] = ()
    """Files, folders and globs in the plan's folder that the step promises to make."""
    cached_artifacts: tuple[str, ...] = ()
    """The same, for the cache alone: they come back from a node with files of its own, and may be missing."""
    inputs: tuple[str, ...] = ()
    """Files, folders and globs in the plan's folder that the step needs on such a node, whatever is ignored there."""
    gang: Gang = Gang()

    @property
    def key(self) -> str:
        """Stable name of the attempt: a second start with the same key attaches to the first."""
        return f"{self.step_key}/{self.attempt}"

    @property
    def step_key(self) -> str:
        """Key of the step, shared by its attempts."""
        return f"{self.workflow_id}/{self.run_id}/{self.step_id}"


class Progress(Frozen):
    """What a running attempt last said."""

    text: str = ""
    fraction: float | None = None
    """0..1, None when unknown."""
    node: str = ""
    pid: int = 0
    last_line: str = ""
    """Last line of its log."""


class StepResult(Frozen):
    """How one attempt ended."""

    outcome: Outcome
    reason: str = ""
    """Short word for machines and tables: `exit_code`, `error`, `timeout`, `infrastructure`, `cached`, ..."""
    error: str = ""
    """Sentence for people; empty when the step succeeded."""
    final: bool = False
    """True when trying again cannot help."""
    exit_code: int | None = None
    outputs: dict[str, Any] = {}
    started_at: float = 0.0
    """Unix time, seconds."""
    duration_s: float = 0.0
    node: str = ""
    """Host name of the machine (or Ray node) that ran the attempt."""
    pid: int = 0
    image: str = ""
    gpus: tuple[str, ...] = ()
    """Ids of the GPUs that were assigned, as `CUDA_VISIBLE_DEVICES` had them; a gang's rank by rank."""
    artifacts: dict[str, str] = {}
    """Path in the plan's folder -> `sha256:...` of each file the step has promised and made."""
    attempt_dir: str = ""
    """Folder with `stdout.log`, `stderr.log` and `structured.jsonl` of the attempt."""
