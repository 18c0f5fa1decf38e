"""Environments as the verbs of `orchestrate spack` see them: found by name, fit to be built, described."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bridge.cli.failure import Failure
from container.environment import Environment, EnvironmentProblem, find

FOLDERS = (Path("spack"),)
"""Where environments are looked for by name, before where `container.environment` looks."""

environment_argument = click.argument("environment", metavar="ENVIRONMENT")


@contextmanager
def problems() -> Iterator[None]:
    """What is wrong with an environment becomes a `Failure`."""
    try:
        yield
    except EnvironmentProblem as error:
        raise Failure(str(error)) from error


def environment_of(name: str) -> Environment:
    """The environment of this name or in this folder. `Failure` when there is none."""
    with problems():
        return find(name, FOLDERS)


def locked(name: str) -> Environment:
    """The environment, with a lock that is its manifest's. `Failure` otherwise."""
    found = environment_of(name)
    with problems():
        if reason := found.staleness:
            raise stale(found, reason)
    return found


def stale(environment: Environment, reason: str) -> Failure:
    """What to say of a lock that is not its manifest's any more."""
    return Failure(
        f"the lock of environment `{environment.name}` is stale: {reason}",
        f"`orchestrate spack lock {environment.called or environment.name} --force` makes it anew, "
        f"or put `{environment.manifest_file}` back as it was",
    )


def described(environment: Environment) -> dict[str, Any]:
    """An environment as JSON data. Raises `EnvironmentProblem` where its files cannot be read."""
    document = undescribed(environment) | {"wanted": environment.specs}
    if environment.lock is None:
        return document
    return document | {
        "state": "stale" if environment.staleness else "locked",
        "packages": len(environment.lock["concrete_specs"]),
        "lock_hash": environment.lock_hash,
        "cuda": environment.uses_cuda,
    }


def undescribed(environment: Environment) -> dict[str, Any]:
    """The same of one whose files were not read."""
    return {
        "environment": environment.name,
        "folder": str(environment.folder),
        "state": "not locked",
        "wanted": [],
        "packages": None,
        "lock_hash": None,
        "cuda": None,
    }
