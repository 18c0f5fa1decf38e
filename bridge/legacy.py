"""The old sequential JSON list (`run -input steps.json`) as a plan: its steps run strictly one after the other."""

import re
from typing import Any

from pydantic import Field

from bridge.document import Node
from bridge.fields import convert, validate
from bridge.plan import Condition, Plan, Step
from bridge.problems import Finding, describe
from steps import Frozen


class _OldStep(Frozen):
    name: str = ""
    command: str
    args: list[str] = []
    env: dict[str, str] = {}
    workingDir: str | None = None
    timeoutSeconds: float | None = None
    allowFailure: bool = False


class _OldList(Frozen):
    logDir: str | None = None
    steps: list[_OldStep] = Field(min_length=1)


def plan_of_list(data: Any, root: Node, name: str) -> tuple[Plan | None, list[Finding]]:
    """The plan of an old list, or None and what is wrong with it. `root` tells how its values were written."""
    if not isinstance(data, dict):
        return None, [Finding((), f"got {describe(data)}, wanted a list of steps or a mapping with `steps`")]
    findings: list[Finding] = []
    data = convert(_OldList, data, root, (), findings.append)
    old, faults = validate(_OldList, data, ())
    findings += faults
    if old is None or findings:
        return None, findings
    return Plan(name=name, log_dir=old.logDir or None, steps=_chained(old.steps)), []


def _chained(old_steps: list[_OldStep]) -> list[Step]:
    chained: list[Step] = []
    taken: set[str] = set()
    for index, old in enumerate(old_steps):
        step_id = _unique_id(old.name, index, taken)
        before = chained[-1] if chained else None
        chained.append(
            Step(
                id=step_id,
                name=old.name,
                type="command",
                params={"command": _literal(old.command), "args": [_literal(arg) for arg in old.args]},
                env={name: _literal(value) for name, value in old.env.items()},
                working_dir=_literal(old.workingDir) if old.workingDir else None,
                timeout_seconds=old.timeoutSeconds if old.timeoutSeconds and old.timeoutSeconds > 0 else None,
                allow_failure=old.allowFailure or None,
                **_after(before),
            )
        )
    return chained


def _literal(text: str) -> str:
    """The text as it stands: old lists have no templates."""
    return text.replace("${{", "${{ '${{' }}")


def _after(before: Step | None) -> dict[str, Any]:
    if before is None:
        return {}
    if not before.allow_failure:
        return {"depends_on": [before.id]}
    # A dependency that failed skips what depends on it; here the next step runs all the same.
    either = [Condition(step=before.id, status="success"), Condition(step=before.id, status="failure")]
    return {"when": Condition(any=either)}


def _unique_id(name: str, index: int, taken: set[str]) -> str:
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or f"step-{index + 1}"
    candidate, number = word, 2
    while candidate.casefold() in taken:
        candidate, number = f"{word}-{number}", number + 1
    taken.add(candidate.casefold())
    return candidate
