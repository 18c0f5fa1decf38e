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
