"""The nouns a step author meets: `Frozen` params, the `Context` a step runs in, and the errors it may raise."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict

Outputs = dict[str, Any]
"""A small JSON object. Bulk travels by path."""


class Frozen(BaseModel):
    """Base of every model that crosses a boundary: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Shell:
    """Marks a text that a shell parses: values put into it by a template are shell-quoted."""


class _PlanPath:
    """Marks a path that is relative to the plan file's folder; it reaches `run` absolute."""


class Gang(Frozen):
    """Place of this process's node among the nodes that run a step together (`resources: {nodes: N}`).

    The same is in the environment: `RANK` and `NODE_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, and what
    `torchrun` reads instead of its arguments (`PET_NNODES`, `PET_NODE_RANK`, `PET_NPROC_PER_NODE`, ...).
    """

    rank: int = 0
    """From 0. The outputs and artifacts of rank 0 are the step's."""
    size: int = 1
    """Nodes in all; 1 for a step that is no gang."""
    processes_per_node: int = 1
    """What `torchrun` starts on each node: one process for each GPU, at least one."""
    master_address: str = ""
    """Address of the node of rank 0; empty for a step that is no gang."""
    master_port: int = 0
    """A port of that node that was free when the gang started."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables; none for a step that is no gang."""
        if not self.master_address:
            return {}
        meeting = {"MASTER_ADDR": self.master_address, "MASTER_PORT": str(self.master_port)}
        ranks = {
            "RANK": self.rank,
            "NODE_RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
        }
        torchrun = {
            **{f"PET_{name}": value for name, value in meeting.items()},
            "PET_NNODES": str(self.size),
            "PET_NODE_RANK": str(self.rank),
            "PET_NPROC_PER_NODE": str(self.processes_per_node),
        }
        return {**meeting, **{name: str(value) for name, value in ranks.items()}, **torchrun}


Shell = Annotated[str, _Shell()]
PlanPath = Annotated[str, _PlanPath()]


class StepError(Exception):
    """The step cannot work as asked (bad input, 404, wrong checksum). Final: it is never tried again."""


class StepFailed(StepError):
    """The step ran and failed; a `retry` in the plan may try it again.

    The second argument, when given, is the exit code of the process that failed.
    """

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, or None where there was none."""
        return self.args[1] if len(self.args) > 1 else None

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class StepCancelled(BaseException):
    """Raised inside `run` when the step is cancelled. A `BaseException`, so that `except Exception` lets it pass."""


class StepTimedOut(StepCancelled):
    """Raised inside `run` when the step's time is over."""


class Context(Protocol):
    """What a running step may use. Everything here is safe to call from the thread that runs `run`."""

    key: str
    """`workflow/run/step/attempt`: the same for ever for this attempt; name and label what you create with it."""
    attempt: int
    """Number of this attempt, from 1."""
    plan_dir: Path
    """Folder of the plan file."""
    working_dir: Path
    """The step's working directory; it exists, and is the process's current directory."""
    attempt_dir: Path
    """Scratch folder of this attempt, beside its logs."""
    env: Mapping[str, str]
    """The step's whole environment: allow-listed, declared, and secrets."""
    declared_env: Mapping[str, str]
    """The part of `env` that the plan and the step declare, secrets included; the rest is the node's."""
    secrets: Mapping[str, str]
    """Resolved secrets by their names. Their values are masked in every log."""
    gpus: Sequence[str]
    """Ids of the GPUs assigned to this step; empty where there are none."""
    gang: Gang
    """Which of several nodes this one is; rank 0 of 1 for a step that is no gang."""
    grace_s: float
    """Seconds between SIGTERM and SIGKILL when the step is ended early."""

    @property
    def cancelled(self) -> bool:
        """True once the step is cancelled or its time is over."""

    def check_cancelled(self) -> None:
        """Raise `StepCancelled` or `StepTimedOut` if the step must end. Call it in loops."""

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` (from another thread) when the step must end, before anything is killed."""

    def log(self, message: str, stream: str = "stdout") -> None:
        """Write one line to the step's log; `stream` is `stdout` or `stderr`."""

    def heartbeat(self, progress: str | Mapping[str, Any]) -> None:
        """Publish progress: a short text, or `{"text": ..., "fraction": 0..1}`. Cheap; call it as often as you like."""

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What an earlier step of the same `actor` has kept under `name`; else what `make` returns, kept from now on.

        It lives as long as the actor, and so do the processes that `make` has started; in a step that names no `actor`,
        as long as the step.
        """

    def run_process(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        working_dir: Path | None = None,
        stdin: bytes | None = None,
    ) -> int:
        """Run a program in its own process group with its output in the step's logs; return its exit code.

        `env` is added to the step's environment. The program is looked up with that environment's PATH. Raises
        `StepError` when it cannot be started.
        """
