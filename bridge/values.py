"""Values that the types of the models cannot rule out: resources, retries, matrices, environments, secrets."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bridge.amounts import gang_of_an_actor, is_name, wanted_instead
from bridge.expressions import is_template
from bridge.plan import Resources, Step
from bridge.problems import Finding, Path, brief

MAX_COMBINATIONS = 10_000

_MEMORY = re.compile(r"\d+(\.\d+)?\s*([kmgtp](i?b)?|b)?\Z", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"(\A|_)(TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)\Z",
    re.IGNORECASE,
)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
"""The name of an environment variable or a param."""


def step_values(index: int, step: Step) -> Iterator[Finding]:
    """What is wrong or doubtful in the common fields of a step."""
    path: Path = ("steps", index)
    yield from environment((*path, "env"), step.env)
    yield from secrets((*path, "secrets"), step.secrets)
    yield from common_values(path, step)
    if step.matrix is not None:
        yield from _matrix((*path, "matrix"), step)
    elif step.max_parallel is not None:
        yield Finding(
            (*path, "max_parallel"), "`max_parallel` has no effect without `matrix`", "use `locks`", "warning"
        )


def common_values(path: Path, holder: Any) -> Iterator[Finding]:
    """Values that a step and `defaults` have alike."""
    if holder.timeout_seconds is not None and not math.isfinite(holder.timeout_seconds):
        yield Finding(
            (*path, "timeout_seconds"), f"`timeout_seconds`: got `{holder.timeout_seconds}`, wanted a finite number"
        )
    if holder.resources is not None:
        yield from _resources((*path, "resources"), holder.resources)
    if holder.retry is not None:
        for position, cause in enumerate(holder.retry.on or []):
            if isinstance(cause, int) and (cause == 0 or not -64 <= cause <= 255):
                wanted = "wanted 1 to 255, or -1 to -64 for a signal"
                yield Finding((*path, "retry", "on", position), f"`on`: got exit code `{cause}`, {wanted}")


def _resources(path: Path, resources: Resources) -> Iterator[Finding]:
    named: Mapping[str, Any] = {"cpus": resources.cpus, "gpus": resources.gpus, "nodes": resources.nodes}
    places = [((*path, name), value) for name, value in named.items() if value is not None]
    places += [((*path, "custom", name), value) for name, value in resources.custom.items()]
    for place, value in places:
        if not is_template(value) and (wanted := wanted_instead(str(place[len(path)]), value)):
            yield Finding(place, f"`{place[-1]}`: got {brief(value)}, wanted {wanted}, or a template")
    if fault := gang_of_an_actor(resources):
        yield Finding((*path, "actor"), fault, "remove `actor`, or `nodes`")
    elif resources.actor is not None and not is_template(resources.actor) and not is_name(resources.actor):
        yield Finding((*path, "actor"), f"`actor`: got {brief(resources.actor)}, wanted a name")
    memory = resources.memory
    if memory is None or is_template(memory):
        return
    if (isinstance(memory, int) and memory <= 0) or (isinstance(memory, str) and not _MEMORY.match(memory.strip())):
        yield Finding((*path, "memory"), f"`memory`: got {brief(memory)}, wanted bytes or a text like `8GiB`")


def _matrix(path: Path, step: Step) -> Iterator[Finding]:
    size = 1
    if not step.matrix:
        yield Finding(path, f"`matrix` of step `{step.id}` is empty", "add `name: [value, ...]`, or remove it")
    for name, values in (step.matrix or {}).items():
        if isinstance(values, str):
            if not is_template(values):
                yield Finding(
                    (*path, name), f"matrix `{name}`: got {brief(values)}, wanted a list or a template of one"
                )
        elif not values:
            yield Finding((*path, name), f"matrix `{name}` has no values", "add one, or remove it")
        else:
            size *= len(values)
    if size > MAX_COMBINATIONS:
        yield Finding(
            path, f"`matrix` of step `{step.id}` has {size:,} combinations, the limit is {MAX_COMBINATIONS:,}"
        )


def environment(path: Path, env: Mapping[str, Any]) -> Iterator[Finding]:
    """Names that cannot be set, and secrets that are written out."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            yield Finding((*path, name), f"{brief(name)} cannot be the name of an environment variable", at_key=True)
        elif isinstance(value, str) and "\0" in value:
            yield Finding((*path, name), f"`{name}` has a NUL character, which no environment can hold")
        elif _SECRET_NAME.search(name) and isinstance(value, str) and value and not is_template(value):
            message = f"`{name}` looks like a secret that is written in the plan"
            yield Finding(
                (*path, name), message, f"use `secrets: [{name}]`: the value is then stored nowhere", "warning"
            )


def secrets(path: Path, secrets: list[str] | dict[str, str]) -> Iterator[Finding]:
    """Names that cannot be those of a variable or a secret."""
    entries = secrets.items() if isinstance(secrets, dict) else enumerate(secrets)
    for key, secret in entries:
        variable = key if isinstance(key, str) else secret
        if not VARIABLE.match(variable):
            message = f"{brief(variable)} cannot be the name of an environment variable"
            yield Finding(
                (*path, key), message, "write `secrets: {VARIABLE: secret-name}`", at_key=isinstance(key, str)
            )
        elif not secret.strip() or "/" in secret or secret.startswith("."):
            yield Finding((*path, key), f"{brief(secret)} is not the name of a secret")
