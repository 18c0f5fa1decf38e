"""Spack environments as steps name them: found beside the plan or among ours, built in the store that a step uses."""

from pathlib import Path

from container.environment import Environment, EnvironmentProblem, check_built, find
from steps._contract import StepError

ACTIVE_VARIABLE = "SYGALDRY_SPACK_ENVIRONMENT"
"""Environment variable that names the environment our entrypoints activate."""


def built_environment(name: str, plan_dir: Path, store: Path) -> Environment:
    """The environment; `StepError` when `store` does not have it, or of another lock."""
    try:
        environment = _find(name, plan_dir)
        check_built(environment, store)
    except EnvironmentProblem as error:
        raise StepError(str(error)) from error
    return environment


def environment_identity(name: str, plan_dir: Path) -> str:
    """Name and hash of the lock; of what has no lock, why: a step that needs it will fail by itself."""
    try:
        environment = _find(name, plan_dir)
        return f"{environment.name} {environment.lock_hash}"
    except EnvironmentProblem as error:
        return f"{name} ({str(error).partition(chr(10))[0]})"


def _find(name: str, plan_dir: Path) -> Environment:
    return find(plan_dir / name if "/" in name else name, [plan_dir / "spack"])
