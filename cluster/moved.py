"""Paths of the plan's folder in texts, made paths of its copy on a node, and back."""

import re
from pathlib import Path
from typing import Any

from steps import StepRequest, StepResult


def moved(value: Any, old: str, new: str) -> Any:
    """The JSON value with every path at or below the folder `old` made one of `new`, inside longer texts too."""
    pattern = re.compile(rf"(?<![\w./-]){re.escape(old)}(?![\w.-])")

    def move(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub(lambda match: new, part)
        if isinstance(part, dict):
            return {key: move(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [move(item) for item in part]
        return part

    return move(value)


def to_copy(request: StepRequest, copy: Path) -> StepRequest:
    """The request for a step that runs in a copy of its plan's folder."""
    fields = {name: moved(getattr(request, name), request.plan_dir, str(copy)) for name in ("params", "env")}
    working_dir = moved(request.working_dir, request.plan_dir, str(copy))
    return request.model_copy(update={**fields, "plan_dir": str(copy), "working_dir": working_dir})


def from_copy(result: StepResult, copy: str, plan_dir: str) -> StepResult:
    """The result with the worker's paths."""
    return result.model_copy(
        update={name: moved(getattr(result, name), copy, plan_dir) for name in ("outputs", "error")}
    )
