"""A Spack environment built and then verified, as a plan of two steps.

    environment, place, Effort -> plan_text -> the workflow of every plan: build (tried again) -> verify

A build has succeeded when Spack says so and its database has every root of the lock; no log is read for that. Builds
of one store wait for each other, see `hold_store` in `container/entrypoints/_spack.sh`.
"""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from container.environment import Environment
from container.spack_place import Here, Inside, build_command, verify_command

BUILD, VERIFY = "build", "verify"
VERIFY_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Effort:
    """How hard to try."""

    tries: int = 12
    """Builds in all."""
    pause_s: float = 900.0
    """Seconds between the end of one and the next."""
    timeout_s: float = 12 * 3600.0
    """Seconds that one may take; what it had installed by then stays installed."""
    wait_s: float = 3600.0
    """Seconds that one waits for another build of the same store."""


@dataclass(frozen=True)
class Container:
    """What containers of the two steps get."""

    project_id: str
    root: Path
    """Host folder of the project's caches."""
    image: str = ""
    """The standard one by default."""


def plan_name(environment: Environment) -> str:
    """Name of the plan, the beginning of its runs' names."""
    return f"spack-autobuild-{environment.name}"


def plan_text(environment: Environment, place: Here | Inside, effort: Effort, container: Container) -> str:
    """The plan. Raises `EnvironmentProblem` where the environment has no lock."""
    build, verify = build_command(place, environment), verify_command(place, environment)
    # What an image activates by itself may be what is to be built.
    own = {"SYGALDRY_SPACK_WAIT_S": f"{effort.wait_s:.0f}", "SYGALDRY_SPACK_ENVIRONMENT": ""}
    # One try waits for the store and then builds.
    common = {"timeout_seconds": effort.wait_s + effort.timeout_s}
    retry = {"max_attempts": effort.tries, "backoff_s": effort.pause_s, "max_backoff_s": effort.pause_s}
    if isinstance(place, Here):
        env = place.variables(os.environ)
        activated = ["bash", f"{place.entrypoints}/run-job.sh", *verify]
        steps = [
            {**_command(build), "env": {**env, **own}},
            {**_command(activated), "env": {**env, "SYGALDRY_SPACK_ENVIRONMENT": environment.name}},
        ]
    else:
        gpu = verify[1].endswith("verify-gpu.sh")
        steps = [
            _container_job(build, place, environment, container, env=own, entrypoint="default"),
            _container_job(verify, place, environment, container, activated=True, gpu=gpu),
        ]
    name = plan_name(environment)
    return json.dumps(
        {
            "name": name,
            "steps": [
                {"id": BUILD, "name": f"build {environment.name}", **steps[0], **common, "retry": retry},
                {
                    "id": VERIFY,
                    "name": f"verify {environment.name}",
                    **steps[1],
                    "timeout_seconds": VERIFY_TIMEOUT_S,
                    "depends_on": [BUILD],
                },
            ],
        }
    )


def _command(argv: list[str]) -> dict[str, Any]:
    return {"type": "command", "command": argv[0], "args": argv[1:]}


def _container_job(
    argv: list[str], place: Inside, environment: Environment, container: Container, activated: bool = False, **more: Any
) -> dict[str, Any]:
    mounts = [f"{each.host}:{each.container}{':ro' * each.read_only}" for each in place.mounts(environment)]
    block: Mapping[str, Any] = {
        "command": shlex.join(argv),
        "project_id": container.project_id,
        "image": container.image,
        "mounts": mounts,
        "environment": str(environment.folder) if activated else "",
        **more,
    }
    return {
        "type": "container_job",
        "env": {"SYGALDRY_CONTAINER_ROOT": str(container.root)},
        "container_job": {name: value for name, value in block.items() if value},
    }
