"""Containers that steps have started, found by their labels when the process that attended to them is gone.

They outlive that process on purpose: whoever runs the same attempt again attaches to them. So nobody watches over them,
and only who knows that no attempt will come ends them: `orchestrate down`, and whoever finds a job lost.
"""

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from container.engine_socket import EngineError, EngineSocket
from container.launch import SECRETS_IN_CONTAINER

STATE_LABEL = "orchestrate.state"
STEP_LABEL = "orchestrate.step_key"
_ANSWER_S = 5.0
"""How long the engine may be silent when it is asked what there is."""
_REMOVE_S = 20.0


@dataclass(frozen=True)
class StepContainer:
    """A container of a step."""

    name: str
    pid: int
    """Of its first process; 0 when it does not run."""
    secrets: Path | None
    """The file on this machine that its secrets came from."""


def state_digest(state_dir: str) -> str:
    """Value of `STATE_LABEL`: names a state directory among all whose steps this machine's engine may serve.

    Other containers may use the same engine and have a state directory with the same path; their processes are not
    ours, and neither are their steps.
    """
    pid_space = Path("/proc/self/ns/pid").readlink()
    return hashlib.sha256(f"{pid_space} {state_dir}".encode(errors="surrogateescape")).hexdigest()[:20]


def find(label: str, value: str, env: Mapping[str, str]) -> list[StepContainer]:
    """Containers, ended ones too, with this label; none where no engine answers."""
    try:
        engine = EngineSocket(env, _ANSWER_S)
        return [_container(engine, each) for each in engine.list_with_label(f"{label}={value}")]
    except EngineError:
        return []


def end(containers: Sequence[StepContainer], env: Mapping[str, str], grace_s: float) -> list[StepContainer]:
    """SIGTERM to those that run, SIGKILL `grace_s` later; remove all with their secrets. What is left after that."""
    if not containers:
        return []
    engine, deadline = EngineSocket(env, _REMOVE_S), time.monotonic() + grace_s
    running = [each for each in containers if each.pid]
    for each in running:
        with contextlib.suppress(EngineError):
            engine.ask_to_end(each.name)
    for each in running:
        with contextlib.suppress(EngineError):
            engine.wait(each.name, max(0.1, deadline - time.monotonic()))
    left = []
    for each in containers:
        try:
            engine.remove(each.name)
        except EngineError:
            left.append(each)
        if each.secrets is not None:
            each.secrets.unlink(missing_ok=True)
    return left


def _container(engine: EngineSocket, listed: Mapping[str, Any]) -> StepContainer:
    name, pid = listed["Names"][0].removeprefix("/"), 0
    # It may be removed meanwhile.
    with contextlib.suppress(EngineError):
        pid = engine.inspect(name)["State"]["Pid"]
    sources = [mount["Source"] for mount in listed["Mounts"] if mount["Destination"] == SECRETS_IN_CONTAINER]
    return StepContainer(name, pid, Path(sources[0]) if sources else None)
