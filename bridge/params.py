"""Values for a plan's `params`: given on the command line or from Python, checked, and completed by defaults."""

import json
import math
from collections.abc import Mapping
from typing import Any

from bridge.document import core_value
from bridge.plan import Param, Plan
from bridge.problems import PlanError, Problem, brief, describe, listed, nearest_hint

_WANTED = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "`true` or `false`",
    "list": "a list",
    "object": "a mapping",
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def resolve_params(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every declared param. A text is read as its declared type; a list or an object is read as JSON.

    Raises `PlanError` with one problem for each unknown, missing or unfit param.
    """
    problems = [
        Problem(
            path=f"params.{name}",
            message=f"unknown param `{name}`",
            hint=nearest_hint(name, plan.params, "params of this plan") or "this plan declares no `params`",
        )
        for name in given
        if name not in plan.params
    ]
    values = {}
    for name, param in plan.params.items():
        if name in given:
            value, fault = coerce(param, given[name])
        elif param.required:
            value, fault = None, "no value, and it has no default"
        else:
            value, fault = param.default, ""
        values[name] = value
        if fault:
            hint = param.description or f"give it with `-p {name}=VALUE`"
            problems.append(Problem(path=f"params.{name}", message=f"param `{name}`: {fault}", hint=hint))
    if problems:
        raise PlanError(problems)
    return values


def coerce(param: Param, given: Any) -> tuple[Any, str]:
    """The value as the param's type, and what is wrong with it, or an empty text."""
    value = _read(param.type, given) if isinstance(given, str) else given
    if not fits(param.type, value):
        return None, f"got {describe(given)}, wanted {_WANTED[param.type]}{_example(param.type)}"
    if param.choices and value not in param.choices:
        return None, f"got {describe(value)}, wanted one of {listed([str(choice) for choice in param.choices])}"
    return value, ""


def _read(kind: str, text: str) -> Any:
    if kind == "string":
        return text
    if kind == "boolean":
        return _BOOLEANS.get(text.strip().lower(), text)
    if kind in ("integer", "number"):
        return core_value(text.strip())
    try:
        return json.loads(text)
    except ValueError:
        return text


def _example(kind: str) -> str:
    return {"list": ' in JSON, like `["a", "b"]`', "object": ' in JSON, like `{"a": 1}`'}.get(kind, "")


def fits(kind: str, value: Any) -> bool:
    """True when a value is of a param type."""
    if kind in ("integer", "number"):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (kind == "number" and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, {"string": str, "boolean": bool, "list": list, "object": dict}[kind])


def declared_fault(param: Param) -> tuple[str, str]:
    """The field of a declaration that is wrong and why, or two empty texts."""
    for choice in param.choices:
        if not fits(param.type, choice):
            return "choices", f"choice {brief(choice)} is not {_WANTED[param.type]}"
    if param.required or param.default is None:
        return "", ""
    if not fits(param.type, param.default):
        return "default", f"`default`: got {describe(param.default)}, wanted {_WANTED[param.type]}"
    if param.choices and param.default not in param.choices:
        choices = listed([str(choice) for choice in param.choices])
        return "default", f"`default`: got {describe(param.default)}, wanted one of {choices}"
    return "", ""
